"""Imports the caches and prefixes of an archive into a collection: each blob first, then its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from kv_memory.errors import CorruptCacheError, TransferError
from kv_memory.store.caches import Caches
from kv_memory.store.eviction import Limits, read_limits
from kv_memory.store.sql.schema import CacheRow, FingerprintRow, PrefixRow, utc_now
from kv_memory.store.transfer.archive_reader import ArchiveReader
from kv_memory.store.transfer.manifest import Group

__all__ = ["Received", "Receiver"]

_Row = CacheRow | PrefixRow


@dataclass(kw_only=True)
class Received:
    """Counts of the caches handled so far; see `ImportReport`."""

    n_caches: int = 0
    n_present: int = 0
    n_left_out: int = 0
    n_evicted: int = 0
    size_bytes: int = 0


class Receiver:
    """Stores the caches of an archive, group by group.

    Args:
        cache_table: Caches of the collection.
        collection_id: Catalog row of the collection that gets them.
    """

    def __init__(self, cache_table: Caches, collection_id: int) -> None:
        self.received = Received()
        self._cache_table = cache_table
        self._references = cache_table.references
        self._catalog = cache_table.references.catalog
        self._collection_id = collection_id

    def take(self, archive: ArchiveReader, group: Group, texts: set[str]) -> Iterator[None]:
        """Store the caches of these texts; yields after every blob that was read.

        Raises:
            TransferError: The archive is damaged.
        """
        due = self._wanted(group, texts)
        for key, data in archive.blobs():
            if rows := due.pop(key, []):
                self._file(group, rows, data)
            yield
        # The remaining rows name blobs of earlier groups, under another text.
        for key, rows in due.items():
            try:
                data = self._references.verified_blobs.verified_path(key, rows[0].size_bytes).read_bytes()
            except (CorruptCacheError, FileNotFoundError) as error:
                raise TransferError(
                    "the blob of a cache is neither in the archive nor in the store",
                    where=f"blob {key}",
                    next_step="Import again: the blob may have been removed meanwhile. If that fails, export again.",
                ) from error
            self._file(group, rows, data)

    def _wanted(self, group: Group, texts: set[str]) -> dict[str, list[_Row]]:
        """The rows to store, by blob key."""
        due: dict[str, list[_Row]] = {}
        now = utc_now()
        for cache in group.caches:
            if cache.text_sha256 not in texts or (cache.expires_at is not None and cache.expires_at <= now):
                self.received.n_left_out += 1
            elif self._has_cache(cache):
                self.received.n_present += 1
            else:
                due.setdefault(cache.blob_key, []).append(cache)
        for prefix in group.prefixes:
            if not self._has_prefix(prefix):
                due.setdefault(prefix.blob_key, []).append(prefix)
        return due

    def _has_cache(self, cache: CacheRow) -> bool:
        """Whether the collection has such a cache, sound and not expired; a damaged one is quarantined."""
        with self._catalog.read() as session:
            row = session.scalar(select(CacheRow).where(self._same_cache(cache)))
        if row is None or (row.expires_at is not None and row.expires_at <= utc_now()):
            return False
        if self._references.verified_blobs.sound(row.blob_key, row.size_bytes):
            return True
        self._references.quarantine_if_damaged(row.blob_key, row.size_bytes)
        return False

    def _has_prefix(self, prefix: PrefixRow) -> bool:
        with self._catalog.read() as session:
            row = session.scalar(select(PrefixRow).where(self._same_prefix(prefix)))
        return row is not None and self._references.verified_blobs.sound(row.blob_key, row.size_bytes)

    def _same_cache(self, cache: CacheRow) -> ColumnElement[bool]:
        return (
            (CacheRow.collection_id == self._collection_id)
            & (CacheRow.text_sha256 == cache.text_sha256)
            & (CacheRow.fingerprint == cache.fingerprint)
            & (CacheRow.keep_ratio == cache.keep_ratio)
        )

    def _same_prefix(self, prefix: PrefixRow) -> ColumnElement[bool]:
        return (PrefixRow.collection_id == self._collection_id) & (PrefixRow.key == prefix.key)

    def _file(self, group: Group, rows: list[_Row], data: bytes) -> None:
        """Store a blob, then its rows; dates, pins and fidelity stay unchanged."""
        key = rows[0].blob_key
        left = [key]  # blobs that may have no row afterwards
        try:
            # As in `Caches.put`: the lock keeps the blob from being swept away before a row names it.
            with self._catalog.hold(f"blob {key}"):
                self._references.verified_blobs.put(key, data)
                with self._catalog.write() as session:
                    gone = [other for row in rows for other in self._insert(session, group, row)]
                    bounded = read_limits(session, self._collection_id) != Limits()
                left = [other for other in gone if other != key]
        finally:
            self._references.delete_unreferenced(left)
        self.received.size_bytes += len(data)
        self.received.n_caches += sum(isinstance(row, CacheRow) for row in rows)
        if bounded:
            self.received.n_evicted += self._cache_table.make_room()

    def _insert(self, session: Session, group: Group, row: _Row) -> list[str]:
        """Insert a row, replacing an expired or damaged one; returns the blob keys of the deleted rows."""
        row.collection_id = self._collection_id
        if isinstance(row, PrefixRow):
            old = delete(PrefixRow).where(self._same_prefix(row)).returning(PrefixRow.blob_key)
        else:
            old = delete(CacheRow).where(self._same_cache(row)).returning(CacheRow.blob_key)
            if session.get(FingerprintRow, row.fingerprint) is None:
                session.add(FingerprintRow(digest=row.fingerprint, json=group.fingerprints[row.fingerprint]))
                session.flush()
        gone = list(session.scalars(old))
        session.add(row)
        session.flush()
        return gone
