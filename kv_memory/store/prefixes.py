"""The shared prefixes of one collection: the beginning of every prompt, prefilled once."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from kv_memory.errors import CorruptCacheError, StoreError
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.blobs.local import blob_key
from kv_memory.store.sql.schema import PrefixRow

__all__ = ["Prefixes"]


class Prefixes:
    """Prefixes of one collection. Thread-safe.

    Args:
        references: Blobs of the store and the rows that name them.
        collection_id: Catalog row of the collection.
    """

    def __init__(self, references: BlobReferences, collection_id: int) -> None:
        self._references = references
        self._collection_id = collection_id

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put_prefix`."""
        blob = blob_key(data)
        left = [blob]
        try:
            with self._references.catalog.hold(f"blob {blob}"):
                self._references.verified_blobs.put(blob, data)
                with self._references.catalog.write() as session:
                    row = self._find(session, key)
                    left = [] if row is None or row.blob_key == blob else [row.blob_key]
                    if row is None:
                        row = PrefixRow(collection_id=self._collection_id, key=key)
                        session.add(row)
                    row.blob_key, row.size_bytes = blob, len(data)
        except BaseException:
            left = [*left, blob]
            raise
        finally:
            self._references.delete_unreferenced(left)

    def get(self, key: str) -> Path | None:
        """See `Store.get_prefix`."""
        for _ in range(3):
            with self._references.catalog.read() as session:
                row = self._find(session, key)
            if row is None:
                return None
            try:
                return self._references.verified_blobs.verified_path(row.blob_key, row.size_bytes)
            except CorruptCacheError as error:
                if self._references.quarantine_with_rows(row.blob_key, row.size_bytes):
                    raise CorruptCacheError(
                        error.what,
                        where=f"prefix {key!r}, blob {row.blob_key}",
                        next_step="Ask again: the damaged prefix was removed and will be computed again.",
                    ) from error
        raise StoreError("the prefix changed each time it was read", where=f"prefix {key!r}", next_step="Try again.")

    def _find(self, session: Session, key: str) -> PrefixRow | None:
        return session.scalar(
            select(PrefixRow).where(PrefixRow.collection_id == self._collection_id, PrefixRow.key == key)
        )
