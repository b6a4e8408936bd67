"""Opens blobs after checking their bytes and whose they are, and quarantines damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.error_mapping import mapped, raise_mapped, store_error
from kv_memory.store.sql.schema import CacheRow

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

__all__ = ["MisfiledError", "VerifiedBlobs", "check_header", "load_cache"]

_AT_REST_NS = 50_000_000


class VerifiedBlobs:
    """A blob store that returns a path only after the bytes were hashed in this process. Thread-safe.

    Args:
        blobs: Storage of the bytes.
        quarantine: Folder for damaged blobs, which must exist.
    """

    def __init__(self, blobs: DiskBlobs | ObjectBlobs, quarantine: Path) -> None:
        self.blobs = blobs
        self.quarantine_folder = quarantine
        self._hashed: dict[str, tuple[int, int, int]] = {}  # dictionaries are safe among threads

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
        for fresh in (False, True):  # perhaps only the copy in the tier in front of an object store is damaged
            try:
                file = self.blobs.open(key, fresh=fresh)
                if file is None:
                    raise CorruptCacheError("the blob is missing", where=f"blob {key}")
                with file:
                    status = os.fstat(file.fileno())
                    if status.st_size != size_bytes:
                        raise CorruptCacheError(
                            f"the blob has {status.st_size} bytes, expected {size_bytes}", where=f"blob {key}"
                        )
                    identity = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
                    if again or fresh or self._hashed.get(key) != identity:
                        if hashlib.file_digest(file, "sha256").hexdigest() != key:
                            raise CorruptCacheError("the blob's bytes do not match its SHA-256", where=f"blob {key}")
                        # File times advance in steps of some milliseconds: a file written to in the step in which it
                        # was hashed looks unchanged. So a file is remembered only once it has been at rest.
                        if time.time_ns() - max(identity[1:]) > _AT_REST_NS:
                            self._hashed[key] = identity
                    return Path(file.name)
            except CorruptCacheError:
                if fresh:
                    raise
            except OSError as error:
                raise_mapped(error, f"blob {key}")
        raise AssertionError("unreachable")

    def sound(self, key: str, size_bytes: int) -> bool:
        """Whether `verified_path` would return."""
        try:
            self.verified_path(key, size_bytes)
        except CorruptCacheError:
            return False
        return True

    def put(self, blobs: Mapping[str, bytes | Path]) -> None:
        """Store blobs as `DiskBlobs.put` does; an existing one is used if it is sound and replaced if it is not."""
        if isinstance(self.blobs, DiskBlobs):
            blobs = {key: data for key, data in blobs.items() if not self._has_sound(key)}
        # An object store is not asked: a copy in the tier does not prove that the object exists, which another
        # machine may have removed since.
        self.blobs.put(blobs)

    def _has_sound(self, key: str) -> bool:
        """Whether the blob exists and is sound; a damaged one is quarantined."""
        try:
            file = self.blobs.open(key)
        except CorruptCacheError:  # the row was tampered with
            self.quarantine(key)
            return False
        if file is None:
            return False
        with file:
            size_bytes = os.fstat(file.fileno()).st_size
        if self.sound(key, size_bytes):
            return True
        self.quarantine(key)
        return False

    def quarantine(self, key: str) -> None:
        """Move a damaged blob to the quarantine folder, for inspection; a missing one is no error."""
        self._hashed.pop(key, None)
        try:
            file = self.blobs.open(key)
        except CorruptCacheError:
            file = None  # the entry points outside the folder: drop the entry, and leave that file alone
        if file is not None:
            file.close()
            with mapped(self.quarantine_folder), suppress(FileNotFoundError):  # another process may be faster
                os.replace(file.name, self.quarantine_folder / f"{key}.safetensors")
        self.blobs.delete(key)


class MisfiledError(CorruptCacheError):
    """A row names the sound blob of something else; never leaves the store, as callers get `CorruptCacheError`."""


def load_cache(row: CacheRow, path: Path) -> DistilledCache:
    """Load a cache from its sound blob, and compare the identity that it records with its row.

    Raises:
        FileNotFoundError: The file was removed since it was verified.
        MisfiledError: Blob and row differ, or the blob is not a distilled cache.
        FingerprintMismatchError: The blob has another format version.
    """
    from kv_memory.cache.distilled import DistilledCache

    try:
        cache = DistilledCache.load(path)
    except CorruptCacheError as error:
        # The bytes have just been verified, so a failed system call is not evidence of damage.
        if isinstance(error.__cause__, OSError) and (ours := store_error(error.__cause__, str(path))) is not None:
            raise ours from error
        raise MisfiledError(error.what, where=f"blob {row.blob_key}") from error
    said = cache.text_sha256, cache.fingerprint.digest, cache.keep_ratio
    if said != (row.text_sha256, row.fingerprint, row.keep_ratio):
        raise _misfiled(row, said)
    return cache


def check_header(row: CacheRow, path: Path) -> None:
    """Do what `load_cache` does with the header of the file alone, and without torch, which takes seconds to import.

    Raises:
        CorruptCacheError: The file was removed since it was verified.
        MisfiledError: Blob and row differ, or the blob is not a distilled cache.
        FingerprintMismatchError: The blob has another format version.
    """
    try:
        header = json.loads(json.loads(_header_bytes(path))["__metadata__"]["kv_memory"])
        fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
        said = header.get("text_sha256"), fingerprint.digest, header["keep_ratio"]
    except FileNotFoundError:
        raise CorruptCacheError("the blob is missing", where=str(path)) from None
    except OSError as error:
        raise_mapped(error, str(path))
    except (ValueError, TypeError, KeyError, AttributeError, CorruptCacheError) as error:
        what = "the catalog row points to a blob that is not a distilled cache"
        raise MisfiledError(what, where=f"blob {row.blob_key}") from error
    if said != (row.text_sha256, row.fingerprint, row.keep_ratio):
        raise _misfiled(row, said)


def _misfiled(row: CacheRow, said: tuple[str | None, str, float]) -> MisfiledError:
    wanted = row.text_sha256, row.fingerprint, row.keep_ratio
    differs = [ours != theirs for ours, theirs in zip(said, wanted, strict=True)]
    name = ("text", "fingerprint", "keep_ratio")[differs.index(True)]
    return MisfiledError(f"the catalog row points to a blob of another {name}", where=f"blob {row.blob_key}")


_MOST_BYTES = 100 * 2**20  # of a header, as in safetensors itself; a longer one is read in part, and fails as JSON


def _header_bytes(path: Path) -> bytes:
    # Contract: the safetensors format, eight bytes of length and then JSON.
    with open(path, "rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), _MOST_BYTES))
