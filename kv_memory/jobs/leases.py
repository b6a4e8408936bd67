"""The roll of workers: who lives, and what becomes of the documents of those who do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.orm import Session

from kv_memory.jobs.records import Job
from kv_memory.store import Store
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import TaskRow, utc_now

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Roll", "count_of", "locks_reach"]


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
