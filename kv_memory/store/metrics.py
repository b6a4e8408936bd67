"""Prometheus metrics of a store, for `kv-memory stats --prometheus` and for a `/metrics` endpoint of your own.

from prometheus_client import REGISTRY
from kv_memory.store.metrics import StoreCollector

REGISTRY.register(StoreCollector(memory.store))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from kv_memory.store.counters import BUCKETS_S, NAMES
from kv_memory.store.store import Store

__all__ = ["StoreCollector", "prometheus_text"]


class StoreCollector(Collector):
    """Counts and sizes of one collection, collected at each scrape.

    Args:
        store: Store that stays open as long as it is scraped.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Any]:
        """The metric families."""
        label = [self._store.collection]
        stats, limits, counts = self._store.stats(), self._store.limits(), self._store.counters()
        gauges = {
            "documents": (stats.n_documents, "documents of the collection"),
            "passages": (stats.n_passages, "passages of the collection"),
            "caches": (stats.n_caches, "distilled caches of the collection"),
            "cache_bytes": (stats.cache_bytes, "bytes of the collection's distilled caches"),
            "quarantined_files": (stats.n_quarantined, "quarantined files of the whole store"),
            "disk_bytes": (stats.disk_bytes, "bytes of the store's folder, with all collections"),
            "max_size_bytes": (limits.max_size_bytes or 0, "size limit of the collection in bytes; 0 for no limit"),
        }
        for name, (value, text) in gauges.items():
            family = GaugeMetricFamily(f"kv_memory_{name}", text, labels=["collection"])
            family.add_metric(label, value)
            yield family
        for name, text in NAMES.items():
            if name == "get_seconds":
                continue
            counter = CounterMetricFamily(f"kv_memory_{name}", text, labels=["collection"])
            counter.add_metric(label, counts.get(name, 0.0))
            yield counter
        hits = counts.get("hits", 0.0)
        histogram = HistogramMetricFamily(
            "kv_memory_get_seconds", "seconds spent reading a returned cache", labels=["collection"]
        )
        buckets = [(f"{end:g}", counts.get(f"get_seconds_le_{end:g}", 0.0)) for end in BUCKETS_S]
        histogram.add_metric(label, buckets=[*buckets, ("+Inf", hits)], sum_value=counts.get("get_seconds", 0.0))
        yield histogram


def prometheus_text(store: Store) -> str:
    """The metrics of a store's collection in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    return generate_latest(registry).decode()
