"""Keeps the rows of all collections and the blobs of a store consistent: a removal of one removes the other."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from sqlalchemy import delete, select

from kv_memory.errors import CorruptCacheError, FingerprintMismatchError, StoreError
from kv_memory.store.blobs.verified import VerifiedBlobs
from kv_memory.store.documents import batches
from kv_memory.store.identity import MisfiledError, check_header
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, PrefixRow

__all__ = ["BlobReferences"]


class BlobReferences:
    """The blobs of a store and the rows that name them. Thread-safe.

    Attributes:
        catalog: Catalog with the rows.
        verified_blobs: Blobs, read only after a check.
    """

    def __init__(self, catalog: Catalog, verified_blobs: VerifiedBlobs) -> None:
        self.catalog = catalog
        self.verified_blobs = verified_blobs

    def quarantine_if_damaged(self, key: str, size_bytes: int) -> bool:
        """Hash a blob now; if it is damaged, quarantine it, delete its rows in all collections and return True."""
        try:
            self.verified_blobs.verified_path(key, size_bytes, again=True)
        except CorruptCacheError:
            return self.quarantine_with_rows(key, size_bytes)
        return False

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
        with self.catalog.hold(f"blob {row.blob_key}"):
            with self.catalog.write() as session:
                this = delete(CacheRow).where(CacheRow.id == row.id, CacheRow.blob_key == row.blob_key)
                gone = session.scalars(this.returning(CacheRow.id)).all()
            if gone and not self.named([row.blob_key]):
                self.verified_blobs.quarantine(row.blob_key)
        return bool(gone)

    def quarantine_with_rows(self, key: str, size_bytes: int, *, recheck: bool = True) -> bool:
        """Quarantine a blob and delete its rows; False if no row names it, or `recheck` finds it sound."""
        with self.catalog.hold(f"blob {key}"):
            if not self.named([key]) or (recheck and self.verified_blobs.sound(key, size_bytes)):
                return False
            with self.catalog.write() as session:
                for table in (CacheRow, PrefixRow):
                    session.execute(delete(table).where(table.blob_key == key))
            self.verified_blobs.quarantine(key)
        return True

    def delete_unreferenced(self, keys: Iterable[str]) -> int:
        """Remove those of the blobs that no row of any collection names; what cannot be removed now is left to `gc`.

        Returns:
            Number of bytes freed.
        """
        freed_bytes = 0
        for batch in batches(set(keys)):
            with suppress(StoreError):
                for key in set(batch) - self.named(batch):
                    # A writer about to refer to the blob holds this lock; once it is ours, check again.
                    with self.catalog.hold(f"blob {key}", wait=False) as ours:
                        if ours and not self.named([key]):
                            freed_bytes += self.verified_blobs.blobs.delete(key)
        return freed_bytes

    def named(self, keys: list[str]) -> set[str]:
        """The subset of the blobs that a row of any collection names."""
        named: set[str] = set()
        with self.catalog.read() as session:
            for table in (CacheRow, PrefixRow):
                named.update(session.scalars(select(table.blob_key).where(table.blob_key.in_(keys))))
        return named
