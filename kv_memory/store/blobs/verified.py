"""Reads blobs after checking their hash, and quarantines damaged ones."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

from kv_memory.errors import CorruptCacheError
from kv_memory.store.blobs.local import BlobStore, DiskBlobs
from kv_memory.store.error_mapping import mapped

__all__ = ["VerifiedBlobs"]

_AT_REST_NS = 50_000_000


class VerifiedBlobs:
    """A blob store that returns a path only after the bytes were hashed in this process.

    Args:
        blobs: Storage of the bytes.
        quarantine: Folder for damaged blobs, which must exist.
    """

    def __init__(self, blobs: BlobStore, quarantine: Path) -> None:
        self.blobs = blobs
        self.quarantine_folder = quarantine
        self._lock = threading.Lock()
        self._hashed: dict[str, tuple[int, int, int]] = {}

    def verified_path(self, key: str, size_bytes: int, *, again: bool = False) -> Path:
        """The file of a blob, after a check of its length and SHA-256.

        A file is hashed once per process, and again if it was replaced or written to since.

        Args:
            key: Name of the blob, which is its SHA-256.
            size_bytes: Size of the blob in bytes according to the catalog.
            again: Whether to hash the file even if it was hashed before.

        Raises:
            CorruptCacheError: The blob is missing, or its bytes are wrong.
        """
        try:
            return self._verified(key, size_bytes, again=again)
        except CorruptCacheError:
            # Perhaps only the copy in the tier in front of an object store is damaged.
            return self._verified(key, size_bytes, again=True, fresh=True)

    def _verified(self, key: str, size_bytes: int, *, again: bool, fresh: bool = False) -> Path:
        path = self.blobs.path(key, fresh=fresh)
        if path is None:
            raise CorruptCacheError("the blob is missing", where=f"blob {key}")
        with mapped(path):
            try:
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
                    if status.st_size != size_bytes:
                        raise CorruptCacheError(
                            f"the blob has {status.st_size} bytes, expected {size_bytes}", where=f"blob {key}"
                        )
                    identity = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
                    with self._lock:
                        known = self._hashed.get(key)
                    if again or known != identity:
                        if hashlib.file_digest(file, "sha256").hexdigest() != key:
                            raise CorruptCacheError("the blob's bytes do not match its SHA-256", where=f"blob {key}")
                        # File times advance in steps of some milliseconds: a file written to in the step in which it
                        # was hashed looks unchanged. So a file is remembered only once it has been at rest.
                        if time.time_ns() - max(identity[1:]) > _AT_REST_NS:
                            with self._lock:
                                self._hashed[key] = identity
            except FileNotFoundError:
                raise CorruptCacheError("the blob is missing", where=f"blob {key}") from None
        return path

    def sound(self, key: str, size_bytes: int) -> bool:
        """Whether `verified_path` would return."""
        try:
            self.verified_path(key, size_bytes)
        except CorruptCacheError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Store a blob durably; one that is there already is used if it is sound and replaced if it is not.

        Hold the catalog's lock `blob KEY` meanwhile and until a row names the blob; otherwise it may be swept away.
        """
        if isinstance(self.blobs, DiskBlobs):
            try:
                there = self.blobs.path(key) is not None
            except CorruptCacheError:
                there = True
            if there and self.sound(key, len(data)):
                return
            if there:
                self.quarantine(key)
        # An object store is not asked: a copy in the tier does not prove that the object exists, which another
        # machine may have removed since.
        self.blobs.put(key, data)

    def quarantine(self, key: str) -> None:
        """Move a damaged blob to the quarantine folder, for inspection."""
        with self._lock:
            self._hashed.pop(key, None)
        try:
            path = self.blobs.path(key)
        except CorruptCacheError:
            path = None  # the entry points outside the folder: drop the entry, and leave that file alone
        if path is not None:
            with mapped(self.quarantine_folder):
                os.replace(path, self.quarantine_folder / f"{key}.safetensors")
        self.blobs.delete(key)
