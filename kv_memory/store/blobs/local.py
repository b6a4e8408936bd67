"""Blobs: immutable bytes named by their SHA-256. The embedded form keeps them in diskcache; see objects.py too."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import diskcache
from diskcache.core import DBNAME, MODE_BINARY

from kv_memory.errors import CorruptCacheError, StoreError
from kv_memory.store.blobs.disk import SafeTensorsDisk
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import private_file
from kv_memory.store.sql.locks import FileLocks

__all__ = ["BlobAudit", "BlobStore", "DiskBlobs", "blob_key", "check_folder", "is_blob_key"]


_WRITING = "writing blobs"


def blob_key(data: bytes) -> str:
    """The name of a blob: the SHA-256 hex digest of its bytes."""
    return hashlib.sha256(data).hexdigest()


def check_folder(folder: Path) -> None:
    """Refuse a path that diskcache would take for another one: it expands `$NAME` in what it is given.

    Raises:
        StoreError: The path holds the name of an environment variable.
    """
    if os.path.expandvars(folder) != str(folder):
        raise StoreError(
            "a store's path may not hold the name of an environment variable",
            where=str(folder),
            next_step="Rename the folder so that its path has no `$NAME` in it.",
        )


def is_blob_key(name: str) -> bool:
    """Whether `blob_key` could have given this name; the catalog may have been tampered with."""
    return re.fullmatch("[0-9a-f]{64}", name) is not None


@dataclass(frozen=True, kw_only=True)
class BlobAudit:
    """What lies in a blob store.

    Attributes:
        keys: Names of the blobs whose file is there. The bytes are not looked at.
        strays: Files and rows that belong to no blob: unfinished writes, rows without a file, tampered rows.
        freed_bytes: Size of the files that were removed; 0 unless it was asked for.
    """

    keys: frozenset[str]
    strays: tuple[str, ...]
    freed_bytes: int = 0


class BlobStore(Protocol):
    """Where blobs live. An implementation is thread-safe; it trusts the caller with keys, and checks no hashes."""

    def put(self, key: str, data: bytes) -> None:
        """Store a blob durably. A key that is there already is left as it is.

        Raises:
            StoreFullError: No space; nothing of this blob is left behind.
            StorePermissionError: The folder may not be written.
        """

    def path(self, key: str, *, fresh: bool = False) -> Path | None:
        """A local file of a blob, or None if there is no such blob.

        Args:
            key: The blob's name.
            fresh: Not a copy: whatever lies nearer than the store itself is dropped and read anew.

        Raises:
            CorruptCacheError: The store's own entry for the key was tampered with.
        """

    def delete(self, key: str) -> int:
        """Remove a blob if it is there; returns the bytes freed."""

    def audit(self, *, repair: bool = False) -> BlobAudit:
        """List what is there. With `repair`, remove what belongs to no blob. Writers wait meanwhile."""


class DiskBlobs:
    """Blobs in a folder of their own, kept by a hardened diskcache.

    A folder of its own, because diskcache takes every file in it for its own. It is opened at the first use: opening
    costs about 40 small transactions, which a command that reads only the catalog should not pay.

    Args:
        folder: Absolute; must exist.
        timeout_s: How long to wait for another process's write, in seconds.
        size_limit: As a tier in front of an object store: drop what was read longest ago beyond so many bytes. None
            for a store, which drops nothing by itself.
    """

    def __init__(self, folder: Path, *, timeout_s: float, size_limit: int | None = None) -> None:
        self.folder = folder
        self.size_limit = size_limit
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._opened: Any = None
        # Beside the folder: in it, the file would belong to no blob. Writers share a name of it; an audit holds that
        # name alone, so that it never takes a write under way for the leftovers of a crash.
        self._locks = FileLocks(folder.with_name("locks"))

    @property
    def _cache(self) -> Any:
        with self._lock:
            if self._opened is None:
                private_file(self.folder / DBNAME)
                cache = diskcache.Cache(
                    str(self.folder),
                    timeout=self._timeout_s,
                    disk=SafeTensorsDisk,
                    # The defaults evict silently, even what was just written. Quotas and age live in the catalog.
                    eviction_policy="none" if self.size_limit is None else "least-recently-used",
                    cull_limit=0 if self.size_limit is None else 2,  # a put; more might reach what was just written
                    size_limit=2**62 if self.size_limit is None else self.size_limit,
                )
                self._opened = cache
            return self._opened

    @contextmanager
    def _used(self) -> Iterator[Any]:
        """diskcache, with its errors mapped. After Ctrl-C another one is opened, with connections of its own.

        Interrupted while it begins a transaction it never ends it: no process could write any more.
        """
        with mapped(self.folder):
            try:
                yield self._cache
            except Exception:
                raise
            except BaseException:
                self.close()
                raise

    def warm(self) -> None:
        """Open diskcache now instead of at the first use."""
        with self._used():
            pass

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """See `BlobStore.put`. With `replace` a key that is there gets the new bytes, at once."""
        with self._locks.sharing(_WRITING), self._used() as cache:
            cache.disk.written.path = None
            # With diskcache's default (NORMAL) a power cut can take a row whose catalog row is durable. Said for this
            # thread's connection rather than as a setting: opening would then sync 40 times instead of twice.
            cache.reset("sqlite_synchronous", 2, update=False)
            try:
                # add, not set: of two processes with the same blob the second drops its own file, where set would
                # drop the first one's, which a reader may be about to open.
                (cache.set if replace else cache.add)(key, data)
            except Exception:
                # diskcache leaves the file behind when the row could not be written. After Ctrl-C nobody knows whether
                # it was: the file stays, and is swept up later if it has no row.
                if (path := cache.disk.written.path) is not None:
                    with suppress(OSError):
                        os.unlink(path)
                raise

    def path(self, key: str, *, fresh: bool = False) -> Path | None:
        """See `BlobStore.path`. There is nothing nearer than this."""
        with self._used() as cache:
            handle = cache.get(key, read=True)
            if handle is None:
                return None
            with handle:
                return Path(handle.name)

    def has(self, key: str) -> bool:
        """Whether there is an entry for the key; its file is not looked at."""
        with self._used() as cache:
            return key in cache

    def delete(self, key: str) -> int:
        """See `BlobStore.delete`."""
        with self._locks.sharing(_WRITING), self._used() as cache:
            freed_bytes = 0
            with suppress(CorruptCacheError):
                if (path := self.path(key)) is not None:
                    freed_bytes = path.stat().st_size
            cache.delete(key)
            return freed_bytes

    def audit(self, *, repair: bool = False) -> BlobAudit:
        """See `BlobStore.audit`. Reads diskcache's table itself: `iterkeys` and `check` stumble over tampered rows."""
        with self._locks.hold(_WRITING), mapped(self.folder):
            disk: SafeTensorsDisk = self._cache.disk
            keys: set[str] = set()
            files: set[str] = set()
            strays: list[str] = []
            freed_bytes = 0
            database = self.folder / DBNAME
            with closing(sqlite3.connect(database, timeout=self._timeout_s, isolation_level=None)) as connection:
                rows = connection.execute("SELECT rowid, key, raw, mode, filename, value FROM Cache").fetchall()
                for rowid, key, raw, mode, filename, value in rows:
                    path = disk.confined(filename)
                    ours = isinstance(key, str) and raw == 1 and mode == MODE_BINARY and value is None
                    if ours and path is not None and os.path.isfile(path):
                        keys.add(key)
                        files.add(path)
                        continue
                    strays.append(f"row {rowid}")
                    if repair:
                        connection.execute("DELETE FROM Cache WHERE rowid = ?", (rowid,))
            root = os.path.realpath(self.folder)
            own = {os.path.join(root, DBNAME + suffix) for suffix in ("", "-wal", "-shm", "-journal")}
            for folder, _, names in os.walk(root):
                for path in (os.path.join(folder, name) for name in names):
                    if path in files or path in own:
                        continue
                    strays.append(os.path.relpath(path, root))
                    if repair:
                        freed_bytes += os.lstat(path).st_size
                        os.unlink(path)
            return BlobAudit(keys=frozenset(keys), strays=tuple(sorted(strays)), freed_bytes=freed_bytes)

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with their threads."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None
