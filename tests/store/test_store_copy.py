"""A collection copied into another one: all kinds of stores, conflicts, interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filled_store import Stop, contents, stop_after
from sqlalchemy import select, update
from store_samples import FINGERPRINT, blob_file, blob_files, document, equal, make_cache, sha

from kv_memory.errors import ConfigError, TransferError
from kv_memory.store import CacheInfo, Store, copy_collection, export_collection, import_archive
from kv_memory.store.sql.schema import PassageRow


def test_passages_without_their_text_are_copied(full: Store, fresh: Store) -> None:
    terms = {"0" * 16: 2}
    with full.catalog.write() as session:
        session.execute(
            update(PassageRow).where(PassageRow.text_sha256 == sha("text 0")).values(text=None, terms=terms)
        )
    copy_collection(full, fresh)
    with fresh.catalog.read() as session:
        row = session.scalars(select(PassageRow).where(PassageRow.text_sha256 == sha("text 0"))).one()
        assert (row.text, row.terms) == (None, terms)
        others = session.scalars(select(PassageRow).where(PassageRow.terms.is_not(None))).all()
        assert len(others) == 1


ELSEWHERE = [pytest.param("sqlite-folder"), pytest.param("postgres-s3", marks=[pytest.mark.postgres, pytest.mark.s3])]


@pytest.mark.parametrize("pair", ELSEWHERE)
def test_transfer_works_between_all_kinds_of_store(
    full: Store, fresh: Store, tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str
) -> None:
    expected = contents(full)
    with Store.open(tmp_path / "elsewhere", **place(pair)) as elsewhere:
        assert copy_collection(full, elsewhere).n_added == 4
        assert contents(elsewhere) == expected and elsewhere.check().ok
        export_collection(elsewhere, tmp_path / "all.tar")
        copy = elsewhere.in_collection("copy")
        assert import_archive(tmp_path / "all.tar", copy).n_added == 4
        assert contents(copy) == expected and elsewhere.check().ok
    import_archive(tmp_path / "all.tar", fresh)
    assert contents(fresh) == expected


def test_two_lasting_stores_share_no_files(full: Store, fresh: Store, tmp_path: Path) -> None:
    files = {path: path.stat() for path in blob_files(full)}
    copy_collection(full, fresh)
    export_collection(full, tmp_path / "all.tar")
    with Store.open(tmp_path / "imported") as imported:
        import_archive(tmp_path / "all.tar", imported)
        copies = blob_files(fresh) + blob_files(imported)
    assert len(copies) == 2 * 7
    assert all((path.stat().st_nlink, path.stat().st_mode & 0o777) == (1, 0o600) for path in [*files, *copies])
    assert all(path.stat().st_mtime == status.st_mtime for path, status in files.items())


# conflicts


def test_a_collection_with_other_settings_is_refused(fresh: Store, full: Store) -> None:
    fresh.update_settings({"model": "other", "more": 1})
    copy_collection(full, fresh)  # empty: the settings come along
    assert fresh.settings() == full.settings()
    fresh.update_settings({"model": "other"})
    before = contents(fresh)
    with pytest.raises(TransferError, match='model is "tiny" there, "other" here') as caught:
        copy_collection(full, fresh)
    assert "--collection" in str(caught.value) and contents(fresh) == before


@pytest.mark.parametrize("choice", ["refuse", "skip", "replace"])
def test_conflicting_documents_follow_on_conflict(fresh: Store, full: Store, choice: Any) -> None:
    fresh.update_settings(full.settings())
    fresh.put(sha("mine"), make_cache(60))
    fresh.put_document(document("d001", "mine"))
    fresh.put_document(document("own", "own"))
    before = contents(fresh)
    if choice == "refuse":
        with pytest.raises(TransferError, match="document 'd001'"):
            copy_collection(full, fresh)
        assert contents(fresh) == before
        return
    report = copy_collection(full, fresh, on_conflict=choice)
    assert [d.id for d in fresh.documents()] == ["d000", "d001", "d002", "own", "twin"]
    texts = [p.text for p in fresh.document("d001").passages]
    assert report.conflicts == (("d001",) if choice == "skip" else ())
    assert texts == (["mine"] if choice == "skip" else ["text 1", "shared"])
    assert fresh.has(sha("mine"), FINGERPRINT, 0.25) == (choice == "skip")
    assert fresh.has(sha("text 1"), FINGERPRINT, 0.25) == (choice == "replace")
    assert report.n_caches_left_out == (1 if choice == "skip" else 0)
    assert fresh.check().ok and fresh.check().unreferenced == ()


def test_replace_updates_metadata_of_equal_texts_too(fresh: Store, full: Store) -> None:
    copy_collection(full, fresh)
    fresh.put_document(replace(fresh.document("twin"), metadata={"mine": True}))
    assert copy_collection(full, fresh).n_unchanged == 4
    assert fresh.document("twin").metadata == {"mine": True}
    assert copy_collection(full, fresh, on_conflict="replace").n_replaced == 1
    assert fresh.document("twin").metadata == {}


def test_a_cache_of_a_replaced_document_stays_if_another_one_needs_it(fresh: Store, full: Store) -> None:
    fresh.update_settings(full.settings())
    fresh.put(sha("twin"), make_cache(1))
    fresh.put_document(document("d001", "twin"))
    assert copy_collection(full, fresh, on_conflict="replace").n_replaced == 1
    assert fresh.missing(FINGERPRINT, 0.25) == []


def test_an_unknown_on_conflict_is_a_config_error(fresh: Store, full: Store) -> None:
    with pytest.raises(ConfigError):
        copy_collection(full, fresh, on_conflict="ask")  # type: ignore[arg-type]


def test_copying_repairs_damaged_caches(fresh: Store, full: Store) -> None:
    copy_collection(full, fresh)
    key = next(c.blob_key for c in fresh.caches() if c.text_sha256 == sha("text 2"))
    blob_file(fresh, key).write_bytes(b"x")
    assert copy_collection(full, fresh).n_caches == 1
    assert equal(fresh.get(sha("text 2"), FINGERPRINT, 0.25), make_cache(2))


def test_the_size_limit_holds_while_copying(fresh: Store, full: Store) -> None:
    limit = full.stats().cache_bytes // 2
    fresh.set_limits(replace(fresh.limits(), max_size_bytes=limit))
    report = copy_collection(full, fresh)
    assert 1 <= report.n_evicted <= 5 and len(fresh.caches()) == 6 - report.n_evicted
    assert sum(c.size_bytes for c in fresh.caches()) <= limit
    assert "d000" in {d.id for d in fresh.documents()} and fresh.check().ok


@pytest.mark.parametrize("n", [1, 6, 9])
def test_an_interrupted_copy_leaves_whole_documents_and_resumes(
    full: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr("kv_memory.store.copy._MOST_AT_ONCE", 2)
    with pytest.raises(Stop):
        copy_collection(full, fresh, on_progress=stop_after(n))
    assert len(fresh.documents()) == {1: 0, 6: 1, 9: 3}[n]
    assert fresh.missing(FINGERPRINT, 0.25) == []
    assert fresh.check().ok
    report = copy_collection(full, fresh)
    assert report.n_caches + report.n_caches_present == 6
    assert contents(fresh) == contents(full)


def test_a_document_that_never_stays_the_same_is_an_error(
    full: Store, fresh: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = full.caches

    def change(document_id: str) -> list[CacheInfo]:
        full.put_document(full.document(document_id))
        return caches(document_id)

    monkeypatch.setattr(full, "caches", change)
    with pytest.raises(TransferError, match="document 'd000'"):
        copy_collection(full, fresh)
    assert fresh.documents() == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(
    run_script: Callable[..., Any], tmp_path: Path, empty_store: Path
) -> None:
    """Three times the documents, and 0.8 MB of text more: few passages at a time are in memory, and no list of all."""
    folder = shutil.copytree(empty_store, tmp_path / "big")
    done = run_script(GROWTH, folder, tmp_path / "big.tar", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert large - small < 400_000, (small, large)


GROWTH = """
import json, tracemalloc
from kv_memory.store import export_collection, import_archive

peaks = []
for start, stop in ((0, 1), (1, 9), (9, 25)):
    with Store.open(sys.argv[1]) as store:
        for i in range(start, stop):
            store.put_document(document(f"d{i:06}", f"{i} " + "word " * 10_000))
        if start:  # the first one imports Alembic
            tracemalloc.start()
        export_collection(store, sys.argv[2])
        with Store.open(sys.argv[3] + str(stop)) as copy:
            assert import_archive(sys.argv[2], copy).n_added == stop
        if start:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
print(json.dumps(peaks))
"""
