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
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open
from sqlalchemy import delete, select, true
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError, FingerprintMismatchError, StoreError, StoreLockedError
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.error_mapping import mapped, raise_mapped, store_error
from kv_memory.store.records import CacheInfo
from kv_memory.store.sql.catalog import Catalog, batches
from kv_memory.store.sql.schema import CacheRow, PrefixRow

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

_AT_REST_NS = 50_000_000
_TRIES = 10  # to store a blob that another process keeps removing
_REMOVED_AT_ONCE = 50  # blobs in one transaction, for which other writers wait


def named_blobs(session: Session, keys: Iterable[str] | None = None) -> set[str]:
    """The blobs that a row of any collection names; all of them, or those of the keys."""
    named: set[str] = set()
    for table in (CacheRow, PrefixRow):
        conditions = [true()] if keys is None else [table.blob_key.in_(batch) for batch in batches(keys)]
        for condition in conditions:
            named.update(session.scalars(select(table.blob_key).where(condition)))
    return named


def delete_rows(session: Session, key: str) -> list[int]:
    """Delete the rows of all collections that name a blob, and return their ids."""
    of = [delete(table).where(table.blob_key == key).returning(table.id) for table in (CacheRow, PrefixRow)]
    return [row_id for statement in of for row_id in session.scalars(statement)]


class MisfiledError(CorruptCacheError):
    """A row names the sound blob of something else; never leaves the store, as callers get `CorruptCacheError`."""


class BlobReferences:
    """The blobs of a store and the rows that name them; `quarantine` is an existing folder. Thread-safe."""

    def __init__(self, catalog: Catalog, blobs: DiskBlobs | ObjectBlobs, quarantine: Path) -> None:
        self.catalog = catalog
        self.blobs = blobs
        self.quarantine_folder = quarantine
        self._hashed: dict[str, tuple[int, int, int]] = {}  # dictionaries are safe among threads
        self._loaded: WeakValueDictionary[str, DistilledCache] = WeakValueDictionary()

    def put_all(self, blobs: Mapping[str, bytes | Path], add_rows: Callable[[Session], Collection[str]]) -> None:
        """Store blobs, then their rows in one transaction.

        `add_rows` writes the rows, and returns the names of blobs that may have no row afterwards. What it raises rolls
        the transaction back.

        Raises:
            StoreError: A blob was removed each time it was stored.
        """
        left: Collection[str] = ()
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
            raise  # removing the blobs would wait for the same lock; `gc` does it
        except BaseException:
            self.delete_unreferenced([*left, *blobs])
            raise
        if left:
            self.delete_unreferenced(left)

    def delete_unreferenced(self, keys: Iterable[str]) -> int:
        """Do what `remove_unnamed` does; what cannot be removed now is left to `gc`, and no error is raised."""
        with suppress(StoreError):
            return self.remove_unnamed(keys)
        return 0

    def remove_unnamed(self, keys: Iterable[str]) -> int:
        """Remove those of the blobs that no row names; returns the number of bytes freed."""
        freed_bytes = 0
        for batch in batches(set(keys), _REMOVED_AT_ONCE):
            with self.catalog.write() as session:
                freed_bytes += sum(self.blobs.delete(key) for key in set(batch) - named_blobs(session, batch))
        return freed_bytes

    def verify(self, row: CacheRow | PrefixRow | CacheInfo, *, again: bool = False) -> CorruptCacheError | None:
        """Check the blob of a row and, for a `CacheRow`, compare the two; refuse what is wrong and return the reason.

        None if the blob is sound, or was removed or replaced meanwhile. `again` is as in `verified_path`.
        """
        try:
            path = self.verified_path(row.blob_key, row.size_bytes, again=again)
            if isinstance(row, CacheRow):
                check_header(row, path)
        except FingerprintMismatchError:  # a sound blob of another format version
            return None
        except CorruptCacheError as error:
            return error if self.refuse(row, error) else None
        return None

    def refuse(self, row: Any, error: CorruptCacheError) -> bool:
        """Delete the row of a misfiled blob, or all rows of a damaged one, and quarantine a blob that has no row left.

        False if the rows are gone or changed, or another process has replaced the blob.
        """
        key: str = row.blob_key
        with self.catalog.write() as session:
            if isinstance(error, MisfiledError):  # the blob is sound, and may be that of other rows
                this = delete(CacheRow).where(CacheRow.id == row.id, CacheRow.blob_key == key)
                gone = session.scalars(this.returning(CacheRow.id)).all()
            else:
                gone = [] if self.sound(key, row.size_bytes) else delete_rows(session, key)
        if gone:
            with self.catalog.write() as session:
                if not named_blobs(session, [key]):
                    self.quarantine(key)
        return bool(gone)

    def verified_path(self, key: str, size_bytes: int | None, *, again: bool = False) -> Path:
        """The file of a blob, after a check of its length and SHA-256.

        A file is hashed once per process, and once more if it was replaced or written to since, or if `again` is set.
        `size_bytes` is its length according to the catalog; None if that is unknown.

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
                    if size_bytes not in (None, status.st_size):
                        raise CorruptCacheError(
                            f"the blob has {status.st_size} bytes, expected {size_bytes}", where=f"blob {key}"
                        )
                    identity = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
                    if again or fresh or self._hashed.get(key) != identity:
                        self._loaded.pop(key, None)  # it may be mapped from a file that was written to
                        if hashlib.file_digest(file, "sha256").hexdigest() != key:
                            self._hashed.pop(key, None)
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

    def load(self, row: CacheRow) -> DistilledCache:
        """The cache of a row, after a check of its blob: the same object as before as long as that is alive.

        Raises:
            FileNotFoundError: The file was removed since it was verified.
            CorruptCacheError: The blob is damaged, or that of something else.
            FingerprintMismatchError: The blob has another format version.
        """
        path = self.verified_path(row.blob_key, row.size_bytes)
        cache = self._loaded.get(row.blob_key)
        if cache is None:
            cache = load_cache(path, row.blob_key)
        check_identity(row, cache.text_sha256, cache.fingerprint.digest, cache.keep_ratio)
        # Of two threads that load a blob, both get the first one's object.
        return self._loaded.setdefault(row.blob_key, cache)

    def sound(self, key: str, size_bytes: int | None = None) -> bool:
        """Whether `verified_path` would return."""
        with suppress(CorruptCacheError):
            self.verified_path(key, size_bytes)
            return True
        return False

    def put_blobs(self, blobs: Mapping[str, bytes | Path]) -> None:
        """Store blobs as `DiskBlobs.put` does, without rows; an existing one is used if it is sound, else replaced."""
        new = dict(blobs)
        # An object store is not asked: a copy in the tier does not prove that the object exists, which another
        # machine may have removed since.
        for key in blobs if isinstance(self.blobs, DiskBlobs) else ():
            if self.blobs.has(key):
                if self.sound(key):
                    del new[key]
                else:
                    self.quarantine(key)
        self.blobs.put(new)

    def quarantine(self, key: str) -> None:
        """Move a damaged blob to the quarantine folder, for inspection; a missing one is no error."""
        self._hashed.pop(key, None)
        with suppress(
            CorruptCacheError
        ):  # an entry that points outside the folder is dropped, and that file left alone
            if (file := self.blobs.open(key)) is not None:
                file.close()
                with mapped(self.quarantine_folder), suppress(FileNotFoundError):  # another process may be faster
                    os.replace(file.name, self.quarantine_folder / f"{key}.safetensors")
        self.blobs.delete(key)


def load_cache(path: Path, key: str) -> DistilledCache:
    """Load a cache from its sound blob.

    Raises:
        FileNotFoundError: The file was removed since it was verified.
        MisfiledError: The blob is not a distilled cache.
        FingerprintMismatchError: The blob has another format version.
    """
    from kv_memory.cache.distilled import DistilledCache

    try:
        return DistilledCache.load(path)
    except CorruptCacheError as error:
        # The bytes have just been verified, so a failed system call is not evidence of damage.
        if isinstance(error.__cause__, OSError) and (ours := store_error(error.__cause__, str(path))) is not None:
            raise ours from error
        raise MisfiledError(error.what, where=f"blob {key}") from error


def check_header(row: CacheRow, path: Path) -> None:
    """Do what `BlobReferences.load` does with the header of the file, and without torch, which takes seconds to import.

    Errors are the same, but for `CorruptCacheError` if the file was removed since it was verified.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["kv_memory"])
        fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
        said: tuple[str | None, str, float] = header.get("text_sha256"), fingerprint.digest, header["keep_ratio"]
    except FileNotFoundError:
        raise CorruptCacheError("the blob is missing", where=str(path)) from None
    except OSError as error:
        raise_mapped(error, str(path))
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, CorruptCacheError) as error:
        what = "the catalog row points to a blob that is not a distilled cache"
        raise MisfiledError(what, where=f"blob {row.blob_key}") from error
    check_identity(row, *said)


def check_identity(row: CacheRow, text_sha256: str | None, fingerprint: str, keep_ratio: float) -> None:
    """Compare what a blob records with its row.

    Raises:
        MisfiledError: They differ.
    """
    said, wanted = (text_sha256, fingerprint, keep_ratio), (row.text_sha256, row.fingerprint, row.keep_ratio)
    if said != wanted:
        differs = [ours != theirs for ours, theirs in zip(said, wanted, strict=True)]
        name = ("text", "fingerprint", "keep_ratio")[differs.index(True)]
        raise MisfiledError(f"the catalog row points to a blob of another {name}", where=f"blob {row.blob_key}")
