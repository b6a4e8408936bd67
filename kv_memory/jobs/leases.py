"""Leases: which workers are alive, and which task each of them holds."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.orm import Session, aliased

from kv_memory.errors import StoreError
from kv_memory.jobs.records import FailedResult, Job, Task, TaskResult
from kv_memory.jobs.schema import JobRow, TaskRow
from kv_memory.store import Store
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import utc_now

__all__ = ["LEASE_S", "LiveWorkers", "Renewer", "TaskQueue", "count_of", "locks_reach"]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def locks_reach(catalog: Catalog) -> bool:
    """Whether a held lock proves to every other process that its holder is alive; if not, only leases do."""
    return catalog.dialect == "postgresql" or hasattr(fcntl, "F_OFD_SETLK")


def count_of(result: Any) -> int:
    """Number of rows that a statement has changed."""
    assert isinstance(result, CursorResult)
    return result.rowcount


class LiveWorkers:
    """The workers of a collection's jobs; thread-safe.

    A killed worker is detected at once because its lock is released: on this machine and, with PostgreSQL, on any
    machine. A worker that hangs or is disconnected is given up when its lease expires. Process ids were rejected: they
    are reused, and containers have the same ones.

    Args:
        store: Store with the catalog that holds the ledger.
    """

    def __init__(self, store: Store) -> None:
        self._catalog = store.catalog
        self._locks_reach = locks_reach(self._catalog)

    @contextmanager
    def hold_worker_lock(self, worker: str) -> Iterator[None]:
        """Hold the lock by which other processes see that this worker is alive."""
        with self._catalog.hold(f"worker {worker}"):
            yield

    def free_dead(self, job: Job) -> int:
        """Free the tasks of dead workers and those with expired leases; return their number."""
        running = select(TaskRow.worker).where(TaskRow.job_id == job.id, TaskRow.state == "running").distinct()
        with self._catalog.read() as session:
            workers = [worker for worker in session.scalars(running) if worker is not None]
        dead = [worker for worker in workers if not self._lives(worker)]
        return sum(self.free(job, worker, "its process has died") for worker in dead) + self.expire(job)

    def free(self, job: Job, worker: str, reason: str) -> int:
        """Free the tasks of a dead worker and return their number; tasks with too many attempts fail."""
        with self._catalog.write(alone=False) as session:
            return self._give_up(session, job, TaskRow.worker == worker, reason)

    def release_all(self, job: Job, prefix: str) -> int:
        """Free the tasks of workers stopped on purpose, without counting the attempt; return their number.

        The workers are selected by the prefix of their names.
        """
        # Not LIKE, where an underscore in a host name would match any character.
        whose = func.substr(TaskRow.worker, 1, len(prefix)) == prefix
        held = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state == "running", whose)
        left = {"worker": None, "lease_expires_at": None, "updated_at": utc_now()}
        with self._catalog.write(alone=False) as session:
            again = held.values(state="pending", attempts=TaskRow.attempts - 1, **left)
            return count_of(session.execute(again.execution_options(synchronize_session=False)))

    def expire(self, job: Job) -> int:
        """Free the tasks with expired leases; return their number."""
        expired = TaskRow.lease_expires_at < utc_now()
        due = select(TaskRow.id).where(TaskRow.job_id == job.id, TaskRow.state == "running", expired).limit(1)
        with self._catalog.read() as session:
            if session.scalar(due) is None:
                return 0
        with self._catalog.write(alone=False) as session:
            return self._give_up(session, job, expired, "its lease has expired")

    def _give_up(self, session: Session, job: Job, whose: Any, reason: str) -> int:
        held = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state == "running", whose)
        error = {
            "error": "WorkerDiedError",
            "what": f"every worker that claimed this document died; the last one: {reason}",
            "where": None,
            "next_step": "It may be too large for memory, or crash the model. Leave it out, or try again with "
            f"`kv-memory job resume {job.name} --retry-failed`.",
        }
        now, most = utc_now(), job.settings.max_attempts
        left = {"worker": None, "lease_expires_at": None, "updated_at": now}
        failed = held.where(TaskRow.attempts >= most).values(state="failed", error=error, **left)
        again = held.where(TaskRow.attempts < most).values(state="pending", **left)
        return count_of(session.execute(failed)) + count_of(session.execute(again))

    def _lives(self, worker: str) -> bool:
        if not self._locks_reach:
            return True  # only an expired lease shows that it is dead
        with self._catalog.hold(f"worker {worker}", wait=False) as had:
            return not had


LEASE_S = 60.0  # for this long a disconnected worker keeps a document from the others


class TaskQueue:
    """The tasks of one job, as claimed by one worker.

    A lease states until when a worker holds a document; a thread renews it four times as often as needed. Once it has
    expired, `LiveWorkers.expire` frees the document for another worker, and the previous worker's result is refused.
    Leases are compared across machines, so their clocks must differ by less than a lease.

    Args:
        store: Store with the catalog that holds the ledger.
        job_id: Id of the job.
        worker: Name of the worker.
        lease_s: Duration of a claim in seconds, unless it is renewed.
    """

    def __init__(self, store: Store, job_id: int, worker: str, *, lease_s: float = LEASE_S) -> None:
        self._catalog = store.catalog
        self._job_id = job_id
        self._worker = worker
        self._lease_s = lease_s

    def claim(self, number: int | None = None) -> Task | None:
        """Claim the next pending document; return None if no document is pending.

        Args:
            number: Id of a task chosen in advance. The result is then None if another worker has claimed it first.
        """
        with self._catalog.write(alone=False) as session:
            return self._claim(session, number)

    def _claim(self, session: Session, number: int | None = None) -> Task | None:
        other = aliased(TaskRow)
        pending = (
            select(other.id)
            .where(other.job_id == self._job_id, other.state == "pending")
            .order_by(other.priority, other.id)
            .limit(1)
            # Workers on PostgreSQL must not wait for each other's rows. SQLite lacks this clause and does not need it.
            .with_for_update(skip_locked=True)
        )
        if number is not None:
            pending = pending.where(other.id == number)
        claimed = (
            update(TaskRow)
            .where(TaskRow.id == pending.scalar_subquery())
            .values(
                state="running",
                worker=self._worker,
                attempts=TaskRow.attempts + 1,
                lease_expires_at=self._until(),
                updated_at=utc_now(),
            )
            .returning(TaskRow.id, TaskRow.job_id, TaskRow.document_id, TaskRow.uri, TaskRow.attempts)
            .execution_options(synchronize_session=False)
        )
        row = session.execute(claimed).one_or_none()
        return None if row is None else Task(**row._mapping)

    def pending(self) -> bool:
        """Whether a document is pending; cheaper than a `claim` that finds nothing, which waits for other writers."""
        one = select(TaskRow.id).where(TaskRow.job_id == self._job_id, TaskRow.state == "pending").limit(1)
        with self._catalog.read() as session:
            return session.scalar(one) is not None

    def wanted(self) -> bool:
        """Whether the job is still running."""
        with self._catalog.read() as session:
            return session.scalar(select(JobRow.state).where(JobRow.id == self._job_id)) == "running"

    def finish(self, task: Task, result: TaskResult | FailedResult, *, go_on: bool = True) -> Task | None:
        """Record the result of a document and claim the next one, in one transaction: each costs a sync to disk.

        The result is dropped if this worker no longer holds the document.

        Args:
            task: Task from `claim` or from an earlier `finish`.
            result: Result or error of the document.
            go_on: True to claim the next document.
        """
        error = result.error if isinstance(result, FailedResult) else None
        told = dataclasses.asdict(result) if isinstance(result, TaskResult) else {"elapsed_s": result.elapsed_s}
        state = "done" if error is None else "failed"
        with self._catalog.write(alone=False) as session:
            self._change(session, task, lease_expires_at=None, state=state, error=error, **told)
            return self._claim(session) if go_on else None

    def release(self, task: Task) -> bool:
        """Release an unfinished document without counting the attempt; False if this worker no longer holds it."""
        with self._catalog.write(alone=False) as session:
            return self._change(
                session,
                task,
                lease_expires_at=None,
                state="pending",
                worker=None,
                attempts=TaskRow.attempts - 1,
            )

    def renew(self, task: Task) -> bool:
        """Hold a document for another lease; False if this worker no longer holds it."""
        with self._catalog.write(alone=False) as session:
            return self._change(session, task, lease_expires_at=self._until())

    def _change(self, session: Session, task: Task, **values: Any) -> bool:
        mine = update(TaskRow).where(TaskRow.id == task.id, TaskRow.worker == self._worker, TaskRow.state == "running")
        result = session.execute(
            mine.values(**values, updated_at=utc_now()).execution_options(synchronize_session=False)
        )
        assert isinstance(result, CursorResult)
        return result.rowcount > 0

    def _until(self) -> datetime:
        return utc_now() + timedelta(seconds=self._lease_s)


class Renewer(threading.Thread):
    """A thread that renews the lease of the current document, so that a long document may take longer than a lease.

    Attributes:
        task: Task in progress; None between tasks.
    """

    def __init__(self, task_queue: TaskQueue, *, lease_s: float) -> None:
        super().__init__(name="lease", daemon=True)
        self.task: Task | None = None
        self._task_queue = task_queue
        self._pause_s = lease_s / 4
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        while not self._ended.wait(self._pause_s):
            if (task := self.task) is not None:
                with suppress(StoreError):  # retried soon; if the catalog stays unavailable, the worker notices
                    self._task_queue.renew(task)
