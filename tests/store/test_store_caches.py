from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from store_samples import FINGERPRINT, OTHER, blob_files, document, equal, make_cache, sha, stored_bytes

from kv_memory.errors import CacheNotFoundError, ConfigError, FingerprintMismatchError
from kv_memory.store import Store, eviction


def test_another_store_object_returns_a_cache_bit_for_bit(tmp_path: Path) -> None:
    cache = replace(make_cache(1), fidelity=0.5)
    with Store.open(tmp_path) as store:
        info = store.put(sha("x"), cache)
        assert store.caches() == [info]
    with Store.open(tmp_path, create=False) as store:
        found = store.get(sha("x"), FINGERPRINT, 0.25)
        assert equal(found, cache)
        assert (found.n_tokens, found.keep_ratio) == (32, 0.25)
    assert (info.method, info.dtype, info.n_tokens, info.n_kept) == ("sink_recent", "float32", 32, 8)
    assert (info.fingerprint, info.fidelity, info.pinned) == (FINGERPRINT.digest, 0.5, False)
    assert info.size_bytes == len(stored_bytes("x", cache))


def test_putting_again_returns_the_existing_cache(store: Store) -> None:
    first = store.put(sha("x"), make_cache(1))
    again = store.put(sha("x"), make_cache(2))  # a second run of a method that is not deterministic
    assert again == first
    assert len(blob_files(store)) == 1
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))


def test_the_row_records_the_storage_and_an_existing_cache_stays(store: Store) -> None:
    cache = make_cache(1)
    small = store.put(sha("x"), cache, storage="int8")
    assert (small.dtype, small.size_bytes) == ("int8", len(stored_bytes("x", cache, storage="int8")))
    assert store.put(sha("x"), cache, storage="float32") == small  # one text, fingerprint and keep ratio: one cache
    assert store.put(sha("y"), cache, storage="bfloat16").dtype == "bfloat16"
    assert store.put(sha("z"), cache).dtype == "float32"
    for text in "xyz":
        found = store.get(sha(text), FINGERPRINT, 0.25)
        assert found.keys.dtype == torch.float32 and found.fingerprint == FINGERPRINT
        assert (found.keys - cache.keys).abs().max() < 0.02
    with pytest.raises(ConfigError, match="unknown storage"):
        store.put(sha("w"), cache, storage="int4")  # type: ignore[arg-type]
    assert store.check().ok and len(store.caches()) == 3


def test_different_settings_give_separate_caches(store: Store) -> None:
    store.put(sha("x"), make_cache(1))
    store.put(sha("x"), make_cache(1, keep_ratio=0.5))
    store.put(sha("x"), make_cache(1, fingerprint=OTHER))
    assert len(store.caches()) == 3
    assert store.get(sha("x"), FINGERPRINT, 0.5).keep_ratio == 0.5
    assert store.get(sha("x"), OTHER, 0.25).fingerprint == OTHER


def test_a_shared_blob_is_deleted_with_its_last_row(tmp_path: Path) -> None:
    with Store.open(tmp_path, collection="one") as one, Store.open(tmp_path, collection="two") as two:
        for store in (one, two):
            store.put(sha("x"), make_cache(1))
        assert len(blob_files(one)) == 1
        assert one.delete(sha("x")) == 1
        assert len(blob_files(one)) == 1
        assert equal(two.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
        assert two.delete(sha("x")) == 1
        assert blob_files(one) == []
        assert one.check().ok


def test_delete_removes_all_caches_of_the_text_and_no_other(store: Store) -> None:
    for ratio, fingerprint in ((0.25, FINGERPRINT), (0.25, OTHER), (0.5, OTHER)):
        store.put(sha("x"), make_cache(1, keep_ratio=ratio, fingerprint=fingerprint))
    kept = store.put(sha("y"), make_cache(2))
    assert store.delete(sha("z")) == 0
    assert store.delete(sha("x")) == 3
    assert store.caches() == [kept]
    assert len(blob_files(store)) == 1


def test_missing_and_caches_list_by_document(store: Store) -> None:
    store.put_document(document("a", "x", "y"))
    store.put_document(document("b", "x"))
    store.put(sha("x"), make_cache(1))
    store.put(sha("y"), make_cache(2, keep_ratio=0.5))
    assert [(p.document_id, p.text) for p in store.missing(FINGERPRINT, 0.25)] == [("a", "y")]
    assert [(p.document_id, p.text) for p in store.missing(FINGERPRINT, 0.5)] == [("a", "x"), ("b", "x")]
    assert len(store.missing(OTHER, 0.25)) == 3
    assert [c.text_sha256 for c in store.caches("b")] == [sha("x")]
    assert [c.text_sha256 for c in store.caches("a")] == [sha("x"), sha("y")]


def test_a_cache_of_another_model_is_a_mismatch_naming_both_sides(store: Store) -> None:
    store.put_document(document("a", "x"))
    store.put(sha("x"), make_cache(1, fingerprint=OTHER))
    with pytest.raises(FingerprintMismatchError, match=r"weights is f{12} in the cache, a{12} loaded") as caught:
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert caught.value.where == "document 'a', passage 0"
    assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step
    assert not store.has(sha("x"), FINGERPRINT, 0.25)


def test_the_error_for_a_missing_cache_names_available_keep_ratios(store: Store) -> None:
    with pytest.raises(CacheNotFoundError, match=r"no distilled cache at keep_ratio 0\.25 \["):
        store.get(sha("x"), FINGERPRINT, 0.25)
    store.put(sha("x"), make_cache(1, keep_ratio=0.5))
    store.put(sha("x"), make_cache(1, keep_ratio=0.125))
    with pytest.raises(CacheNotFoundError, match=r"available keep ratios: 0\.125, 0\.5") as caught:
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step
    with pytest.raises(ConfigError, match="keep_ratio"):
        store.get(sha("x"), FINGERPRINT, 4)


def test_a_text_instead_of_its_hash_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="SHA-256"):
        store.put("the text itself", make_cache(1))


def test_tensors_stay_valid_when_the_cache_is_deleted(store: Store) -> None:
    store.put(sha("x"), make_cache(1, n_kept=5000))
    found = store.get(sha("x"), FINGERPRINT, 0.25)
    store.delete(sha("x"))
    assert blob_files(store) == []
    assert equal(found, make_cache(1, n_kept=5000))


def test_uses_are_written_in_batches_and_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_FLUSH_EVERY", 2)
    with Store.open(tmp_path) as store:
        for i in range(3):
            store.put(sha(str(i)), make_cache(i))
        store.get(sha("0"), FINGERPRINT, 0.25)
        assert [c.last_used_at for c in store.caches()] == [None] * 3
        store.get(sha("1"), FINGERPRINT, 0.25)
        assert [c.last_used_at is None for c in store.caches()] == [False, False, True]
        store.get(sha("2"), FINGERPRINT, 0.25)
    with Store.open(tmp_path) as store:
        created_and_used = [(c.created_at, c.last_used_at) for c in store.caches()]
    assert all(used is not None and used >= created for created, used in created_and_used)


def test_replacing_a_prefix_deletes_its_old_blob(store: Store) -> None:
    assert store.get_prefix("p") is None
    store.put_prefix("p", b"one")
    store.put_prefix("q", b"one")
    store.put_prefix("p", b"two")
    path, other = store.get_prefix("p"), store.get_prefix("q")
    assert path is not None and path.read_bytes() == b"two"
    assert other is not None and other.read_bytes() == b"one"
    store.put_prefix("q", b"two")
    assert len(blob_files(store)) == 1
    assert store.check().ok


# From Python 3.13 a connection that dies with its thread warns; diskcache keeps one for each thread.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
def test_threads_share_a_store(store: Store) -> None:
    n_threads = 6
    barrier = threading.Barrier(n_threads)

    def work(thread: int) -> None:
        barrier.wait()
        for i in range(6):
            store.put(sha(f"shared {i}"), make_cache(i))
            store.put(sha(f"{thread} {i}"), make_cache(100 * thread + i))
            assert equal(store.get(sha(f"shared {i}"), FINGERPRINT, 0.25), make_cache(i))
            assert equal(store.get(sha(f"{thread} {i}"), FINGERPRINT, 0.25), make_cache(100 * thread + i))
        store.put_document(document(str(thread), *(f"{thread} {i}" for i in range(6))))

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    assert len(store.caches()) == 6 + 6 * n_threads
    assert store.missing(FINGERPRINT, 0.25) == []
    assert store.check().ok
