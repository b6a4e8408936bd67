"""Sync: the collection becomes equal to the folder, and doing it again does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.errors import ConfigError, JobError
from kv_memory.jobs import Job, Ledger
from kv_memory.store import DocumentRecord, Store
from tests.jobs.conftest import write_notes
from tests.jobs.test_jobs_run import Runner, ids

Make = Callable[..., Job]


@pytest.fixture
def run(store: Store, ledger: Ledger) -> Runner:
    return Runner(store, ledger)


@pytest.fixture
def synced(run: Runner, new_job: Make, notes: Path) -> Path:
    """A folder that the collection is equal to."""
    ended = run(new_job(sync=notes))
    assert (ended.added, ended.deleted) == (12, 0)
    return notes


def test_sync_adds_replaces_and_deletes_documents(synced: Path, run: Runner, new_job: Make, store: Store) -> None:
    (synced / "0001.txt").unlink()
    (synced / "0002.txt").write_text("Pier 2 is closed.")
    write_notes(synced / "deep", 1, start=50)
    (synced / "0003.txt").rename(synced / "moved.txt")
    ended = run(new_job(sync=synced))
    assert (ended.added, ended.replaced, ended.unchanged, ended.deleted, ended.failed) == (2, 1, 9, 2, 0)
    assert run.n_compressed == 2  # what was only moved has its cache already
    expected = sorted(path.name for path in synced.rglob("*.txt"))
    assert sorted(ids(store)) == expected and len(store.caches()) == 12
    assert store.check().unreferenced == ()


def test_second_sync_changes_nothing_and_starts_no_worker(
    synced: Path, run: Runner, new_job: Make, store: Store, ledger: Ledger
) -> None:
    before, jobs = (store.documents(), store.caches(), store.revision), ledger.jobs()
    # The fingerprint is found out by a worker process; here it is said by hand.
    ledger.update(jobs[0], fingerprint=store.caches()[0].fingerprint)
    ended = run(new_job(sync=synced))
    assert (ended.added, ended.replaced, ended.unchanged, ended.deleted) == (0, 0, 12, 0)
    assert run.engine is not None and run.engine.n_started == 0  # no worker, hence no model
    assert (store.documents(), store.caches(), store.revision) == before
    assert [job.name for job in ledger.jobs()] == [job.name for job in jobs]  # nothing is left of it


def test_sync_compresses_a_document_with_a_missing_cache_again(
    synced: Path, run: Runner, new_job: Make, store: Store, ledger: Ledger
) -> None:
    ledger.update(ledger.jobs()[0], fingerprint=store.caches()[0].fingerprint)
    store.delete(store.caches()[5].text_sha256)
    ended = run(new_job(sync=synced))
    assert (ended.replaced, ended.unchanged, run.n_compressed) == (1, 11, 1)


def test_sync_with_other_settings_compresses_all_documents_again(
    synced: Path, run: Runner, new_job: Make, store: Store, ledger: Ledger
) -> None:
    ledger.update(ledger.jobs()[0], fingerprint=store.caches()[0].fingerprint)
    job = new_job(sync=synced)
    memory = {**job.settings.memory, "keep_ratio": 0.5}
    ledger.forget(job)
    ended = run(new_job(sync=synced, memory=memory))
    assert (ended.replaced, run.n_compressed) == (12, 12)


@pytest.mark.parametrize("budget", [{"keep_tokens": 9}, {"max_bytes": 12_000}])
def test_caches_within_the_budget_need_no_worker(
    synced: Path, run: Runner, new_job: Make, store: Store, ledger: Ledger, budget: dict[str, int]
) -> None:
    job = new_job(sync=synced)
    memory = {**job.settings.memory, "keep_ratio": None, **budget}
    ledger.forget(job)
    ended = run(new_job(sync=synced, memory=memory))
    assert (ended.replaced, run.n_compressed) == (12, 12)
    assert all(cache.n_kept == 9 or "max_bytes" in budget for cache in store.caches()[12:])
    assert all(cache.size_bytes <= 12_000 for cache in store.caches()[12:])
    ledger.update(ledger.jobs()[0], fingerprint=store.caches()[12].fingerprint)
    assert run(new_job(sync=synced, memory=memory)).unchanged == 12
    assert run.engine is not None and run.engine.n_started == 0
    store.delete(store.caches()[-1].text_sha256)
    (synced / "0003.txt").write_text("Pier 3 is closed.")
    ended = run(new_job(sync=synced, memory=memory))
    assert (ended.replaced, ended.unchanged, run.n_compressed) == (2, 10, 2)


def test_documents_from_outside_the_folder_are_deleted_only_with_force(
    synced: Path, run: Runner, new_job: Make, store: Store, ledger: Ledger
) -> None:
    store.put_document(DocumentRecord(id="by hand", content_sha256="0" * 64))
    n_jobs = len(ledger.jobs())
    with pytest.raises(JobError, match=r"1 documents from outside this folder.*'by hand'"):
        new_job(sync=synced)
    assert len(ledger.jobs()) == n_jobs and store.has_document("by hand")
    assert run(new_job(sync=synced, force=True)).deleted == 1
    assert not store.has_document("by hand")


def test_linked_file_outside_the_folder_counts_as_part_of_it(
    synced: Path, run: Runner, new_job: Make, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.txt").write_text("Elsewhere.")
    (synced / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    assert run(new_job(sync=synced)).added == 1
    ended = run(new_job(sync=synced))
    assert (ended.added, ended.deleted) == (0, 0)


def test_empty_folder_empties_the_collection_only_with_force(
    synced: Path, run: Runner, new_job: Make, store: Store
) -> None:
    for path in synced.iterdir():
        path.unlink()
    with pytest.raises(JobError, match="would empty the collection"):
        new_job(sync=synced)
    assert run(new_job(sync=synced, force=True)).deleted == 12
    assert store.documents() == [] == store.caches()


def test_nothing_is_deleted_if_a_folder_cannot_be_listed(
    synced: Path, run: Runner, new_job: Make, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notes(synced / "deep", 1, start=50)
    run(new_job(sync=synced))
    (synced / "0001.txt").unlink()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("kv_memory.documents.loaders.os.scandir", refuse)
    ended = run(new_job(sync=synced))
    assert (ended.deleted, ended.failed) == (0, 1)
    assert len(store.documents()) == 13


def test_document_of_a_file_that_becomes_unreadable_is_kept(
    synced: Path, run: Runner, new_job: Make, store: Store
) -> None:
    (synced / "0001.txt").write_bytes(b"\0")
    ended = run(new_job(sync=synced))
    assert (ended.failed, ended.deleted, len(store.documents())) == (1, 0, 12)


def test_sync_deletes_documents_that_do_not_match_the_pattern(
    synced: Path, run: Runner, new_job: Make, store: Store
) -> None:
    (synced / "0012.md").write_text("Markdown.")
    ended = run(new_job(sync=synced, glob="*.md"))
    assert (ended.added, ended.deleted) == (1, 12)
    assert ids(store) == ["0012.md"]


def test_sync_refuses_files_of_records(notes: Path, new_job: Make) -> None:
    (notes / "a.jsonl").write_text('{"id": "a", "text": "A"}\n')
    with pytest.raises(ConfigError, match="not on the records"):
        new_job(sync=notes, glob="*.jsonl")
