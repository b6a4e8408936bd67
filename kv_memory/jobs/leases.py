"""Leases: which workers are alive, and which task each of them holds."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import CursorResult, ScalarSelect, Select, and_, select, update
from sqlalchemy.orm import Session, aliased

from kv_memory.errors import StoreError
from kv_memory.jobs.job_records import Job, Task, TaskResult
from kv_memory.jobs.job_tables import JobRow, TaskRow
from kv_memory.store import Store
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import utc_now

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEASE_S = 60.0  # for this long a disconnected worker keeps a document from the others


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

    def hold_worker_lock(self, worker: str) -> AbstractContextManager[bool]:
        """Hold the lock by which other processes see that this worker is alive."""
        return self._catalog.hold(f"worker {worker}")

    def free_dead(self, job: Job, *, counted: bool = True) -> int:
        """Free the tasks of dead workers and those with expired leases; return their number.

        Args:
            job: Job of the tasks.
            counted: False not to count the attempt, because the workers were stopped on purpose.
        """
        held = select(TaskRow.worker, TaskRow.lease_expires_at).where(
            TaskRow.job_id == job.id, TaskRow.state == "running"
        )
        with self._catalog.read() as session:
            rows = session.execute(held).all()
        expired = TaskRow.lease_expires_at < utc_now()
        n_freed = 0
        for worker, until in rows:
            mine = TaskRow.worker == worker
            if until is not None and until < utc_now():
                n_freed += self._give_up(job, and_(mine, expired), "its lease has expired", counted=counted)
            elif not self._lives(str(worker)):
                n_freed += self._give_up(job, mine, "its process has died", counted=counted)
        return n_freed

    def free(self, job: Job, worker: str, reason: str) -> int:
        """Free the tasks of a dead worker and return their number; tasks with too many attempts fail."""
        return self._give_up(job, TaskRow.worker == worker, reason)

    def _give_up(self, job: Job, whose: Any, reason: str, *, counted: bool = True) -> int:
        held = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state == "running", whose)
        held = held.execution_options(synchronize_session=False)
        left = {"worker": None, "lease_expires_at": None, "updated_at": utc_now()}
        pending = held.values(state="pending", attempts=TaskRow.attempts - (0 if counted else 1), **left)
        error = {
            "error": "WorkerDiedError",
            "what": f"every worker that claimed this document died; the last one: {reason}",
            "where": None,
            "next_step": "It may be too large for memory, or crash the model. Leave it out, or try again with "
            f"`kv-memory job resume {job.name} --retry-failed`.",
        }
        failed = held.where(TaskRow.attempts >= job.settings.max_attempts).values(state="failed", error=error, **left)
        with self._catalog.write(alone=False) as session:
            n_failed = count_of(session.execute(failed)) if counted else 0
            return n_failed + count_of(session.execute(pending))

    def _lives(self, worker: str) -> bool:
        if not locks_reach(self._catalog):
            return True  # only an expired lease shows that it is dead
        with self._catalog.hold(f"worker {worker}", wait=False) as had:
            return not had


class TaskQueue:
    """The tasks of one job, as claimed by one worker, one at a time.

    A lease states until when a worker holds a document. In a `with` statement, a thread renews it four times as often
    as needed, so that a document may take longer than a lease; leaving with an exception releases the document. Once
    the lease has expired, `LiveWorkers.free_dead` frees the document for another worker, and the previous worker's
    result is refused. Leases are compared across machines, so their clocks must differ by less than a lease.

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
        self._held: Task | None = None
        self._left = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._renewer.join()
        if self._held is not None:
            with suppress(StoreError):  # otherwise its lease expires
                self.release(self._held)

    def claim(self) -> Task | None:
        """Claim the next pending document; return None if no document is pending."""
        with self._catalog.read() as session:  # a write that finds nothing would wait for other writers
            if session.scalar(self._pending()) is None:
                return None
        with self._catalog.write(alone=False) as session:
            self._held = self._claim(session)
        return self._held

    def wanted(self) -> bool:
        """Whether the job is still running."""
        with self._catalog.read() as session:
            return session.scalar(select(JobRow.state).where(JobRow.id == self._job_id)) == "running"

    def finish(self, task: Task, result: TaskResult, *, go_on: bool = True) -> Task | None:
        """Record the result of a document and claim the next one, in one transaction: each costs a sync to disk.

        The result is dropped if this worker no longer holds the document.

        Args:
            task: Task from `claim` or from an earlier `finish`.
            result: Result of the document.
            go_on: True to claim the next document.
        """
        state = "done" if result.error is None else "failed"
        with self._catalog.write(alone=False) as session:
            self._change(session, task, state=state, lease_expires_at=None, **dataclasses.asdict(result))
            following = self._claim(session) if go_on else None
        self._held = following
        return following

    def release(self, task: Task) -> bool:
        """Release an unfinished document without counting the attempt; False if this worker no longer holds it."""
        left = {"worker": None, "lease_expires_at": None, "attempts": TaskRow.attempts - 1}
        self._held = None
        with self._catalog.write(alone=False) as session:
            return self._change(session, task, state="pending", **left)

    def renew(self, task: Task) -> bool:
        """Hold a document for another lease; False if this worker no longer holds it."""
        with self._catalog.write(alone=False) as session:
            return self._change(session, task, lease_expires_at=self._until())

    def _renew(self) -> None:
        while not self._left.wait(self._lease_s / 4):
            if (task := self._held) is not None:
                with suppress(StoreError):  # retried soon; if the catalog stays unavailable, the worker notices
                    self.renew(task)

    def _pending(self) -> Select[int]:
        other = aliased(TaskRow)
        return (
            select(other.id)
            .where(other.job_id == self._job_id, other.state == "pending")
            .order_by(other.priority, other.id)
            .limit(1)
        )

    def _claim(self, session: Session) -> Task | None:
        # Workers on PostgreSQL must not wait for each other's rows. SQLite lacks this clause and does not need it.
        following: ScalarSelect[int] = self._pending().with_for_update(skip_locked=True).scalar_subquery()
        claimed = (
            update(TaskRow)
            .where(TaskRow.id == following)
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

    def _change(self, session: Session, task: Task, **values: Any) -> bool:
        mine = update(TaskRow).where(TaskRow.id == task.id, TaskRow.worker == self._worker, TaskRow.state == "running")
        change = mine.values(**values, updated_at=utc_now()).execution_options(synchronize_session=False)
        return count_of(session.execute(change)) > 0

    def _until(self) -> datetime:
        return utc_now() + timedelta(seconds=self._lease_s)
