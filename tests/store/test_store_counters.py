"""What a store counts, in its own words and in Prometheus's; and what it says through logging."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from store_samples import FINGERPRINT, OTHER, document, make_cache, sha

from kv_memory.errors import CacheNotFoundError, CorruptCacheError, FingerprintMismatchError
from kv_memory.store import Limits, Store
from kv_memory.store.counters import BUCKETS_S, NAMES
from kv_memory.store.metrics import prometheus_text


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


def test_counters_count_every_outcome(store: Store) -> None:
    size = use(store)
    counts = store.counters()
    wanted = {"hits": 3, "misses": 2, "refused_mismatch": 1, "puts": 2, "evictions": 1}
    assert {name: counts[name] for name in wanted} == wanted
    assert counts["bytes_read"] == 3 * size and counts["bytes_written"] == 2 * size
    assert 0 < counts["get_seconds"] < 10 and 0 < counts["put_seconds"] < 10
    buckets = [counts.get(f"get_seconds_le_{end:g}", 0) for end in BUCKETS_S]
    assert buckets == sorted(buckets) and buckets[-1] == 3
    assert all(name in NAMES or name.startswith("get_seconds_le_") for name in counts)


def test_counters_add_up_per_collection(store: Store) -> None:
    use(store)
    with store.in_collection("other") as other:
        assert other.counters() == {}
        other.put(sha("x"), make_cache(3))
        assert other.counters()["puts"] == 1
    before = store.counters()
    store.put(sha("z"), make_cache(4))
    assert store.counters()["puts"] == before["puts"] + 1
    assert store.counters() == store.counters()


@pytest.mark.embedded
def test_counters_survive_closing_and_damage_is_counted_and_logged(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    from store_samples import blob_file

    use(store)
    store.put_document(document("doc", "b"))
    info = store.put(sha("b"), make_cache(2))
    store.close()
    with Store.open(store.path, create=False) as again:
        blob_file(again, info.blob_key).write_bytes(b"no cache")
        with caplog.at_level(logging.WARNING, logger="kv_memory"), pytest.raises(CorruptCacheError):
            again.get(sha("b"), FINGERPRINT, 0.25)
        assert again.counters()["refused_corrupt"] == 1
        assert again.counters()["hits"] == 3
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
        sample.name: sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert values["kv_memory_hits_total"] == 3 and values["kv_memory_misses_total"] == 2
    assert values["kv_memory_evictions_total"] == 1 and values["kv_memory_refused_mismatch_total"] == 1
    assert values["kv_memory_caches"] == 1 and values["kv_memory_cache_bytes"] == size
    assert values["kv_memory_documents"] == 1 and values["kv_memory_max_size_bytes"] == size
    assert values["kv_memory_get_seconds_count"] == 3
    ends = [s.labels["le"] for s in families["kv_memory_get_seconds"].samples if "le" in s.labels]
    assert ends == [*(f"{end:g}" for end in BUCKETS_S), "+Inf"]
    assert {s.labels["collection"] for f in families.values() for s in f.samples} == {"default"}
    assert all(family.documentation for family in families.values())


def test_a_failed_put_is_not_counted(store: Store) -> None:
    store.set_limits(Limits(max_size_bytes=10))
    with pytest.raises(Exception, match="size limit of"):
        store.put(sha("a"), replace(make_cache(1)))
    assert store.counters().get("puts", 0) == 0 == store.counters().get("evictions", 0)
