"""Worker processes that are killed, and drivers that are. All of them are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import ConfigError, ModelNotFoundError, WorkerDiedError
from kv_memory.jobs import Job, JobSettings, Ledger
from kv_memory.jobs.driver import JobRequest, create_job, drive
from kv_memory.jobs.engines import n_cores, threads_of
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.jobs.events import Event, Progress, WorkerEnded
from kv_memory.store import Store
from tests.jobs.odd_driver import ODD_WORKER

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
Make = Callable[..., Job]
DRIVER = str(Path(__file__).with_name("odd_driver.py"))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where odd workers write down what they compress."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("ODD_LOG", str(path))
    return path


@pytest.fixture
def gate(log: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(log.with_name("gate"), monkeypatch)


class Gate:
    """Odd workers do two texts; all others are begun and wait until the gate is open, so that a job stays half done."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        monkeypatch.setenv("ODD_GATE", str(path))
        monkeypatch.setenv("ODD_PASS", "2")

    def open(self) -> None:
        self._path.touch()


def told(log: Path, *words: str) -> list[tuple[int, str]]:
    """Process ids and what is said, of the lines of the log with one of these words."""
    lines = (line.split() for line in log.read_text().splitlines())
    return [(int(pid), what) for word, pid, what in lines if word in words]


def waiting(log: Path) -> list[int]:
    """Processes that have begun a text and not stored it."""
    stored = {sha for _, sha in told(log, "stored")}
    return [pid for pid, sha in told(log, "begun") if sha not in stored]


def twice(log: Path) -> int:
    """How many texts were compressed once more although their cache was stored."""
    stored: set[str] = set()
    again: set[str] = set()
    for line in log.read_text().splitlines():
        word, _, sha = line.split()
        if word == "begun" and sha in stored:
            again.add(sha)
        if word == "stored":
            stored.add(sha)
    return len(again)


def assert_all_there(store: Store, n: int) -> None:
    assert len(store.documents()) == n
    texts = Counter(info.text_sha256 for info in store.caches())
    assert len(texts) == n and set(texts.values()) == {1}  # exactly one cache each
    report = store.check()
    assert not report.damaged and not report.missing and not report.unreferenced


class Killer:
    """Hears what happens to a job: kills a worker over its document, and opens the gate when the next one is there."""

    def __init__(self, engine: LocalEngine, log: Path, gate: Gate) -> None:
        self.events: list[Event] = []
        self.killed: list[int] = []
        self.pids: set[int] = set()
        self._engine = engine
        self._log = log
        self._gate = gate

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.pids |= set(self._engine.pids)
        if isinstance(event, Progress) and event.done == 2 and not self.killed and (pids := waiting(self._log)):
            os.kill(pids[0], signal.SIGKILL)
            self.killed.append(pids[0])
        if isinstance(event, WorkerEnded):
            self._gate.open()

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.mark.slow
def test_killed_worker_is_replaced(store: Store, new_job: Make, notes: Path, log: Path, gate: Gate) -> None:
    engine = LocalEngine(store.path, n_workers=2, command=ODD_WORKER)
    killer = Killer(engine, log, gate)
    ended = drive(store, new_job(notes), engine, on_event=killer)
    assert (ended.added, ended.failed) == (12, 0)
    (died,) = killer.of(WorkerEnded)
    assert died.reason == "killed by SIGKILL"
    assert len(killer.killed) == 1 and len(killer.pids) == 3
    assert max(event.n_workers for event in killer.of(Progress)) == 2
    (victim,) = killer.killed
    begun = told(log, "begun")
    (sha,) = {sha for pid, sha in begun if pid == victim} - {sha for pid, sha in told(log, "stored") if pid == victim}
    assert {pid for pid, text in begun if text == sha} > {victim}  # somebody else has done it
    assert_all_there(store, 12)
    assert twice(log) == 0
    assert engine.pids == []
    job = Ledger(store).jobs()[0]
    assert job.fingerprint == store.caches()[0].fingerprint


@pytest.mark.slow
def test_document_that_kills_workers_fails_after_max_attempts(
    store: Store, new_job: Make, notes: Path, log: Path
) -> None:
    (notes / "0005.txt").write_text("This is poison to whoever reads it. " * 9)  # the longest, so it comes first
    job = new_job(notes, name="j", max_attempts=1)
    ended = drive(store, job, LocalEngine(store.path, command=ODD_WORKER))
    assert (ended.added, ended.failed) == (11, 1)
    (failed,) = Ledger(store).failed(job)
    assert failed.attempts == 1
    assert failed.error["error"] == "WorkerDiedError" and "SIGKILL" in str(failed.error["what"])
    assert twice(log) == 0


@pytest.mark.slow
def test_killed_driver_loses_no_work_and_job_resumes(
    store: Store, new_job: Make, notes: Path, log: Path, gate: Gate
) -> None:
    job, ledger = new_job(notes, name="j"), Ledger(store)
    command = [sys.executable, DRIVER, str(store.path), "j", "1", "local"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as driver:
        wait_for(lambda: ledger.counts(job).done == 2 and bool(waiting(log)))
        driver.kill()
    assert ledger.job("j").state == "interrupted"
    gate.open()
    wait_for(lambda: bool(told(log, "ended")))  # its worker, after the document in hand
    counts = ledger.counts(job)
    assert (counts.done, counts.running, counts.pending) == (3, 0, 9)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["added"] == 12
    assert_all_there(store, 12)
    begun = [sha for _, sha in told(log, "begun")]
    assert len(begun) == len(set(begun)) == 12  # not even the one in hand


@pytest.mark.slow
def test_unknown_model_is_reported_immediately_and_leaves_no_job(
    store: Store, new_job: Make, notes: Path, settings: Any, ledger: Ledger
) -> None:
    job = new_job(notes, memory={**settings.memory, "model": str(notes / "no-such-model")})
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        drive(store, job, LocalEngine(store.path))
    assert ledger.jobs() == []


def test_job_stops_after_ten_workers_die_without_a_document(
    store: Store, new_job: Make, notes: Path, ledger: Ledger
) -> None:
    command = (sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(7)")
    with pytest.raises(WorkerDiedError, match=r"10 workers in a row died.*exit code 7: no room"):
        drive(store, new_job(notes, name="j"), LocalEngine(store.path, command=command))
    assert ledger.job("j").state == "interrupted"
    assert ledger.counts(ledger.job("j")).pending == 12


def test_worker_that_ignores_sigterm_is_killed(
    store: Store, new_job: Make, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_memory.jobs.engines.local._PATIENCE_S", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    engine = LocalEngine(store.path, command=(sys.executable, "-c", code))
    engine.poll(new_job(notes), n_open=1)
    wait_for(lambda: engine._processes[0].said.seek(0, os.SEEK_END) > 0)
    (process,) = [entry.process for entry in engine._processes]
    engine.stop()
    assert process.returncode == -signal.SIGKILL


def test_threads_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_of(n_cores() / n) for n in (1, 2, 3, 8, 99)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [threads_of(n_cores() / n) for n in (1, 2, 4)] == [3, 3, 2]


def test_no_more_workers_are_started_than_open_documents(store: Store, new_job: Make, notes: Path) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(99)")
    engine = LocalEngine(store.path, n_workers=4, command=command)
    engine.poll(new_job(notes), n_open=0)
    assert engine.n_workers() == 0
    engine.poll(new_job(notes), n_open=2)
    assert engine.n_workers() == 2
    engine.stop()
    with pytest.raises(ConfigError, match="at least 1 worker"):
        LocalEngine(store.path, n_workers=0)


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.postgres
def test_job_with_the_ledger_in_postgresql(
    tmp_path: Path, postgres_url: str, settings: JobSettings, notes: Path, log: Path, gate: Gate
) -> None:
    url = f"{postgres_url}{'&' if '?' in postgres_url else '?'}schema=jobs_{os.getpid()}"
    with Store.open(tmp_path / "shared", catalog=url) as store:
        engine = LocalEngine(store.path, command=ODD_WORKER)
        killer = Killer(engine, log, gate)
        ended = drive(store, create_job(store, JobRequest(sources=[str(notes)]), settings), engine, on_event=killer)
        assert (ended.added, ended.failed, len(killer.killed)) == (12, 0, 1)
        assert_all_there(store, 12)
        assert twice(log) == 0
