"""Usage counters of a collection's caches: counted in memory, written with a delay, kept permanently.

Counts outlive the process, because `kv-memory stats --prometheus` reports them from a process of its own. A crash
loses the counts and times of last use since the last flush.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from kv_memory.errors import StoreError
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, CounterRow, utc_now

__all__ = ["BUCKETS_S", "NAMES", "Counters", "Uses", "read_counters", "write_counters"]

# Upper bounds of the histogram of `get` durations in seconds; buckets are cumulative, as in Prometheus.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
# Counter names and descriptions.
NAMES = {
    "hits": "distilled caches found, verified and returned",
    "misses": "look-ups of a missing or expired cache",
    "refused_corrupt": "damaged caches, refused and quarantined",
    "refused_mismatch": "caches of another model, adapter, prompt or format, refused and kept",
    "puts": "distilled caches written",
    "evictions": "distilled caches evicted to stay within a size limit",
    "bytes_read": "bytes of blobs returned",
    "bytes_written": "bytes of blobs written",
    "get_seconds": "total seconds spent reading the returned caches",
    "put_seconds": "total seconds spent writing caches",
}


class Counters:
    """Counts since the last `drain`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter; names are those of NAMES, and the histogram buckets."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0.0) + amount

    def got(self, size_bytes: int, elapsed_s: float) -> None:
        """Count a hit."""
        with self._lock:
            for name, amount in (("hits", 1), ("bytes_read", size_bytes), ("get_seconds", elapsed_s)):
                self._counts[name] = self._counts.get(name, 0.0) + amount
            for end in BUCKETS_S:
                if elapsed_s <= end:
                    name = f"get_seconds_le_{end:g}"
                    self._counts[name] = self._counts.get(name, 0.0) + 1

    def drain(self) -> dict[str, float]:
        """Return the counts and reset them."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the duration of a block in seconds to a counter, if the block succeeds."""
        start_s = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start_s)


def write_counters(session: Session, collection_id: int, counts: dict[str, float]) -> None:
    """Add counts to those stored for a collection, in a writing transaction."""
    rows = {
        row.name: row for row in session.scalars(select(CounterRow).where(CounterRow.collection_id == collection_id))
    }
    for name, amount in counts.items():
        if name in rows:
            rows[name].value += amount
        else:
            session.add(CounterRow(collection_id=collection_id, name=name, value=amount))


def read_counters(session: Session, collection_id: int) -> dict[str, float]:
    """All stored counts of a collection."""
    rows = session.scalars(select(CounterRow).where(CounterRow.collection_id == collection_id))
    return {row.name: row.value for row in rows}


_FLUSH_EVERY = 256  # caches with a time of last use that a crash may lose; a write per get would cost an fsync each


class Uses:
    """Times of last use and counters of one collection's caches. Thread-safe.

    Attributes:
        counters: Counts since the last flush.
    """

    def __init__(self, catalog: Catalog, collection_id: int) -> None:
        self.counters = Counters()
        self._catalog = catalog
        self._collection_id = collection_id
        self._lock = threading.Lock()
        self._used: dict[int, datetime] = {}

    def note(self, row_id: int) -> None:
        """Record that a cache was used now."""
        with self._lock:
            self._used[row_id] = utc_now()
            full = len(self._used) >= _FLUSH_EVERY
        if full:
            self.flush()

    def flush(self) -> None:
        """Write buffered counts and times of last use; if that fails they are dropped, and no error is raised."""
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
