"""Damage and tampering of every kind; and rows that name the sound blob of something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text as sql
from store_samples import FINGERPRINT, OTHER, blob_file, document, equal, make_cache, sha

from kv_memory.cache.distilled import DistilledCache
from kv_memory.errors import CacheNotFoundError, CorruptCacheError
from kv_memory.store import CacheInfo, Store
from tests.stress import damage

SHARED = [pytest.mark.postgres, pytest.mark.s3]


@pytest.mark.parametrize("pair", ["sqlite-disk", pytest.param("postgres-s3", marks=SHARED)])
def test_every_damage_is_refused_quarantined_and_replaced(
    tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str
) -> None:
    blobs = pair.partition("-")[2]
    kinds = [*damage.REFUSED[blobs], *damage.HEALED[blobs]]
    with Store.open(tmp_path / "store", **place(pair)) as store:
        found = damage.damages(store, n=len(kinds), seed=5, scratch=tmp_path)
    print(found)
    assert found["wrong"] == []
    assert (found["corrupt_reads"], found["executed"]) == (0, 0)
    assert found["per_kind"].keys() == {kind.__name__ for kind in kinds}


def test_damage_right_after_reading_is_detected(store: Store) -> None:
    """Times of files move in steps: one that is written to in the step in which it was read looks unchanged."""
    for number in range(20):
        key = store.put(sha(f"text {number}"), make_cache(number)).blob_key
        file = blob_file(store, key)
        wrong = bytearray(file.read_bytes())
        wrong[-1] ^= 1
        store.get(sha(f"text {number}"), FINGERPRINT, 0.25)
        file.write_bytes(wrong)
        with pytest.raises(CorruptCacheError):
            store.get(sha(f"text {number}"), FINGERPRINT, 0.25)


# -- rows that name another's blob


def set_row(store: Store, text: str, assignment: str, **values: object) -> None:
    with store.catalog.write() as session:
        statement = f"UPDATE distilled_cache SET {assignment} WHERE text_sha256 = :text"
        done: Any = session.execute(sql(statement), {**values, "text": sha(text)})
        assert done.rowcount == 1


def pair_of_caches(store: Store) -> tuple[CacheInfo, CacheInfo]:
    store.put_document(document("doc", "a", "b"))
    return store.put(sha("a"), make_cache(1)), store.put(sha("b"), make_cache(2))


def test_the_blob_of_another_text_is_not_returned(store: Store) -> None:
    _, b = pair_of_caches(store)
    set_row(store, "a", "blob_key = :key, size_bytes = :size", key=b.blob_key, size=b.size_bytes)
    with pytest.raises(CorruptCacheError, match="another text") as caught:
        store.get(sha("a"), FINGERPRINT, 0.25)
    assert caught.value.where == f"document 'doc', passage 0, blob {b.blob_key}"
    # The row was wrong, not the blob: it still serves the text it is of.
    assert equal(store.get(sha("b"), FINGERPRINT, 0.25), make_cache(2))
    assert store.stats().n_quarantined == 0
    assert [p.text for p in store.missing(FINGERPRINT, 0.25)] == ["a"]
    assert store.gc().n_orphan_blobs == 1  # what was a's
    store.put(sha("a"), make_cache(1))
    assert equal(store.get(sha("a"), FINGERPRINT, 0.25), make_cache(1)) and store.check().ok


def test_two_swapped_rows_are_both_refused(store: Store) -> None:
    a, b = pair_of_caches(store)
    set_row(store, "a", "blob_key = :key", key=b.blob_key)
    set_row(store, "b", "blob_key = :key", key=a.blob_key)
    for text in "ab":
        with pytest.raises(CorruptCacheError, match="another text"):
            store.get(sha(text), FINGERPRINT, 0.25)
    store.put(sha("a"), make_cache(1))
    store.put(sha("b"), make_cache(2))
    assert equal(store.get(sha("a"), FINGERPRINT, 0.25), make_cache(1)) and store.check().ok


def test_putting_over_a_swapped_row_repairs_it(store: Store) -> None:
    _, b = pair_of_caches(store)
    set_row(store, "a", "blob_key = :key", key=b.blob_key)
    store.put(sha("a"), make_cache(1))
    assert equal(store.get(sha("a"), FINGERPRINT, 0.25), make_cache(1))
    assert equal(store.get(sha("b"), FINGERPRINT, 0.25), make_cache(2))


def test_check_finds_swapped_rows(store: Store) -> None:
    _, b = pair_of_caches(store)
    set_row(store, "a", "blob_key = :key", key=b.blob_key)
    report = store.check()
    assert report.misfiled == (sha("a"),) and not report.ok and report.damaged == ()
    assert not store.has(sha("a"), FINGERPRINT, 0.25) and store.has(sha("b"), FINGERPRINT, 0.25)
    assert store.check().misfiled == ()


@pytest.mark.parametrize("column", ["fingerprint", "keep_ratio", "text_sha256"])
def test_a_row_stored_under_other_settings_is_refused(store: Store, column: str) -> None:
    pair_of_caches(store)
    store.put(sha("c"), make_cache(3, fingerprint=OTHER))  # so that the catalog knows that one
    asked: dict[str, Any] = {"fingerprint": FINGERPRINT, "keep_ratio": 0.25, "text_sha256": sha("a")}
    asked[column] = {"fingerprint": OTHER, "keep_ratio": 0.5, "text_sha256": sha("z")}[column]
    value = OTHER.digest if column == "fingerprint" else asked[column]
    set_row(store, "a", f"{column} = :value", value=value)
    with pytest.raises(CorruptCacheError, match=f"another {column.removesuffix('_sha256')}"):
        store.get(**asked)
    with pytest.raises(CacheNotFoundError):
        store.get(**asked)
    assert store.stats().n_quarantined == 1  # nobody else's blob either
    assert store.check().ok


def test_equal_texts_give_equal_bytes_and_others_different_ones(store: Store, tmp_path: Path) -> None:
    infos = [store.put(sha(text), make_cache(1)) for text in "ab"]
    assert infos[0].blob_key != infos[1].blob_key
    with Store.open(tmp_path / "other") as other:
        assert other.put(sha("a"), make_cache(1)).blob_key == infos[0].blob_key
        # What was read from one store is put into another under the text it is put for.
        assert other.put(sha("b"), store.get(sha("a"), FINGERPRINT, 0.25)).blob_key == infos[1].blob_key
    cache = DistilledCache.load(blob_file(store, infos[0].blob_key))
    assert cache.text_sha256 == sha("a") and replace(cache, text_sha256=None).to_bytes() == make_cache(1).to_bytes()
