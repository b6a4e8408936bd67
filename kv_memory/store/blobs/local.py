"""Blobs: immutable bytes named by their SHA-256. The embedded form keeps them in diskcache; see objects.py too."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import diskcache
from diskcache.core import DBNAME, MODE_BINARY, UNKNOWN

from kv_memory.errors import CorruptCacheError, StoreError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_file, private_folder, private_opener
from kv_memory.store.sql.locks import FileLocks

__all__ = [
    "BlobAudit",
    "BlobStore",
    "DiskBlobs",
    "SafeTensorsDisk",
    "blob_key",
    "check_folder",
    "is_blob_key",
]

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


_NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


class SafeTensorsDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are `str`, values are `bytes`, each value is one durable file inside the folder."""

    def __init__(self, directory: str, **settings: Any) -> None:  # diskcache passes its own `disk_*` settings
        super().__init__(directory, **settings)
        self._root = os.path.realpath(directory)
        self._durable_folders: set[str] = set()
        self.written = threading.local()  # .path: the file this thread wrote last, for undoing a failed insert

    def confined(self, filename: object) -> str | None:
        """The full path of a row's `filename`, or None if it leaves the folder or is no value file."""
        if not isinstance(filename, str) or not filename.endswith(".val") or "\0" in filename:
            return None
        path = os.path.realpath(os.path.join(self._root, filename))
        return path if path.startswith(self._root + os.sep) else None

    def put(self, key: Any) -> tuple[str, bool]:
        """A key as it is stored."""
        if type(key) is not str:
            raise TypeError(f"blob keys are str, got {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """A stored key; anything that was not stored as text is refused."""
        if not raw or type(key) is not str:
            raise CorruptCacheError("a blob key is not plain text and is not decoded", where=self._root)
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        """Write a value as a file."""
        if type(value) is not bytes or read:
            raise TypeError(f"blobs are bytes, got {type(value).__name__}")
        # Through a stream, because that branch always writes a file, however small.
        size, mode, filename, _ = super().store(io.BytesIO(value), True, key=key)
        self.written.path = os.path.join(self._root, filename)
        return size, mode, filename, None

    def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
        """A new name for a value's file, relative and absolute.

        In one of 16 folders, where diskcache has 65,536: they are soon all there, and a file in a folder that is new
        costs one more fsync. A million files are 62,500 in each, which file systems with indexed folders bear well.
        """
        name = uuid.uuid4().hex
        filename = os.path.join(name[0], f"{name[1:]}.val")
        return filename, os.path.join(self._root, filename)

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> BinaryIO:
        """Open a value, whether or not `read` asks for its bytes; rows that others wrote are refused."""
        path = self.confined(filename)
        if mode != MODE_BINARY or value is not None or path is None:
            raise CorruptCacheError("a blob's row is not one that this package writes", where=self._root)
        try:
            handle = open(path, "rb")  # noqa: SIM115  the caller closes it
        except OSError as error:
            if error.errno in _NO_FILE:
                raise CorruptCacheError("something else is in the place of a blob's file", where=path) from error
            # Cache.get takes every OSError for a missing key; a forbidden file, or one too many open, is not missing.
            with mapped(path) if error.errno != errno.ENOENT else nullcontext():
                raise
        return handle

    def remove(self, file_path: Any) -> None:
        """Remove a value file; a row that points outside loses its row, never somebody else's file."""
        path = self.confined(file_path)
        if path is not None:
            # Its folder stays, though it may be empty now: somebody may be about to write into it.
            with suppress(FileNotFoundError):
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)

    def _write(self, full_path: str, iterator: Iterable[bytes], mode: str, encoding: str | None = None) -> int:
        temporary = full_path + ".tmp"
        folder = os.path.dirname(full_path)
        if folder not in self._durable_folders:  # made by us, or by somebody who has not come to its fsync yet
            private_folder(Path(folder))
            fsync_folder(self._root)
            self._durable_folders.add(folder)
        try:
            with open(temporary, "xb", opener=private_opener) as handle:
                size = sum(handle.write(chunk) for chunk in iterator)
                handle.flush()
                os.fsync(handle.fileno())
            os.rename(temporary, full_path)
            fsync_folder(folder)
        except BaseException:
            for path in (temporary, full_path):
                with suppress(OSError):
                    os.unlink(path)
            raise
        return size
