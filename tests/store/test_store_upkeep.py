from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import pytest
from store_samples import FINGERPRINT, OTHER, blob_file, blob_files, document, equal, make_cache, sha

from kv_memory.store import CheckReport, GcReport, Store, maintenance
from kv_memory.store.blobs.local import blob_key


@pytest.mark.embedded
def test_check_reports_every_kind_of_fault_and_gc_removes_it(store: Store) -> None:
    store.put_document(document("a", "sound", "damaged", "gone"))
    store.put_prefix("p", b"prefix")
    keys = {
        text: store.put(sha(text), make_cache(seed)).blob_key
        for seed, text in enumerate(["sound", "damaged", "gone", "waiting", "orphan"])
    }
    with closing(sqlite3.connect(store.path / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("DELETE FROM distilled_cache WHERE blob_key = ?", (keys["orphan"],))
    blob_file(store, keys["gone"]).unlink()
    with blob_file(store, keys["damaged"]).open("r+b") as file:
        file.write(b"\xff")
    (store.path / "blobs" / "half.val.tmp").write_bytes(b"12345")
    size_bytes = store.caches()[0].size_bytes
    report = store.check()
    assert report == CheckReport(
        n_blobs=3,
        size_bytes=2 * size_bytes + len(b"prefix"),
        damaged=(keys["damaged"],),
        missing=(keys["gone"],),
        orphans=(keys["orphan"],),
        strays=("half.val.tmp", "row 4"),
        unreferenced=(sha("waiting"),),
    )
    assert not report.ok
    assert [p.text for p in store.missing(FINGERPRINT, 0.25)] == ["damaged"]
    assert store.gc() == GcReport(
        n_orphan_blobs=1,
        n_dangling_rows=1,
        n_unreferenced_caches=1,
        n_expired_caches=0,
        n_strays=2,
        freed_bytes=2 * size_bytes + 5,
    )
    assert [p.text for p in store.missing(FINGERPRINT, 0.25)] == ["damaged", "gone"]
    assert store.get_prefix("p") is not None
    assert store.check() == CheckReport(
        n_blobs=2,
        size_bytes=size_bytes + len(b"prefix"),
        damaged=(),
        missing=(),
        orphans=(),
        strays=(),
        unreferenced=(),
    )
    assert store.stats().n_quarantined == 1
    assert store.gc() == GcReport(
        n_orphan_blobs=0, n_dangling_rows=0, n_unreferenced_caches=0, n_expired_caches=0, n_strays=0, freed_bytes=0
    )


def test_an_empty_store_passes_the_check(store: Store) -> None:
    assert store.check().ok
    assert store.gc().freed_bytes == 0
    assert store.stats().n_documents == store.stats().n_caches == store.stats().cache_bytes == 0


def test_caches_without_their_document_yet_pass_the_check(store: Store) -> None:
    store.put(sha("waiting"), make_cache(1))
    report = store.check()
    assert report.ok
    assert report.unreferenced == (sha("waiting"),)
    assert store.has(sha("waiting"), FINGERPRINT, 0.25)


@pytest.mark.embedded
def test_gc_keeps_other_collections_caches_and_drops_unused_fingerprints(store: Store) -> None:
    with Store.open(store.path, collection="other") as other:
        other.put(sha("waiting"), make_cache(1))
        store.put(sha("waiting"), make_cache(1))
        store.put(sha("waiting"), make_cache(2, fingerprint=OTHER))
        assert store.gc().n_unreferenced_caches == 2
        assert store.caches() == []
        assert other.get(sha("waiting"), FINGERPRINT, 0.25).n_kept == 8
        assert len(blob_files(store)) == 1
    with closing(sqlite3.connect(store.path / "catalog.sqlite")) as catalog:
        assert catalog.execute("SELECT digest FROM fingerprint").fetchall() == [(FINGERPRINT.digest,)]


def test_stats_count_the_collection_and_the_folder(store: Store) -> None:
    store.put_document(document("a", "one", "three"))
    info = store.put(sha("one"), make_cache(1, n_kept=1000))
    store.put(sha("three"), make_cache(2, n_kept=1000))
    stats = store.stats()
    assert (stats.n_documents, stats.n_passages, stats.n_tokens, stats.n_caches) == (1, 2, 8, 2)
    assert stats.cache_bytes == 2 * info.size_bytes
    assert stats.disk_bytes == sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
    assert stats.disk_bytes > stats.cache_bytes


def test_blobs_and_files_of_a_put_in_progress_are_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_cache(1).to_bytes()
    store.references.put_blobs({blob_key(data): data})
    (store.path / "blobs" / "half.val.tmp").write_bytes(b"12345")
    monkeypatch.setattr(maintenance, "GRACE_S", 600.0)
    assert store.check().ok
    store.gc()
    monkeypatch.setattr(maintenance, "GRACE_S", -1.0)
    found = store.check()
    assert (found.orphans, found.strays) == ((blob_key(data),), ("half.val.tmp",))


@pytest.mark.embedded
def test_a_put_survives_a_purge_of_its_unfinished_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def purge_first(source: str, target: str) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert store.purge().n_strays == 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", purge_first)
    store.put(sha("x"), make_cache(1))
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1)) and store.check().ok
