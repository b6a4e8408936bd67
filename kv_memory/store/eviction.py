"""Size and age limits of caches, and the order of eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, bindparam, delete, func, or_, select, true
from sqlalchemy.orm import Session

from kv_memory.errors import ConfigError, StoreFullError
from kv_memory.store.sql.schema import CacheRow, CollectionRow, OptionRow

__all__ = ["Limits", "alive", "evict", "read_limits", "write_limits"]

_BUDGET = "budget"
# Built once: each put runs it twice, and building it takes longer than running it.
_LIMITS = select(
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
        for name in ("max_size_bytes", "store_max_size_bytes", "ttl_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0 or None, got {value}", where=name)

    @property
    def bounded(self) -> bool:
        """Whether a size limit is set, so that eviction may be needed."""
        return self.max_size_bytes is not None or self.store_max_size_bytes is not None


def read_limits(session: Session, collection_id: int) -> Limits:
    """The limits of a collection."""
    max_size_bytes, ttl_s, shared = session.execute(_LIMITS, {"collection": collection_id}).one()
    of_store = (shared or {}).get("max_size_bytes")
    return Limits(max_size_bytes=max_size_bytes, ttl_s=ttl_s, store_max_size_bytes=of_store)


def write_limits(session: Session, collection_id: int, limits: Limits) -> None:
    """Set the limits of a collection and its store."""
    row = session.get_one(CollectionRow, collection_id)
    row.max_size_bytes, row.ttl_s = limits.max_size_bytes, limits.ttl_s
    option = session.get(OptionRow, _BUDGET)
    value = {"max_size_bytes": limits.store_max_size_bytes}
    if option is not None:
        option.value = value
    elif limits.store_max_size_bytes is not None:
        session.add(OptionRow(key=_BUDGET, value=value))


def alive(now: datetime) -> ColumnElement[bool]:
    """Condition for caches that have not expired."""
    return or_(CacheRow.expires_at.is_(None), CacheRow.expires_at > now)


def evict(
    session: Session,
    collection_id: int,
    limits: Limits,
    *,
    now: datetime,
    spare: int | None,
    being_read: Callable[[str], bool],
) -> list[str]:
    """Delete rows while a size limit is exceeded: expired caches first, then the least recently used.

    Args:
        session: Session of a writing transaction.
        collection_id: Catalog row of the collection that `max_size_bytes` applies to.
        limits: Limits to enforce.
        now: Time at which expiry is judged.
        spare: Id of the row that was just added, which is not evicted; None for no such row.
        being_read: Function that returns whether a process of this machine reads the blob of a key.

    Returns:
        Blob keys of the deleted rows, for `BlobReferences.delete_unreferenced`.

    Raises:
        StoreFullError: Caches that are pinned, being read or just added exceed a limit; roll back.
    """
    gone: list[str] = []
    everywhere = true()
    for scope, limit in (
        (CacheRow.collection_id == collection_id, limits.max_size_bytes),
        (everywhere, limits.store_max_size_bytes),
    ):
        if limit is None:
            continue
        excess = (session.scalar(select(func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(scope)) or 0) - limit
        if excess <= 0:
            continue
        oldest_first = (
            select(CacheRow.id, CacheRow.blob_key, CacheRow.size_bytes)
            .where(scope, CacheRow.pinned.is_(False), CacheRow.id != spare)
            # Expired caches come first, whatever their last use.
            .order_by(alive(now), func.coalesce(CacheRow.last_used_at, CacheRow.created_at), CacheRow.id)
        )
        ids: list[int] = []
        with session.execute(oldest_first.execution_options(yield_per=200)) as candidates:
            for row_id, key, size_bytes in candidates:
                if being_read(key):
                    continue
                ids.append(row_id)
                gone.append(key)
                excess -= size_bytes
                if excess <= 0:
                    break
        if excess > 0:
            raise StoreFullError(
                f"the size limit of {limit:,} bytes is exceeded by {excess:,} bytes that are pinned, in use or new",
                where="collection" if scope is not everywhere else "store",
                next_step="Raise the limit (`kv-memory budget`) or unpin documents (`kv-memory unpin`).",
            )
        for start in range(0, len(ids), 500):
            session.execute(delete(CacheRow).where(CacheRow.id.in_(ids[start : start + 500])))
    return gone
