"""Budgets, ages and pins: kept in SQL, honoured on every pair of catalog and blobs."""

from __future__ import annotations

import time
from typing import Any

import pytest
from store_samples import FINGERPRINT, document, make_cache, sha

from kv_memory.errors import CacheNotFoundError, ConfigError, DocumentNotFoundError, StoreFullError
from kv_memory.store import Limits, Store


def fill(store: Store, *texts: str) -> int:
    """Put a cache for each text; returns the size of one in bytes."""
    sizes = {store.put(sha(text), make_cache(1000 + hash(text) % 1000)).size_bytes for text in texts}
    (size,) = sizes
    return size


def texts_of(store: Store, *texts: str) -> set[str]:
    return {text for text in texts if store.has(sha(text), FINGERPRINT, 0.25)}


def test_the_least_recently_used_cache_is_evicted_first(store: Store) -> None:
    size = fill(store, "a", "b", "c")
    store.set_limits(Limits(max_size_bytes=3 * size))
    del_me = store.get(sha("a"), FINGERPRINT, 0.25)
    del del_me
    fill(store, "d")
    assert texts_of(store, "a", "b", "c", "d") == {"a", "c", "d"}
    assert len(store.check().orphans) == 0 and store.check().n_blobs == 3


def test_lowering_a_size_limit_evicts_at_once_and_is_stored(store: Store) -> None:
    size = fill(store, "a", "b", "c", "d")
    assert store.set_limits(Limits(max_size_bytes=2 * size + 1)) == 2
    assert texts_of(store, "a", "b", "c", "d") == {"c", "d"}
    with store.in_collection("other") as other:
        assert other.limits() == Limits()
    assert store.limits() == Limits(max_size_bytes=2 * size + 1)


@pytest.mark.embedded
def test_limits_pins_and_uses_survive_a_restart(store: Store) -> None:
    size = fill(store, "a", "b", "c")
    store.put_document(document("doc", "b"))
    assert store.pin("doc") == 1
    store.set_limits(Limits(max_size_bytes=3 * size, ttl_s=1000, store_max_size_bytes=10**9))
    _ = store.get(sha("a"), FINGERPRINT, 0.25).n_kept
    store.close()
    with Store.open(store.path, create=False) as again:
        assert again.limits() == Limits(max_size_bytes=3 * size, ttl_s=1000, store_max_size_bytes=10**9)
        fill(again, "d", "e")
        assert texts_of(again, "a", "b", "c", "d", "e") == {"b", "d", "e"}
        assert {info.pinned for info in again.caches("doc")} == {True}


def test_pinned_caches_are_not_evicted(store: Store) -> None:
    size = fill(store, "a", "b")
    store.put_document(document("doc", "a"))
    assert store.pin("doc") == 1
    store.set_limits(Limits(max_size_bytes=2 * size))
    fill(store, "c", "d")
    assert texts_of(store, "a", "b", "c", "d") == {"a", "d"}
    assert store.pin("doc", pinned=False) == 1
    fill(store, "e")
    assert texts_of(store, "a", "d", "e") == {"d", "e"}
    with pytest.raises(DocumentNotFoundError):
        store.pin("nobody")


def test_a_cache_in_use_stays_readable_when_it_is_evicted(store: Store) -> None:
    size = fill(store, "a", "b")
    store.set_limits(Limits(max_size_bytes=2 * size))
    held = store.get(sha("a"), FINGERPRINT, 0.25)
    before = held.keys.clone()
    store.uses._used.clear()  # as if it had been used long ago
    fill(store, "c")
    assert texts_of(store, "a", "b", "c") == {"b", "c"}
    assert (held.keys == before).all()
    assert store.check().ok


def test_a_cache_larger_than_the_size_limit_is_refused(store: Store) -> None:
    store.set_limits(Limits(max_size_bytes=10))
    with pytest.raises(StoreFullError, match="10 bytes") as caught:
        fill(store, "a")
    assert caught.value.next_step is not None
    assert store.caches() == [] and store.check().ok and store.check().n_blobs == 0


def test_the_store_size_limit_counts_all_collections(store: Store) -> None:
    size = fill(store, "a", "b")
    with store.in_collection("other") as other:
        fill(other, "c")
        other.set_limits(Limits(store_max_size_bytes=3 * size))
        fill(other, "d")
        assert texts_of(store, "a", "b") == {"b"}
        assert texts_of(other, "c", "d") == {"c", "d"}
    assert store.limits().store_max_size_bytes == 3 * size


def test_the_size_limit_holds_after_every_put(store: Store) -> None:
    size = fill(store, "first")
    store.set_limits(Limits(max_size_bytes=int(4.5 * size)))
    for number in range(20):
        store.put(sha(f"text {number}"), make_cache(number))
        total = sum(info.size_bytes for info in store.caches())
        assert total <= 4.5 * size
    assert len(store.caches()) == 4


def test_caches_expire(store: Store) -> None:
    store.put_document(document("doc", "a", "b"))
    fill(store, "a")
    store.set_limits(Limits(ttl_s=0.4))
    fill(store, "b")
    assert store.missing(FINGERPRINT, 0.25) == []
    time.sleep(0.5)
    assert [passage.text for passage in store.missing(FINGERPRINT, 0.25)] == ["b"]
    with pytest.raises(CacheNotFoundError):
        store.get(sha("b"), FINGERPRINT, 0.25)
    assert texts_of(store, "a", "b") == {"a"}
    store.set_limits(Limits(ttl_s=1000))
    fill(store, "b")  # in the place of the one that expired
    assert texts_of(store, "a", "b") == {"a", "b"} and len(store.caches()) == 2
    store.set_limits(Limits(ttl_s=0.05))
    fill(store, "c")
    time.sleep(0.1)
    assert store.gc().n_expired_caches == 1
    assert store.check().ok and store.check().n_blobs == 2


def test_expired_caches_are_evicted_before_old_ones(store: Store) -> None:
    size = fill(store, "old")
    store.set_limits(Limits(ttl_s=0.05))
    fill(store, "expired")
    time.sleep(0.1)
    store.set_limits(Limits(max_size_bytes=2 * size))
    fill(store, "new")
    assert texts_of(store, "old", "new") == {"old", "new"} and len(store.caches()) == 2


def test_eviction_keeps_a_blob_that_another_collection_uses(store: Store) -> None:
    size = fill(store, "a")
    with store.in_collection("other") as other:
        fill(other, "a")
        other.set_limits(Limits(max_size_bytes=size))
        fill(other, "b")
        assert texts_of(other, "a", "b") == {"b"}
    assert store.get(sha("a"), FINGERPRINT, 0.25).n_kept == 8


@pytest.mark.parametrize("limits", [{"max_size_bytes": 0}, {"ttl_s": -1.0}, {"store_max_size_bytes": -5}])
def test_limits_out_of_range_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Limits(**limits)
