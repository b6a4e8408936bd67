"""When caches were used last, and how often they were asked for: kept in memory, written down with a delay."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import datetime

from sqlalchemy import update

from kv_memory.errors import StoreError
from kv_memory.store.counters import Counters, read_counters, write_counters
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, utc_now

__all__ = ["Uses"]

_FLUSH_EVERY = 256  # uses that may be lost from last_used_at in a crash; a write per get would cost an fsync each


class Uses:
    """Of the caches of one collection. Thread-safe.

    Attributes:
        counters: What was counted since it was written down last.
    """

    def __init__(self, catalog: Catalog, collection_id: int) -> None:
        self.counters = Counters()
        self._catalog = catalog
        self._collection_id = collection_id
        self._lock = threading.Lock()
        self._used: dict[int, datetime] = {}

    def note(self, row_id: int) -> None:
        """Say that a cache was used now."""
        with self._lock:
            self._used[row_id] = utc_now()
            full = len(self._used) >= _FLUSH_EVERY
        if full:
            self.flush()

    def flush(self) -> None:
        """Write down what is still in memory. It is not worth an error: failing drops it."""
        with self._lock:
            used, self._used = self._used, {}
        counts = self.counters.drain()
        if used or counts:
            with suppress(StoreError), self._catalog.write() as session:
                write_counters(session, self._collection_id, counts)
                for row_id, at in used.items():
                    session.execute(update(CacheRow).where(CacheRow.id == row_id).values(last_used_at=at))

    def totals(self) -> dict[str, float]:
        """See `Store.counters`."""
        self.flush()
        with self._catalog.read() as session:
            return read_counters(session, self._collection_id)
