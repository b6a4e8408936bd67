"""Prometheus metrics: counters and times of this process in prometheus_client's registry, and sizes of a collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from kv_memory.store.store import Store

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_LABELS = ["collection"]

GETS = Counter(
    "kv_memory_gets",
    "look-ups of distilled caches; outcome: hit, missing (or expired), mismatch (of another model, adapter, prompt or "
    "format) or corrupt (damaged and quarantined)",
    ["collection", "outcome"],
)
GET_SECONDS = Histogram("kv_memory_get_seconds", "seconds spent reading a returned cache", _LABELS, buckets=_BUCKETS_S)
PUT_SECONDS = Histogram("kv_memory_put_seconds", "seconds spent writing a new cache", _LABELS, buckets=_BUCKETS_S)
BYTES_READ = Counter("kv_memory_bytes_read", "bytes of blobs of returned caches", _LABELS)
BYTES_WRITTEN = Counter("kv_memory_bytes_written", "bytes of blobs of new caches", _LABELS)
EVICTIONS = Counter("kv_memory_evictions", "distilled caches evicted to stay within a size limit", _LABELS)


def prometheus_text(store: Store) -> str:
    """The sizes of a store's collection, and the counters of this process, in Prometheus's text format."""
    registry = CollectorRegistry()
    stats, limits = store.stats(), store.limits()
    for name, value, text in (
        ("documents", stats.n_documents, "documents of the collection"),
        ("passages", stats.n_passages, "passages of the collection"),
        ("caches", stats.n_caches, "distilled caches of the collection"),
        ("cache_bytes", stats.cache_bytes, "bytes of the collection's distilled caches"),
        ("quarantined_files", stats.n_quarantined, "quarantined files of the whole store"),
        ("disk_bytes", stats.disk_bytes, "bytes of the store's folder, with all collections"),
        ("max_size_bytes", limits.max_size_bytes or 0, "size limit of the collection in bytes; 0 for no limit"),
    ):
        Gauge(f"kv_memory_{name}", text, _LABELS, registry=registry).labels(store.collection).set(value)
    for metric in (GETS, GET_SECONDS, PUT_SECONDS, BYTES_READ, BYTES_WRITTEN, EVICTIONS):
        registry.register(metric)
    return generate_latest(registry).decode()
