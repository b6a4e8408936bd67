"""Blobs: immutable bytes named by their SHA-256, in a folder managed by diskcache; for object stores see remote.py."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DBNAME, MODE_BINARY, UNKNOWN

from kv_memory.errors import CorruptCacheError, StoreError
from kv_memory.store.error_mapping import raise_mapped
from kv_memory.store.fs import fsync_folder, private_file, private_folder, private_opener, walk_files


def blob_key(data: bytes) -> str:
    """The name of a blob: the SHA-256 hex digest of its bytes."""
    return hashlib.sha256(data).hexdigest()


def check_folder(folder: Path) -> None:
    """Refuse, with a `StoreError`, a path that diskcache would change, because it expands `$NAME` in paths."""
    if os.path.expandvars(folder) != str(folder):
        raise StoreError(
            "a store's path must not contain the name of an environment variable",
            where=str(folder),
            next_step="Rename the folder so that its path has no `$NAME` in it.",
        )


def is_blob_key(name: str) -> bool:
    """Whether `blob_key` could have returned this name; the catalog may have been tampered with."""
    return re.fullmatch("[0-9a-f]{64}", name) is not None


@dataclass(frozen=True, kw_only=True)
class BlobAudit:
    """Contents of a blob store.

    Attributes:
        keys: Names of the blobs that have a file; its bytes are not checked.
        young: Those of them that are younger than `min_age_s`.
        strays: Files and rows that belong to no blob: unfinished writes, rows without a file, tampered rows.
        freed_bytes: Size of the removed files in bytes; 0 without `repair`.
    """

    keys: set[str]
    young: set[str]
    strays: list[str]
    freed_bytes: int


class DiskBlobs:
    """Blobs in a separate folder, managed by a hardened diskcache. Thread-safe; hashes are the caller's to check.

    The folder is separate, because diskcache treats every file in it as its own. diskcache is opened at first use:
    opening costs about 40 small transactions, which a command that only reads the catalog should not pay.

    Args:
        folder: Absolute path of the folder, which must exist.
        timeout_s: Time to wait for another process's write, in seconds.
        size_limit: Size limit in bytes of a tier in front of an object store, beyond which the least recently read
            blobs are evicted. None for a store, which evicts nothing by itself.
        durable: Whether a blob survives a power cut once it is stored.
    """

    def __init__(self, folder: Path, *, timeout_s: float, size_limit: int | None = None, durable: bool = True) -> None:
        self.folder = folder
        self.where = str(folder)
        self.size_limit = size_limit
        self.durable = durable
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._opened: Any = None

    @contextmanager
    def _cache(self) -> Iterator[Any]:
        """diskcache, with its errors mapped; after Ctrl-C it is opened again, with new connections.

        A diskcache interrupted while it begins a transaction never ends it: no process could write any more.
        """
        try:
            with self._lock:
                if self._opened is None:
                    private_file(self.folder / DBNAME)
                    # The defaults evict silently, even what was just written. The catalog has size limits and expiry.
                    self._opened = diskcache.Cache(
                        str(self.folder),
                        timeout=self._timeout_s,
                        disk=SafeTensorsDisk,
                        eviction_policy="none" if self.size_limit is None else "least-recently-used",
                        cull_limit=0 if self.size_limit is None else 2,  # per put; more might evict the new one
                        size_limit=self.size_limit or 2**62,
                    )
                cache = self._opened
            yield cache
        except Exception as error:
            raise_mapped(error, self.where)
        except BaseException:
            self.close()
            raise

    def warm(self) -> None:
        """Open diskcache now instead of at the first use."""
        with self._cache():
            pass

    def put(self, blobs: Mapping[str, bytes | Path], *, replace: bool = False) -> None:
        """Store blobs durably; with `replace`, an existing key gets the new bytes, otherwise it keeps the old ones.

        A blob is given as its bytes, or as a file with them, which is linked and must never be written to.

        Raises:
            CorruptCacheError: A file does not exist any more.
            StoreFullError: No space left; nothing of these blobs stays behind.
            StoreError: The folder is not writable.
        """
        with self._cache() as cache:
            disk: SafeTensorsDisk = cache.disk
            # With diskcache's default (NORMAL) a power cut can lose a row although its catalog row is durable. Set
            # for this thread's connection and not as a setting, with which opening would sync 40 times instead of
            # twice.
            cache.reset("sqlite_synchronous", 2 if self.durable else 0, update=False)
            files: dict[str, _File] = {}
            try:
                # 1. Write the files, before the transaction, for which other processes wait.
                for key, data in blobs.items():
                    files[key] = disk.write(key, data, durable=self.durable)
                if self.durable:
                    for folder in {os.path.dirname(file.path) for file in files.values()}:
                        fsync_folder(folder)
                # 2. Insert their rows. Of two processes with the same blob the second drops its own file, and not the
                # first one's, which a reader may be about to open. A row without its file gets the new one.
                with cache.transact():
                    for key, file in files.items():
                        if replace or not _has(cache, key):
                            cache.set(key, file)
                        else:
                            disk.remove(file.name)
            except Exception:
                # diskcache leaves a file behind if it could not write the row. After Ctrl-C it is unknown whether
                # it did: the files stay, and a later audit removes those without a row.
                for file in files.values():
                    with suppress(OSError):
                        os.unlink(file.path)
                raise

    def open(self, key: str, *, fresh: bool = False) -> BufferedReader | None:
        """The file of a blob, open for reading; None if the blob does not exist.

        With `fresh`, a copy in the tier in front of an object store is dropped first; no effect here.

        Raises:
            CorruptCacheError: diskcache's row of the blob was tampered with.
        """
        with self._cache() as cache:
            handle: BufferedReader | None = cache.get(key, read=True)
        return handle

    def has(self, key: str) -> bool:
        """Whether the blob exists; its bytes are not checked."""
        with self._cache() as cache:
            return _has(cache, key)

    def delete(self, key: str) -> int:
        """Remove a blob if it exists; returns the number of bytes freed."""
        freed_bytes = 0
        with suppress(CorruptCacheError):
            if (file := self.open(key)) is not None:
                with file:
                    freed_bytes = os.fstat(file.fileno()).st_size
        with self._cache() as cache:
            cache.delete(key)
        return freed_bytes

    def audit(self, *, min_age_s: float, repair: bool = False) -> BlobAudit:
        """List the contents and, with `repair`, remove what belongs to no blob.

        A file without a row is a leftover from an age of `min_age_s`; a younger one may be a write in progress.
        """
        with self._cache() as cache:
            disk: SafeTensorsDisk = cache.disk
            keys: dict[str, str] = {}  # by file
            strays: list[str] = []
            # The SQL table itself, because `iterkeys` and `check` of diskcache fail on tampered rows.
            with closing(sqlite3.connect(self.folder / DBNAME, timeout=self._timeout_s, isolation_level=None)) as rows:
                columns = "rowid, key, raw, mode, filename, value"
                for rowid, key, raw, mode, filename, value in rows.execute(f"SELECT {columns} FROM Cache").fetchall():
                    path = disk.confined(filename)
                    ours = isinstance(key, str) and raw == 1 and mode == MODE_BINARY and value is None
                    if ours and path is not None and os.path.isfile(path):
                        keys[path] = key
                        continue
                    strays.append(f"row {rowid}")
                    if repair:
                        rows.execute("DELETE FROM Cache WHERE rowid = ?", (rowid,))
            young: set[str] = set()
            freed_bytes = 0
            latest = time.time() - min_age_s
            own = os.path.join(disk.root, DBNAME)  # and with `-wal`, `-shm`, `-journal`
            for path, status in walk_files(disk.root):
                if path in keys:
                    if status.st_mtime > latest:
                        young.add(keys[path])
                elif status.st_mtime <= latest and not path.startswith(own):
                    strays.append(os.path.relpath(path, disk.root))
                    if repair:
                        freed_bytes += status.st_size
                        with suppress(FileNotFoundError):
                            os.unlink(path)
            return BlobAudit(keys=set(keys.values()), young=young, strays=strays, freed_bytes=freed_bytes)

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with their threads."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None


def _has(cache: Any, key: str) -> bool:
    with suppress(CorruptCacheError):  # of a tampered row
        if (file := cache.get(key, read=True)) is not None:
            file.close()
            return True
    return False


_NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


@dataclass(frozen=True)
class _File:
    """A written file that has no row yet: its name in the folder, full path, and size in bytes."""

    name: str
    path: str
    size_bytes: int


class SafeTensorsDisk(diskcache.Disk):  # type: ignore[misc]
    """Storage of `str` keys and of values that are files inside the folder, written before by `write`.

    A file has a name of its own and not that of its blob: diskcache writes a new file before it drops the old one.
    """

    def __init__(self, directory: str, **settings: Any) -> None:  # diskcache passes its own `disk_*` settings
        super().__init__(directory, **settings)
        self.root = os.path.realpath(directory)
        self._durable_folders: set[str] = set()

    def confined(self, filename: object) -> str | None:
        """The full path of a row's `filename`; None if it leaves the folder or is not a value file."""
        if not isinstance(filename, str) or not filename.endswith(".val") or "\0" in filename:
            return None
        path = os.path.realpath(os.path.join(self.root, filename))
        return path if path.startswith(self.root + os.sep) else None

    def put(self, key: Any) -> tuple[str, bool]:
        """The stored form of a key."""
        if type(key) is not str:
            raise TypeError(f"blob keys are str, got {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """A key from its stored form; anything but text is refused."""
        if not raw or type(key) is not str:
            raise CorruptCacheError("a blob key is not plain text and was not decoded", where=self.root)
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        """The columns of a value's row."""
        if type(value) is not _File or read:
            raise TypeError(f"blobs are files written before, got {type(value).__name__}")
        return value.size_bytes, MODE_BINARY, value.name, None

    def write(self, key: str, data: bytes | Path, *, durable: bool, again: bool = True) -> _File:
        """Write a file, or link one, and once more if it vanishes; to be durable its folder must be synced too."""
        name, path = self.filename()
        temporary, folder = path + ".tmp", os.path.dirname(path)
        try:
            if folder not in self._durable_folders:  # new, or made by a process that has not synced it yet
                private_folder(Path(folder))
                if durable:
                    fsync_folder(self.root)
                self._durable_folders.add(folder)
            if isinstance(data, Path):
                try:
                    os.link(data, temporary)
                except OSError:  # another file system, or one without links
                    data = data.read_bytes()
                    if blob_key(data) != key:
                        raise CorruptCacheError("the blob changed meanwhile", where=f"blob {key}") from None
            if isinstance(data, bytes):
                with open(temporary, "xb", opener=private_opener) as file:
                    file.write(data)
            if durable:
                with open(temporary, "rb+") as file:
                    os.utime(temporary)  # a linked file is as young as a written one, for `audit`
                    os.fsync(file.fileno())
            os.rename(temporary, path)
            return _File(name, path, os.path.getsize(path))
        except BaseException as error:
            for leftover in (temporary, path):
                with suppress(OSError):
                    os.unlink(leftover)
            if not isinstance(error, FileNotFoundError):
                raise
            if isinstance(data, Path) and not data.exists():
                raise CorruptCacheError("the blob was removed meanwhile", where=f"blob {key}") from error
            if not again:
                raise
        # A purge has taken the unfinished file for a leftover.
        return self.write(key, data, durable=durable, again=False)

    def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
        """A new name for a value's file, as a relative and an absolute path.

        The file is in one of 16 folders, not of diskcache's 65,536: all 16 soon exist, and a file in a new folder
        costs one more fsync. A million files are 62,500 per folder, which file systems with indexed folders handle
        well.
        """
        name = uuid.uuid4().hex
        filename = os.path.join(name[0], f"{name[1:]}.val")
        return filename, os.path.join(self.root, filename)

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> BufferedReader:
        """Open a value as a file, with or without `read`; rows that this package did not write are refused."""
        path = self.confined(filename)
        if mode != MODE_BINARY or value is not None or path is None:
            raise CorruptCacheError("a blob's row was not written by this package", where=self.root)
        try:
            return open(path, "rb")  # the caller closes it
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            if error.errno in _NO_FILE:
                raise CorruptCacheError("the path of a blob is not a regular file", where=path) from error
            # Mapped here, because `Cache.get` treats every OSError as a missing key; a forbidden file, or one too many
            # open, is not missing.
            raise_mapped(error, path)

    def remove(self, file_path: Any) -> None:
        """Remove a value file; a path outside the folder is left alone, and only its row goes."""
        path = self.confined(file_path)
        if path is not None:
            # Its folder stays even if it is empty: another process may be about to write into it.
            with suppress(FileNotFoundError):
                (os.rmdir if os.path.isdir(path) else os.unlink)(path)
