"""The hardened `Disk` of diskcache: files of bytes under string keys, and nothing that could be unpickled.

diskcache 5.6.3 is the last release and unpickles on read (CVE-2025-69872): whoever can write to the folder can run code
in every reader. This class never reaches that code. Contract: `diskcache.core.Disk`, 5.6.3.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import uuid
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import diskcache
from diskcache.core import MODE_BINARY, UNKNOWN

from kv_memory.errors import CorruptCacheError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_folder, private_opener

__all__ = ["SafeTensorsDisk"]

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
