"""Keeps the rows of all collections and the blobs of a store consistent.

1. A blob is stored before its row is written. The transaction that writes the row checks that the blob is still there.
2. A blob is removed after its rows, in a writing transaction that has found no row that names it.

Writing transactions exclude each other, so a row never outlives its blob, and no lock is held while a blob is uploaded.
A blob without a row that an interrupted writer has left is an orphan, which `gc` removes after a grace period.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from sqlalchemy import delete, select, union
from sqlalchemy.orm import Session

from kv_memory.errors import CorruptCacheError, FingerprintMismatchError, StoreError, StoreLockedError
from kv_memory.store.blobs.local import blob_key
from kv_memory.store.blobs.verified import MisfiledError, VerifiedBlobs, check_header
from kv_memory.store.documents import batches
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, PrefixRow

__all__ = ["BlobReferences", "named_blobs"]

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


class BlobReferences:
    """The blobs of a store and the rows that name them. Thread-safe.

    Attributes:
        catalog: Catalog with the rows.
        verified_blobs: Blobs, opened only after a check.
    """

    def __init__(self, catalog: Catalog, verified_blobs: VerifiedBlobs) -> None:
        self.catalog = catalog
        self.verified_blobs = verified_blobs

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
                self.verified_blobs.put(blobs)
                with self.catalog.write() as session:
                    if all(self.verified_blobs.blobs.has(key) for key in blobs):
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
            return sum(self.verified_blobs.blobs.delete(key) for key in unnamed)

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
            self.verified_blobs.verified_path(key, size_bytes, again=again)
        except CorruptCacheError:
            return self.quarantine_with_rows(key, size_bytes)
        return False

    def quarantine_with_rows(self, key: str, size_bytes: int) -> bool:
        """Quarantine a damaged blob and delete its rows; False if no row names it or another process replaced it."""
        with self.catalog.write() as session:
            if key not in named_blobs(session, [key]) or self.verified_blobs.sound(key, size_bytes):
                return False
            for table in (CacheRow, PrefixRow):
                session.execute(delete(table).where(table.blob_key == key))
        self._quarantine_unnamed(key)
        return True

    def drop_if_misfiled(self, row: CacheRow) -> bool:
        """Compare a row with the header of its sound blob; delete a row that names another's blob and return True."""
        try:
            check_header(row, self.verified_blobs.verified_path(row.blob_key, row.size_bytes))
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
                self.verified_blobs.quarantine(key)
