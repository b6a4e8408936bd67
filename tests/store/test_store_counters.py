"""What a process counts for Prometheus, and what it says through logging."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from store_samples import FINGERPRINT, OTHER, blob_file, document, make_cache, sha

from kv_memory.errors import CacheNotFoundError, CorruptCacheError, FingerprintMismatchError, StoreFullError
from kv_memory.store import Limits, Store
from kv_memory.store.metrics import prometheus_text

Counted = Callable[..., float]


@pytest.fixture
def counted() -> Counted:
    """The growth of a counter since the test began; all stores of a process share the counters."""

    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"kv_memory_{name}", {"collection": "default", **labels}) or 0.0

    names: list[tuple[str, dict[str, str]]] = [
        ("gets_total", {"outcome": outcome}) for outcome in ("hit", "missing", "mismatch", "corrupt")
    ]
    rest = ("bytes_read_total", "bytes_written_total", "evictions_total", "get_seconds_count", "put_seconds_count")
    names += [(name, {}) for name in rest]
    before = {(name, *labels.values()): value(name, **labels) for name, labels in names}
    return lambda name, **labels: value(name, **labels) - before[name, *labels.values()]


def use(store: Store) -> int:
    """Two puts, three hits, two misses, a mismatch, an eviction; returns the size of a cache."""
    size = store.put(sha("a"), make_cache(1)).size_bytes
    store.put(sha("b"), make_cache(2))
    for _ in range(3):
        store.get(sha("a"), FINGERPRINT, 0.25)
    for text in ("c", "d"):
        with pytest.raises(CacheNotFoundError):
            store.get(sha(text), FINGERPRINT, 0.25)
    with pytest.raises(FingerprintMismatchError):
        store.get(sha("a"), OTHER, 0.25)
    store.set_limits(Limits(max_size_bytes=size))
    return size


def test_counters_count_every_outcome(store: Store, counted: Counted) -> None:
    size = use(store)
    assert counted("gets_total", outcome="hit") == 3 == counted("get_seconds_count")
    assert counted("gets_total", outcome="missing") == 2
    assert counted("gets_total", outcome="mismatch") == 1
    assert counted("put_seconds_count") == 2
    assert counted("evictions_total") == 1
    assert counted("bytes_read_total") == 3 * size
    assert counted("bytes_written_total") == 2 * size


def test_damage_is_counted_and_logged(store: Store, counted: Counted, caplog: pytest.LogCaptureFixture) -> None:
    store.put_document(document("doc", "b"))
    info = store.put(sha("b"), make_cache(2))
    blob_file(store, info.blob_key).write_bytes(b"no cache")
    with caplog.at_level(logging.WARNING, logger="kv_memory"), pytest.raises(CorruptCacheError):
        store.get(sha("b"), FINGERPRINT, 0.25)
    assert counted("gets_total", outcome="corrupt") == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "quarantined" in record.getMessage() and info.blob_key in record.getMessage()


def test_evictions_are_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kv_memory.store"):
        use(store)
    assert "evicted 1 distilled caches" in caplog.text


def test_prometheus_text_can_be_parsed(store: Store) -> None:
    size = use(store)
    store.put_document(document("doc", "a", "b"))
    families = {family.name: family for family in text_string_to_metric_families(prometheus_text(store))}
    values = {
        sample.name: sample.value for name in families for sample in families[name].samples if "le" not in sample.labels
    }
    assert values["kv_memory_caches"] == 1 and values["kv_memory_cache_bytes"] == size
    assert values["kv_memory_documents"] == 1 and values["kv_memory_max_size_bytes"] == size
    assert {"kv_memory_gets", "kv_memory_get_seconds", "kv_memory_evictions"} <= families.keys()
    assert all(family.documentation for family in families.values())


def test_a_failed_put_is_not_counted(store: Store, counted: Counted) -> None:
    store.set_limits(Limits(max_size_bytes=10))
    with pytest.raises(StoreFullError, match="size limit of"):
        store.put(sha("a"), make_cache(1))
    assert counted("put_seconds_count") == 0 == counted("evictions_total")
