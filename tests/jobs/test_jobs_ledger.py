"""The ledger on both databases: each document is claimed once, leases run out, attempts are counted."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from kv_memory.errors import ConfigError, JobError
from kv_memory.jobs import JobSettings, Ledger
from kv_memory.jobs.job_records import Job, SourceItem, TaskResult
from kv_memory.jobs.job_tables import TaskRow
from kv_memory.jobs.leases import TaskQueue
from kv_memory.jobs.ledger import forget_documents
from kv_memory.store import Store
from kv_memory.store.sql.schema import utc_now

SETTINGS = JobSettings(memory={}, max_attempts=2)
ERROR: dict[str, str | None] = {"error": "EmptyDocumentError", "what": "no text", "where": "a", "next_step": None}


def items(n: int, *, start: int = 0) -> list[SourceItem]:
    return [SourceItem(document_id=f"d{i}", uri=f"file:///d{i}", size_bytes=i) for i in range(start, start + n)]


def job_of(store: Store, n: int, *, name: str = "j") -> Job:
    ledger = Ledger(store)
    job = ledger.create(name, sources={"items": []}, settings=SETTINGS)
    ledger.add(job, items(n))
    return job


def test_job_is_stored_with_its_settings(either_store: Store) -> None:
    ledger = Ledger(either_store)
    made = ledger.create("nightly", sources={"items": [{"kind": "hub", "name": "a/b"}]}, settings=SETTINGS)
    assert ledger.job("nightly") == made
    assert made.settings == SETTINGS and made.sources["items"][0]["name"] == "a/b"
    assert (made.state, made.discovered, made.collection) == ("interrupted", False, "default")
    assert [job.name for job in ledger.jobs()] == ["nightly"]
    with pytest.raises(JobError, match="already"):
        ledger.create("nightly", sources={}, settings=SETTINGS)
    with pytest.raises(JobError, match="job list"):
        ledger.job("daily")
    with pytest.raises(JobError, match="1 to 64"):
        ledger.create("", sources={}, settings=SETTINGS)
    with pytest.raises(JobError):
        Ledger(either_store.in_collection("other")).job("nightly")


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_attempts"):
        JobSettings(memory={}, max_attempts=0)
    with pytest.raises(ConfigError, match="a field name must not be empty"):
        JobSettings(memory={}, id_field="")


def test_document_moves_from_pending_to_done(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 3)
    task_queue = TaskQueue(either_store, job.id, "w")
    first = task_queue.claim()
    assert first is not None
    assert (first.document_id, first.attempts) == ("d2", 1)  # the largest first
    second = task_queue.finish(
        first, TaskResult(outcome="added", n_passages=2, n_tokens=90, cache_bytes=5, elapsed_s=0.5)
    )
    assert second is not None and second.document_id == "d1"
    third = task_queue.finish(second, TaskResult(error=ERROR))
    assert third is not None
    assert task_queue.finish(third, TaskResult(outcome="unchanged"), go_on=False) is None
    counts = ledger.counts(job)
    assert (counts.done, counts.failed, counts.open, counts.total) == (2, 1, 0, 3)
    assert (counts.added, counts.replaced, counts.unchanged) == (1, 0, 1)
    assert (counts.n_passages, counts.n_tokens, counts.cache_bytes) == (2, 90, 5)
    (failed,) = ledger.failed(job)
    assert (failed.document_id, dict(failed.error)) == ("d1", ERROR)
    assert task_queue.claim() is None


def test_adding_existing_documents_leaves_their_tasks_unchanged(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 3)
    task_queue = TaskQueue(either_store, job.id, "w")
    task = task_queue.claim()
    assert task is not None
    task_queue.finish(task, TaskResult(outcome="added"), go_on=False)
    ledger.add(job, items(4))
    counts = ledger.counts(job)
    assert (counts.done, counts.pending) == (1, 3)


def test_second_document_with_the_same_id_is_recorded_as_failed(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 1)
    again = SourceItem(document_id="d0", uri="file:///elsewhere")
    for _ in range(2):  # resuming finds it again
        ledger.add(job, [again, again])
    assert ledger.counts(job).total == 2
    (failed,) = ledger.failed(job)
    assert failed.error["error"] == "DocumentError"
    assert "file:///d0 and file:///elsewhere" in str(failed.error["where"])


def test_item_with_an_error_is_never_claimed(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 0)
    ledger.add(job, [SourceItem(document_id="x", uri="file:///x", error=ERROR)])
    assert TaskQueue(either_store, job.id, "w").claim() is None
    assert ledger.counts(job).failed == 1
    reopened = ledger.reopen(ledger.job("j"), retry_failed=True)
    assert not reopened.discovered and ledger.counts(job).total == 0  # to be looked for again


CLAIM = """
import sys
from kv_memory.jobs.leases import TaskQueue
from kv_memory.jobs.job_records import TaskResult
from kv_memory.store import Store
with Store.open(sys.argv[1], create=False) as store:
    task_queue = TaskQueue(store, int(sys.argv[2]), sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    task = task_queue.claim()
    while task is not None:
        print(task.document_id)
        task = task_queue.finish(task, TaskResult(outcome="added"))
"""


def test_concurrent_processes_and_threads_claim_each_document_once(either_store: Store) -> None:
    job = job_of(either_store, 0)
    for start in range(0, 200, 100):
        Ledger(either_store).add(job, items(100, start=start))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(either_store.path), str(job.id), f"p{n}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    found: list[str] = []

    def claim(name: str) -> None:
        task_queue = TaskQueue(either_store, job.id, name)
        while (task := task_queue.claim()) is not None:
            found.append(task.document_id)
            task_queue.finish(task, TaskResult(outcome="added"), go_on=False)

    threads = [threading.Thread(target=claim, args=(f"t{n}",)) for n in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for thread in threads:
        thread.start()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found += out.split()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(f"d{i}" for i in range(200))
    assert Ledger(either_store).counts(job).done == 200


def expire(store: Store) -> None:
    with store.catalog.write() as session:
        session.execute(update(TaskRow).values(lease_expires_at=utc_now() - timedelta(seconds=1)))


def test_document_with_an_expired_lease_goes_to_another_worker(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 1)
    slow, quick = TaskQueue(either_store, job.id, "slow"), TaskQueue(either_store, job.id, "quick")
    task = slow.claim()
    assert task is not None and quick.claim() is None
    with ledger.hold_worker_lock("slow"):
        assert ledger.free_dead(job) == 0
        expire(either_store)
        assert ledger.free_dead(job) == 1
    again = quick.claim()
    assert again is not None and again.attempts == 2
    # The slow one comes back: its result is refused, the other one's counts.
    assert not slow.renew(task) and not slow.release(task)
    slow.finish(task, TaskResult(error=ERROR), go_on=False)
    assert ledger.counts(job).running == 1
    quick.finish(again, TaskResult(outcome="added"), go_on=False)
    assert ledger.counts(job).done == 1


def test_document_fails_after_max_attempts(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 1)
    for attempt in range(2):
        task = TaskQueue(either_store, job.id, f"w{attempt}").claim()
        assert task is not None
        assert ledger.free(job, f"w{attempt}", "killed by SIGKILL") == 1
    (failed,) = ledger.failed(job)
    assert failed.attempts == 2
    assert failed.error["error"] == "WorkerDiedError" and "SIGKILL" in str(failed.error["what"])
    ledger.finish(job)
    reopened = ledger.reopen(ledger.job("j"), retry_failed=True)
    assert reopened.state == "interrupted"
    task = TaskQueue(either_store, job.id, "w").claim()
    assert task is not None and task.attempts == 1


def test_released_document_does_not_count_as_an_attempt(either_store: Store) -> None:
    job = job_of(either_store, 1)
    task_queue = TaskQueue(either_store, job.id, "w")
    for _ in range(3):
        task = task_queue.claim()
        assert task is not None and task.attempts == 1
        assert task_queue.release(task)


def test_dead_workers_are_recognised_by_their_free_locks(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 2)
    living, dead = TaskQueue(either_store, job.id, "living"), TaskQueue(either_store, job.id, "dead")
    with ledger.hold_worker_lock("living"):
        assert living.claim() is not None
        assert dead.claim() is not None
        assert ledger.free_dead(job) == 1
        counts = ledger.counts(job)
        assert (counts.running, counts.pending) == (1, 1)
    assert ledger.free_dead(job) == 1


def test_lease_is_renewed_during_a_long_document(store: Store) -> None:
    job = job_of(store, 1)
    task_queue = TaskQueue(store, job.id, "w", lease_s=0.1)

    def lease() -> datetime:
        with store.catalog.read() as session:
            until = session.scalar(select(TaskRow.lease_expires_at))
        assert until is not None
        return until

    with task_queue:
        assert task_queue.claim() is not None
        claimed = lease()
        renewed = wait_for(lease, lambda until: until > claimed)
        wait_for(lease, lambda until: until > renewed)  # again and again


def test_document_is_released_when_its_worker_breaks_off(store: Store) -> None:
    job = job_of(store, 1)
    with pytest.raises(KeyboardInterrupt), TaskQueue(store, job.id, "w") as task_queue:
        assert task_queue.claim() is not None
        raise KeyboardInterrupt
    task = TaskQueue(store, job.id, "w").claim()
    assert task is not None and task.attempts == 1


def test_document_of_a_worker_stopped_on_purpose_does_not_count_as_an_attempt(store: Store) -> None:
    job = job_of(store, 1)
    for _ in range(3):
        task = TaskQueue(store, job.id, "w").claim()
        assert task is not None and task.attempts == 1
        assert Ledger(store).free_dead(job, counted=False) == 1


def wait_for(look: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 60
    while not fits(found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def test_only_one_driver_runs_a_job_at_a_time(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 1)
    with ledger.hold_driver_lock(job):
        assert ledger.job("j").state == "running"
        with pytest.raises(JobError, match="another process"), ledger.hold_driver_lock(job):
            pass
    assert ledger.job("j").state == "interrupted"


def test_cancel_skips_pending_documents(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 3)
    task_queue = TaskQueue(either_store, job.id, "w")
    task = task_queue.claim()
    assert task is not None
    with ledger.hold_driver_lock(job):
        assert ledger.cancel(ledger.job("j")) == 2
        with pytest.raises(JobError, match="cancelled"):
            ledger.add(job, items(1, start=9))
        assert not task_queue.wanted()
        assert task_queue.finish(task, TaskResult(outcome="added")) is None
    counts = ledger.counts(job)
    assert (counts.done, counts.cancelled, counts.open) == (1, 2, 0)
    ledger.finish(job)
    assert ledger.state(job) == "cancelled"
    with pytest.raises(JobError, match="this job is already cancelled"):
        ledger.cancel(ledger.job("j"))
    with pytest.raises(JobError, match="was cancelled"):
        ledger.reopen(ledger.job("j"))


def test_forgetting_a_job_deletes_its_tasks(either_store: Store) -> None:
    ledger, job = Ledger(either_store), job_of(either_store, 3)
    ledger.forget(job)
    assert ledger.jobs() == [] and ledger.counts(job).total == 0


def test_purging_a_document_deletes_its_task(tmp_path: Path) -> None:
    # Said again here because the ledger's own code does not know of purges.
    with Store.open(tmp_path / "s") as store:
        job = job_of(store, 2)
        from kv_memory.store import DocumentRecord

        store.put_document(DocumentRecord(id="d1", content_sha256="0" * 64))
        forget_documents(store, ["d1"])
        store.purge("d1")
        assert Ledger(store).counts(job).total == 1
