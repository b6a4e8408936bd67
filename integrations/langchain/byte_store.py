"""KVMemoryByteStore: LangChain's byte store, in the folder of the memory's store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from langchain_core.stores import BaseStore

from kv_memory import ConfigError, CorruptCacheError, KVMemory
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.catalog import BUSY_TIMEOUT_S

__all__ = ["KVMemoryByteStore"]

_HASH_BYTES = 32
_ATTEMPTS = 8


class KVMemoryByteStore(BaseStore[str, bytes]):
    """A `ByteStore` beside the distilled caches: for embeddings (`CacheBackedEmbeddings`) or parent documents.

    It writes through the same hardened diskcache as the caches: synced files, nothing unpickled, each with its SHA-256,
    which is checked on every read. Values lie in a folder of their own, one for each collection and namespace, so
    that maintenance of the caches never touches them, and a copy of the store's folder includes them. Distilled caches
    are not accessible here: they are found by text and model, never by name.

    Safe to use from several threads and processes. Every method may raise the `StoreError` subclasses for a full disk
    and a forbidden folder.

    Args:
        memory: Memory that sets the folder and the collection; its model is not loaded.
        namespace: Name that separates several byte stores of one collection.

    Example:
        ```python
        store = KVMemoryByteStore(memory, namespace="embeddings")
        embeddings = CacheBackedEmbeddings.from_bytes_store(model, store)
        ```
    """

    def __init__(self, memory: KVMemory, *, namespace: str = "") -> None:
        # Hashed, because the names may contain characters that a folder's name may not, or lead out of the store.
        name = hashlib.sha256(f"{memory.collection}\0{namespace}".encode()).hexdigest()[:32]
        folder = memory.path / "bytes" / name
        with mapped(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._blobs = DiskBlobs(folder, timeout_s=BUSY_TIMEOUT_S)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys, None for missing ones.

        Raises:
            CorruptCacheError: A value's bytes are not those that were written. Delete the key, or write it again.
        """
        return [self._read(_checked(key)) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write values durably, one by one; an existing key gets the new value.

        Raises:
            ConfigError: A key is not a string or is empty, or a value is not bytes; nothing is written.
        """
        for key, value in key_value_pairs:
            if not isinstance(value, bytes):
                raise ConfigError(f"values are bytes, got {type(value).__name__}", where=_checked(key))
            _checked(key)
        for key, value in key_value_pairs:
            self._blobs.put(key, hashlib.sha256(value).digest() + value, replace=True)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys; missing ones are ignored."""
        for key in keys:
            self._blobs.delete(_checked(key))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The keys, or those that begin with the prefix, sorted."""
        # All keys are listed first: diskcache's own iterator is bound to the thread that created it, and LangChain's
        # asynchronous form runs each step in any free thread.
        yield from sorted(key for key in self._blobs.audit().keys if key.startswith(prefix or ""))

    def _read(self, key: str) -> bytes | None:
        data = self._bytes(key)
        if data is None:
            return None
        value = data[_HASH_BYTES:]
        if hashlib.sha256(value).digest() != data[:_HASH_BYTES]:
            raise CorruptCacheError(
                "the bytes are not those that were written",
                where=f"{key} in {self._blobs.folder}",
                next_step="Delete the key, or write it again.",
            )
        return value

    def _bytes(self, key: str) -> bytes | None:
        # Entry and file are looked up one after the other, so a value that is replaced in between only seems missing.
        for _ in range(_ATTEMPTS):
            if (path := self._blobs.path(key)) is not None:
                with suppress(FileNotFoundError):
                    return path.read_bytes()
            elif not self._blobs.has(key):
                return None
        return None  # an entry without its file, which was lost

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with their threads."""
        self._blobs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked(key: str) -> str:
    if not isinstance(key, str) or not key:
        raise ConfigError(f"a key is a str that is not empty, got {key!r}", where="key")
    return key
