"""Leases: which workers live, and which task each of them holds."""

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
from kv_memory.store import Store
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import JobRow, TaskRow, utc_now

__all__ = ["LEASE_S", "Claims", "Renewer", "Roll", "count_of", "locks_reach"]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def locks_reach(catalog: Catalog) -> bool:
    """Whether a name that a process holds tells all others that it lives; elsewhere leases alone do."""
    return catalog.dialect == "postgresql" or hasattr(fcntl, "F_OFD_SETLK")


def count_of(result: Any) -> int:
    """How many rows a statement has changed."""
    assert isinstance(result, CursorResult)
    return result.rowcount


class Roll:
    """The workers of a collection's jobs. Thread-safe.

    A worker that is killed is known dead at once by the name it no longer holds, on this machine and, with PostgreSQL,
    on any. One that hangs, or that is cut off, is given up when its lease has expired. Process ids were rejected: they
    are used again, and containers have the same ones.

    Args:
        store: Whose catalog holds the ledger.
    """

    def __init__(self, store: Store) -> None:
        self._catalog = store.catalog
        self._locks_reach = locks_reach(self._catalog)

    @contextmanager
    def living(self, worker: str) -> Iterator[None]:
        """A context in which others can see that this worker lives."""
        with self._catalog.hold(f"worker {worker}"):
            yield

    def free_dead(self, job: Job) -> int:
        """Free the tasks of workers that do not live any more, and those with expired leases; returns how many."""
        running = select(TaskRow.worker).where(TaskRow.job_id == job.id, TaskRow.state == "running").distinct()
        with self._catalog.read() as session:
            workers = [worker for worker in session.scalars(running) if worker is not None]
        dead = [worker for worker in workers if not self._lives(worker)]
        return sum(self.free(job, worker, "its process is gone") for worker in dead) + self.expire(job)

    def free(self, job: Job, worker: str, reason: str) -> int:
        """Free the tasks of a worker that is known dead; returns how many. Too many attempts make them failed."""
        with self._catalog.write(alone=False) as session:
            return self._give_up(session, job, TaskRow.worker == worker, reason)

    def release_all(self, job: Job, prefix: str) -> int:
        """Free the tasks of workers that were stopped on purpose, by how their names begin; no attempt is counted."""
        # Not LIKE, to which an underscore in the name of a machine would be any letter.
        whose = func.substr(TaskRow.worker, 1, len(prefix)) == prefix
        held = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state == "running", whose)
        left = {"worker": None, "lease_expires_at": None, "updated_at": utc_now()}
        with self._catalog.write(alone=False) as session:
            again = held.values(state="pending", attempts=TaskRow.attempts - 1, **left)
            return count_of(session.execute(again.execution_options(synchronize_session=False)))

    def expire(self, job: Job) -> int:
        """Free the tasks whose workers have not renewed their leases; returns how many."""
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
            "what": f"every worker that had this document died, at last: {reason}",
            "where": None,
            "next_step": "It may be too large for the memory, or crash the model. Leave it out, or try again with "
            f"`kv-memory job resume {job.name} --retry-failed`.",
        }
        now, most = utc_now(), job.settings.max_attempts
        left = {"worker": None, "lease_expires_at": None, "updated_at": now}
        failed = held.where(TaskRow.attempts >= most).values(state="failed", error=error, **left)
        again = held.where(TaskRow.attempts < most).values(state="pending", **left)
        return count_of(session.execute(failed)) + count_of(session.execute(again))

    def _lives(self, worker: str) -> bool:
        if not self._locks_reach:
            return True  # its lease will tell
        with self._catalog.hold(f"worker {worker}", wait=False) as had:
            return not had


LEASE_S = 60.0  # a worker that is cut off keeps a document for so long from the others


class Claims:
    """The tasks of one job, for one worker.

    A lease says until when a document is in hand; a thread renews it four times as often as needed. Whoever finds it
    expired may take the document over, and the one who had it finds its result refused. That leases are compared
    across machines asks for clocks that differ by less than a lease.

    Args:
        store: Whose catalog holds the ledger.
        job_id: The job.
        worker: Names the worker.
        lease_s: Until when a claim holds unless it is renewed, in seconds from now.
    """

    def __init__(self, store: Store, job_id: int, worker: str, *, lease_s: float = LEASE_S) -> None:
        self._catalog = store.catalog
        self._job_id = job_id
        self._worker = worker
        self._lease_s = lease_s

    def claim(self, number: int | None = None) -> Task | None:
        """The next document, now in this worker's hand; None if none is pending.

        Args:
            number: Of its task, where it is chosen already; None then means that somebody else was quicker.
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
            # Two workers on PostgreSQL must not wait for each other's rows. SQLite has no such clause, and needs none.
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
        """Whether there is something to claim: cheaper than to try in vain, which waits for other writers."""
        one = select(TaskRow.id).where(TaskRow.job_id == self._job_id, TaskRow.state == "pending").limit(1)
        with self._catalog.read() as session:
            return session.scalar(one) is not None

    def wanted(self) -> bool:
        """Whether the job goes on."""
        with self._catalog.read() as session:
            return session.scalar(select(JobRow.state).where(JobRow.id == self._job_id)) == "running"

    def finish(self, task: Task, result: TaskResult | FailedResult, *, go_on: bool = True) -> Task | None:
        """Say what became of a document, and claim the next one, in one transaction: each costs a sync to disk.

        Nothing is said of a document that is another worker's by now.

        Args:
            task: From `claim` or from here.
            result: What became of it.
            go_on: Claim the next one.
        """
        error = result.error if isinstance(result, FailedResult) else None
        told = dataclasses.asdict(result) if isinstance(result, TaskResult) else {"elapsed_s": result.elapsed_s}
        state = "done" if error is None else "failed"
        with self._catalog.write(alone=False) as session:
            self._change(session, task, lease_expires_at=None, state=state, error=error, **told)
            return self._claim(session) if go_on else None

    def release(self, task: Task) -> bool:
        """Give a document back unfinished; the attempt does not count."""
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
        """Keep a document in hand for another lease; False if it is another worker's by now."""
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
    """A thread that renews the lease of the document in hand, so that a long one may take its time.

    Attributes:
        task: The one in hand; None in between.
    """

    def __init__(self, claims: Claims, *, lease_s: float) -> None:
        super().__init__(name="lease", daemon=True)
        self.task: Task | None = None
        self._claims = claims
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
                with suppress(StoreError):  # tried again soon; if the catalog stays away, the worker itself notices
                    self._claims.renew(task)
