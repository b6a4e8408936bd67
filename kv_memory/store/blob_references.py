"""Keeps the rows of all collections and the blobs of a store consistent, and opens blobs only after a check.

1. A blob is stored before its row is written. The transaction that writes the row checks that the blob is still there.
2. A blob is removed after its rows, in a writing transaction that has found no row that names it.

Writing transactions exclude each other, so a row never outlives its blob, and no lock is held while a blob is uploaded.
A blob without a row that an interrupted writer has left is an orphan, which `gc` removes after a grace period.

The bytes of a blob are hashed before it is read, and its header is compared with its row; a damaged one is quarantined.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import delete, select, union
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError, FingerprintMismatchError, StoreError, StoreLockedError
from kv_memory.store.blobs.local import DiskBlobs, blob_key
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.error_mapping import mapped, raise_mapped, store_error
from kv_memory.store.sql.catalog import Catalog, batches
from kv_memory.store.sql.schema import CacheRow, PrefixRow

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

_AT_REST_NS = 50_000_000
_TRIES = 10  # to store a blob that another process keeps removing
_REMOVED_AT_ONCE = 50  # blobs in one transaction, for which other writers wait


def named_blobs(session: Session, keys: Iterable[str] | None = None) -> dict[str, int]:
    """The blobs that a row of any collection names, with their sizes in bytes; all of them, or those of the keys."""
    named: dict[str, int] = {}
    for batch in [None] if keys is None else batches(keys):
        of = [select(table.blob_key, table.size_bytes) for table in (CacheRow, PrefixRow)]
        if batch is not None:
            of = [statement.where(statement.selected_columns.blob_key.in_(batch)) for statement in of]
        named.update((key, size_bytes) for key, size_bytes in session.execute(union(*of)))
    return named


class MisfiledError(CorruptCacheError):
    """A row names the sound blob of something else; never leaves the store, as callers get `CorruptCacheError`."""


class BlobReferences:
    """The blobs of a store and the rows that name them. Thread-safe.

    Args:
        catalog: Catalog with the rows.
        blobs: Storage of the bytes.
        quarantine: Folder for damaged blobs, which must exist.
    """

    def __init__(self, catalog: Catalog, blobs: DiskBlobs | ObjectBlobs, quarantine: Path) -> None:
        self.catalog = catalog
        self.blobs = blobs
        self.quarantine_folder = quarantine
        self._hashed: dict[str, tuple[int, int, int]] = {}  # dictionaries are safe among threads

    def put(self, data: bytes, add_row: Callable[[Session, str], Collection[str]]) -> None:
        """Store a blob, then its row; `put_all` of one blob, whose name `add_row` is given too."""
        key = blob_key(data)
        self.put_all({key: data}, lambda session: add_row(session, key))

    def put_all(self, blobs: Mapping[str, bytes | Path], add_rows: Callable[[Session], Collection[str]]) -> None:
        """Store blobs, then their rows in one transaction.

        Args:
            blobs: Blobs by name, see `DiskBlobs.put`.
            add_rows: Function that writes the rows in the session; returns the names of blobs that may have no row
                afterwards. What it raises rolls the transaction back.

        Raises:
            StoreError: A blob was removed each time it was stored.
        """
        left: Collection[str] = [*blobs]
        try:
            for _ in range(_TRIES):
                self.put_blobs(blobs)
                with self.catalog.write() as session:
                    if all(self.blobs.has(key) for key in blobs):
                        left = add_rows(session)
                        break
            else:
                raise StoreError("a blob was removed each time it was stored", where=f"blob {', '.join(blobs)}")
        except StoreLockedError:
            left = []  # removing the blobs would wait for the same lock; `gc` does it
            raise
        except BaseException:
            left = [*left, *blobs]
            raise
        finally:
            if left:
                self.delete_unreferenced(left)

    def delete_unreferenced(self, keys: Iterable[str]) -> int:
        """Remove those of the blobs that no row names; what cannot be removed now is left to `gc`.

        Returns:
            Number of bytes freed.
        """
        freed_bytes = 0
        with suppress(StoreError):
            for batch in batches(set(keys), _REMOVED_AT_ONCE):
                freed_bytes += self.remove_unnamed(batch)
        return freed_bytes

    def remove_unnamed(self, keys: list[str]) -> int:
        """Remove those of the blobs that no row names, in one transaction; returns the number of bytes freed."""
        with self.catalog.write() as session:
            unnamed = set(keys) - named_blobs(session, keys).keys()
            return sum(self.blobs.delete(key) for key in unnamed)

    def is_sound(self, row: CacheRow) -> bool:
        """Whether a cache's blob is sound and the one that its row describes; if not, the row is deleted."""
        return not self.quarantine_if_damaged(row.blob_key, row.size_bytes, again=False) and not self.drop_if_misfiled(
            row
        )

    def quarantine_if_damaged(self, key: str, size_bytes: int, *, again: bool = True) -> bool:
        """Hash a blob; if it is damaged, quarantine it, delete its rows in all collections and return True.

        Args:
            key: Name of the blob.
            size_bytes: Size of the blob in bytes according to the catalog.
            again: Whether to hash it even if it was hashed before.
        """
        try:
            self.verified_path(key, size_bytes, again=again)
        except CorruptCacheError:
            return self.quarantine_with_rows(key, size_bytes)
        return False

    def quarantine_with_rows(self, key: str, size_bytes: int) -> bool:
        """Quarantine a damaged blob and delete its rows; False if no row names it or another process replaced it."""
        with self.catalog.write() as session:
            if key not in named_blobs(session, [key]) or self.sound(key, size_bytes):
                return False
            for table in (CacheRow, PrefixRow):
                session.execute(delete(table).where(table.blob_key == key))
        self._quarantine_unnamed(key)
        return True

    def drop_if_misfiled(self, row: CacheRow) -> bool:
        """Compare a row with the header of its sound blob; delete a row that names another's blob and return True."""
        try:
            check_header(row, self.verified_path(row.blob_key, row.size_bytes))
        except MisfiledError:
            return self.drop_misfiled(row)
        except (FingerprintMismatchError, CorruptCacheError):
            pass  # of another format version; or removed or damaged since the last check
        return False

    def drop_misfiled(self, row: CacheRow) -> bool:
        """Delete a row that names the blob of something else; False if the row is gone or changed.

        The blob stays if another row names it, because it is sound; otherwise it is quarantined.
        """
        with self.catalog.write() as session:
            this = delete(CacheRow).where(CacheRow.id == row.id, CacheRow.blob_key == row.blob_key)
            gone = session.scalars(this.returning(CacheRow.id)).all()
        if gone:
            self._quarantine_unnamed(row.blob_key)
        return bool(gone)

    def _quarantine_unnamed(self, key: str) -> None:
        with self.catalog.write() as session:
            if not named_blobs(session, [key]):
                self.quarantine(key)

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

    def put_blobs(self, blobs: Mapping[str, bytes | Path]) -> None:
        """Store blobs as `DiskBlobs.put` does, without rows; an existing one is used if it is sound, else replaced."""
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
