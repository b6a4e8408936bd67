"""Size and age limits of caches, times of last use, and the order of eviction."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import ColumnElement, bindparam, delete, func, select, true, update
from sqlalchemy.orm import Session

from kv_memory.errors import ConfigError, StoreError, StoreFullError
from kv_memory.store import documents
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.documents import Documents, alive
from kv_memory.store.metrics import EVICTIONS
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, CollectionRow, OptionRow, PassageRow, utc_now

_LOG = logging.getLogger(__name__)

_BUDGET = "budget"
# Built once: every put runs it, and building it takes longer than running it.
SELECT_LIMITS = select(
    CollectionRow.max_size_bytes,
    CollectionRow.ttl_s,
    select(OptionRow.value).where(OptionRow.key == _BUDGET).scalar_subquery(),
).where(CollectionRow.id == bindparam("collection"))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a collection and its store.

    Attributes:
        max_size_bytes: Size limit in bytes of the collection's caches together; None for no limit.
        store_max_size_bytes: Size limit in bytes of the caches of all collections together; one that two collections
            share counts twice. None for no limit.
        ttl_s: Lifetime of a cache after it was put, in seconds; None for no limit.
    """

    max_size_bytes: int | None = None
    store_max_size_bytes: int | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0 or None, got {value}", where=name)


def read_limits(session: Session, collection_id: int) -> Limits:
    """The limits of a collection."""
    max_size_bytes, ttl_s, shared = session.execute(SELECT_LIMITS, {"collection": collection_id}).one()
    of_store = (shared or {}).get("max_size_bytes")
    return Limits(max_size_bytes=max_size_bytes, ttl_s=ttl_s, store_max_size_bytes=of_store)


_EVICTED_AT_ONCE = 500  # variables in a statement of SQLite
_FLUSH_EVERY = 256  # caches with a time of last use that a crash may lose; a write per get would cost an fsync each


class LastUses:
    """Times of last use of caches, written to the catalog with a delay. Thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._used: dict[int, datetime] = {}

    def note(self, row_id: int) -> None:
        """Record that the cache of a row was used now."""
        with self._lock:
            self._used[row_id] = datetime.now(UTC)
            full = len(self._used) >= _FLUSH_EVERY
        if full:
            self.flush()

    def flush(self) -> None:
        """Write the times in the buffer; if that fails they are dropped, and no error is raised."""
        if self._used:
            with suppress(StoreError), self._catalog.write() as session:
                self.write(session)

    def write(self, session: Session) -> None:
        """Write the times in the buffer in a writing transaction."""
        with self._lock:
            used, self._used = self._used, {}
        for row_id, last_used_at in used.items():
            session.execute(update(CacheRow).where(CacheRow.id == row_id).values(last_used_at=last_used_at))


class Eviction(Documents):
    """Limits of one collection, and eviction of its caches."""

    def __init__(self, path: Path, collection: str, collection_id: int, references: BlobReferences) -> None:
        super().__init__(path, collection, collection_id, references)
        self.uses = LastUses(references.catalog)

    def limits(self) -> Limits:
        """Size and age limits of the collection and the store."""
        with self.catalog.read() as session:
            return read_limits(session, self.collection_id)

    def set_limits(self, limits: Limits) -> int:
        """Limit the collection and the store, and evict at once what exceeds the limits, least recently used first.

        A cache's expiry is fixed when it is put: a new `ttl_s` does not change existing caches.

        Returns:
            Number of evicted caches.

        Raises:
            StoreFullError: Pinned caches exceed a limit. The limits are set nevertheless.
        """
        with self.catalog.write() as session:
            row = session.get_one(CollectionRow, self.collection_id)
            row.max_size_bytes, row.ttl_s = limits.max_size_bytes, limits.ttl_s
            session.merge(OptionRow(key=_BUDGET, value={"max_size_bytes": limits.store_max_size_bytes}))
        return self.make_room()

    def make_room(self) -> int:
        """Evict what exceeds the limits now, e.g. after caches were copied, and return the number of evicted caches."""
        with self.catalog.write() as session:
            gone = self._evict(session, utc_now(), spare=None)
        self.references.delete_unreferenced(gone)
        return len(gone)

    def pin(self, document_id: str, *, pinned: bool = True) -> int:
        """Pin the caches that a document has now, so that they are not evicted, or unpin them; they still expire.

        Returns:
            Number of these caches.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self.catalog.write() as session:
            pin = update(CacheRow).where(self._of_document(session, document_id)).values(pinned=pinned)
            return len(session.scalars(pin.returning(CacheRow.id)).all())

    def _of_document(self, session: Session, document_id: str) -> ColumnElement[bool]:
        """Condition for the caches of a document's passages."""
        row = documents.find_document(session, self.collection_id, document_id)
        texts = select(PassageRow.text_sha256).where(PassageRow.document_pk == row.id)
        return (CacheRow.collection_id == self.collection_id) & CacheRow.text_sha256.in_(texts)

    def _evict(self, session: Session, now: datetime, *, spare: int | None) -> list[str]:
        """Delete rows while a size limit is exceeded, expired caches first, and return their blob keys.

        `spare` is the row that was just added, which stays. If it or pinned caches exceed a limit, `StoreFullError`
        rolls the transaction back.
        """
        limits = read_limits(session, self.collection_id)
        gone: list[str] = []
        for name, scope, limit in (
            ("collection", CacheRow.collection_id == self.collection_id, limits.max_size_bytes),
            ("store", true(), limits.store_max_size_bytes),
        ):
            if limit is None:
                continue
            self.uses.write(session)
            excess = (session.scalar(select(func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(scope)) or 0) - limit
            oldest_first = (
                select(CacheRow.id, CacheRow.blob_key, CacheRow.size_bytes)
                .where(scope, CacheRow.pinned.is_(False), CacheRow.id != spare)
                # Expired caches come first, whatever their last use.
                .order_by(alive(now), func.coalesce(CacheRow.last_used_at, CacheRow.created_at), CacheRow.id)
                .limit(_EVICTED_AT_ONCE)
            )
            while excess > 0:
                freed = 0
                ids: list[int] = []
                for row_id, key, size_bytes in session.execute(oldest_first).all():
                    if freed >= excess:
                        break
                    freed += size_bytes
                    ids.append(row_id)
                    gone.append(key)
                if not ids:
                    raise StoreFullError(
                        f"the size limit of {limit:,} bytes is exceeded by {excess:,} bytes that are pinned or new",
                        where=name,
                        next_step="Raise the limit (`kv-memory budget`) or unpin documents (`kv-memory unpin`).",
                    )
                excess -= freed
                session.execute(delete(CacheRow).where(CacheRow.id.in_(ids)))
        if gone:
            EVICTIONS.labels(self.collection).inc(len(gone))
            _LOG.info("evicted %d distilled caches to stay within the size limit", len(gone))
        return gone
