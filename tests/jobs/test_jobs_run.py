"""The driver with workers that are threads: what becomes of documents, failures, cancelling, stopping, resuming."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError, JobError, StoreFullError, UnreadableDocumentError
from kv_memory.jobs import Job, Ledger
from kv_memory.jobs.discovery import Discovery
from kv_memory.jobs.driver import JobRequest, create_job, drive
from kv_memory.jobs.events import DocumentFailed, Event, JobEnded, JobStarted, Progress, RateMeter
from kv_memory.jobs.job_records import Counts, SourceItem
from kv_memory.jobs.worker import pipeline_of
from kv_memory.store import Store
from tests.jobs.conftest import write_notes
from tests.jobs.threads import Gate, ThreadEngine
from tests.reference import recorded_inputs

Make = Callable[..., Job]


class Runner:
    """Runs jobs of the store; the model is loaded once."""

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self.store = store
        self.ledger = ledger
        self.events: list[Event] = []
        self.n_compressed = 0
        self.engine: ThreadEngine | None = None

    def __call__(
        self,
        job: Job,
        *,
        on_event: Callable[[Event], None] | None = None,
        n_workers: int = 1,
        gate: Gate | None = None,
        **options: Any,
    ) -> JobEnded:
        pipeline = pipeline_of(self.store, job)
        self.engine = ThreadEngine(self.store, pipeline, n_workers=n_workers, gate=gate)

        def hear(event: Event) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        self.events.clear()
        with recorded_inputs(pipeline._compressor.backbone) as inputs:
            try:
                return drive(self.store, job, self.engine, on_event=hear, **options)
            finally:
                self.n_compressed = len(inputs)

    def heard(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def run(store: Store, ledger: Ledger) -> Runner:
    return Runner(store, ledger)


def is_at(event: Event, counts: Counts, *, done: int, in_hand: int) -> bool:
    """Whether every document is found, and so many are done and wait at a gate: where a job stays until it opens."""
    return isinstance(event, Progress) and event.discovered and (counts.done, counts.running) == (done, in_hand)


def ids(store: Store) -> list[str]:
    return [Path(document.id).name for document in store.documents()]


def test_folder_is_compressed(run: Runner, new_job: Make, notes: Path, store: Store, ledger: Ledger) -> None:
    ended = run(new_job(notes, name="first"), n_workers=2)
    assert (ended.added, ended.failed, ended.state) == (12, 0, "done")
    assert ended.n_passages == run.n_compressed == 12 and ended.n_tokens > 500
    assert 0 < ended.cache_bytes < ended.full_kv_bytes
    job = ledger.job("first")
    assert job.discovered and job.finished_at is not None
    assert len(store.documents()) == len(store.caches()) == 12
    assert {info.fingerprint for info in store.caches()} == {job.fingerprint or store.caches()[0].fingerprint}
    assert store.check().ok and store.check().unreferenced == ()
    (started,) = run.heard(JobStarted)
    assert started.sources == (str(notes),) and not started.resumed
    last = run.heard(Progress)[-1]
    assert (last.total, last.done, last.failed, last.discovered) == (12, 12, 0, True)
    assert run.events[-1] is ended


def test_documents_stored_by_a_job_can_be_queried(run: Runner, new_job: Make, notes: Path, store: Store) -> None:
    run(new_job(notes))
    with KVMemory.open(store.path) as memory:
        assert memory.settings.passage_tokens == 64  # remembered, as after `add`
        hits = memory.retrieve("Which ferry leaves from pier 7?", top_k=1)
        assert hits and hits[0].document_id.endswith("0007.txt")
        assert memory.ask("Which ferry?", top_k=1).sources


def test_unchanged_documents_are_not_compressed_again(run: Runner, new_job: Make, notes: Path) -> None:
    run(new_job(notes))
    (notes / "0003.txt").write_text("Pier 3 is closed.\n")
    ended = run(new_job(notes))
    assert (ended.added, ended.replaced, ended.unchanged) == (0, 1, 11)
    assert run.n_compressed == 1


def test_unreadable_document_fails_without_affecting_others(
    run: Runner, new_job: Make, notes: Path, ledger: Ledger
) -> None:
    (notes / "0004.txt").write_bytes(b"\0\1\2")
    (notes / "0005.txt").write_bytes(b"caf\xe9")
    (notes / "0006.txt").write_text("  \n")
    ended = run(new_job(notes, name="j"))
    assert (ended.added, ended.failed) == (9, 3)
    found = {Path(failed.document_id).name: failed.error["error"] for failed in ledger.failed(ledger.job("j"))}
    assert found == {
        "0004.txt": "UnreadableDocumentError",
        "0005.txt": "UnreadableDocumentError",
        "0006.txt": "EmptyDocumentError",
    }
    heard = run.heard(DocumentFailed)
    assert sorted(Path(event.document_id).name for event in heard) == sorted(found)
    # Retried only by choice.
    for name in found:
        (notes / name).write_text(f"Mended {name}.")
    ended = run(ledger.job("j"), resumed=True)
    assert (ended.failed, run.n_compressed, run.heard(DocumentFailed)) == (3, 0, [])
    ended = run(ledger.job("j"), resumed=True, retry_failed=True)
    assert (ended.added, ended.failed, run.n_compressed) == (12, 0, 3)


def test_retry_finds_documents_that_failed_during_discovery(
    run: Runner, new_job: Make, tmp_path: Path, ledger: Ledger
) -> None:
    write_notes(tmp_path / "notes", 2)
    (tmp_path / "notes" / "late.txt").symlink_to(tmp_path / "target.txt")
    ended = run(new_job(tmp_path / "notes", name="j"))
    assert (ended.added, ended.failed) == (2, 1)
    (tmp_path / "target.txt").write_text("Here it is.")
    ended = run(ledger.job("j"), resumed=True, retry_failed=True)
    assert (ended.added, ended.failed) == (3, 0)


def test_equal_texts_share_one_cache(run: Runner, new_job: Make, tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text("The same text everywhere.")
    ended = run(new_job(folder), n_workers=3)
    assert (ended.added, ended.n_passages, len(store.caches())) == (8, 1, 1)


def test_llama_index_nodes_are_not_split(run: Runner, new_job: Make, tmp_path: Path, store: Store) -> None:
    node = {"id_": "n", "text": "A node is a passage. " * 20, "metadata": {}, "class_name": "TextNode"}
    path = tmp_path / "docstore.json"
    path.write_text(json.dumps({"docstore/data": {"n": {"__data__": node, "__type__": "1"}}}))
    run(new_job(path))
    (passage,) = store.passages()
    with KVMemory.open(store.path) as memory:
        assert memory.reader.has(str(node["text"]))
    assert passage.document_id == "n"
    assert run(new_job(path)).unchanged == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_resumed_job_compresses_nothing_twice(
    run: Runner, new_job: Make, notes: Path, ledger: Ledger, store: Store, error: type[BaseException]
) -> None:
    def stop(event: Event) -> None:
        if is_at(event, ledger.counts(job), done=3, in_hand=1):
            raise error

    job = new_job(notes, name="j")
    with pytest.raises(error):
        run(job, on_event=stop, gate=Gate(n_pass=3))
    assert ledger.job("j").state == "interrupted"
    counts = ledger.counts(ledger.job("j"))
    assert (counts.done, counts.running, counts.pending) == (4, 0, 8)  # the one in hand is finished
    assert run.n_compressed == 4
    ended = run(ledger.job("j"), resumed=True)
    assert (ended.added, ended.unchanged, run.n_compressed) == (12, 0, 8)
    assert len(store.caches()) == 12


def test_cancelled_job_finishes_claimed_documents_and_skips_the_rest(
    run: Runner, new_job: Make, notes: Path, ledger: Ledger, store: Store
) -> None:
    gate = Gate(n_pass=3)

    def cancel(event: Event) -> None:
        if ledger.state(job) == "running" and is_at(event, ledger.counts(job), done=3, in_hand=2):
            assert ledger.cancel(ledger.job("j")) == 7
            gate.open()

    job = new_job(notes, name="j")
    ended = run(job, on_event=cancel, n_workers=2, gate=gate)
    assert (ended.state, ended.added, ended.cancelled, ended.failed) == ("cancelled", 5, 7, 0)
    assert ledger.counts(job).cancelled == 7
    assert len(store.documents()) == run.n_compressed == 5
    with pytest.raises(JobError, match="was cancelled"):
        run(ledger.job("j"), resumed=True)


def test_full_disk_stops_the_job_and_fails_no_document(
    run: Runner, new_job: Make, notes: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreFullError("no space left to write", where="blobs", next_step="Free some space.")

    job = new_job(notes, name="j")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", full)
        with pytest.raises(StoreFullError, match="no space"):
            run(job)
    counts = ledger.counts(job)
    assert (counts.failed, counts.pending) == (0, 12)
    assert run(ledger.job("j"), resumed=True).added == 12


def test_broken_source_counts_as_one_failure(
    run: Runner, new_job: Make, notes: Path, tmp_path: Path, ledger: Ledger
) -> None:
    (tmp_path / "broken.parquet").write_text("no")
    ended = run(new_job(tmp_path / "broken.parquet", notes, name="j"))
    assert (ended.added, ended.failed) == (12, 1)


@pytest.mark.parametrize(
    ("request_", "kind", "said"),
    [
        ({}, ConfigError, "must be given"),
        ({"sources": ["."], "sync": "."}, ConfigError, "must be given"),
        ({"sync": "nothing"}, ConfigError, "this is not a folder"),
        ({"sources": ["."], "force": True}, ConfigError, "--force is only valid with --sync"),
        ({"sources": ["nothing"]}, UnreadableDocumentError, "no such file"),
    ],
)
def test_invalid_requests_are_refused(
    store: Store, settings: Any, request_: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        create_job(store, JobRequest(**request_), settings)
    assert Ledger(store).jobs() == []


# -- discovery --------------------------------------------------------------------------------------------------------


STREAM = """
import gc, sys
from pathlib import Path
from kv_memory.jobs import JobSettings, Ledger
from kv_memory.jobs.discovery import Discovery
from kv_memory.jobs.job_records import SourceItem
from kv_memory.store import Store

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

sizes = {}
def items():
    for n in range(40_000):
        if n in (10_000, 39_999):
            sizes[n] = resident()
        yield SourceItem(document_id=f"/some/folder/with/a/name/document-{n}.txt", uri=f"file:///document-{n}.txt")

with Store.open(sys.argv[1]) as store:
    ledger = Ledger(store)
    job = ledger.create("j", sources={"items": []}, settings=JobSettings(memory={}))
    discovery = Discovery(store, ledger, job)
    discovery._sources.items = items
    discovery.run()
    assert discovery.error is None, discovery.error
    assert ledger.job("j").discovered and ledger.counts(job).pending == 40_000
    print((sizes[39_999] - sizes[10_000]) / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_discovery_of_40_000_documents_runs_in_constant_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "s")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10, f"grew by {done.stdout} MB"


def test_interrupted_discovery_resumes(store: Store, new_job: Make, notes: Path, ledger: Ledger) -> None:
    job = new_job(notes)
    ledger.add(job, [SourceItem(document_id=str(notes / "0000.txt"), uri=(notes / "0000.txt").as_uri())])
    discovery = Discovery(store, ledger, job)
    discovery.run()
    assert discovery.error is None
    assert ledger.counts(job).pending == 12 and ledger.job(job.name).discovered


# -- what is told ------------------------------------------------------------------------------------------------------


def test_rate_covers_the_last_minute() -> None:
    speed = RateMeter()
    assert speed.see(-1.0, Counts(pending=3)) == (0.0, 0.0, None)
    for second in range(200):
        done = second + 9 * max(0, second - 100)
        found = speed.see(float(second), Counts(running=1, pending=49, added=done, n_tokens=100 * second))
    assert found == pytest.approx((10, 100, 5))
    assert speed.see(200.0, Counts(added=1000, n_tokens=20_000))[2] == 0


def test_remaining_time_is_estimated_from_bytes_if_known() -> None:
    speed = RateMeter()
    speed.see(-99.0, Counts(pending=10))  # the model is being loaded, which is not counted
    speed.see(0.0, Counts(pending=9, running=1))
    assert speed.see(10.0, Counts(pending=9, added=1, done_bytes=1000, open_bytes=900))[2] == pytest.approx(9)


def test_events_are_json_serialisable(run: Runner, new_job: Make, notes: Path) -> None:
    run(new_job(notes))
    for event in run.events:
        json.dumps(dataclasses.asdict(event))
