"""Claims: what a worker does with the ledger. Each is one short transaction, and safe beside all others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import aliased

from kv_memory.errors import StoreError
from kv_memory.jobs.records import Task, TaskResult
from kv_memory.store import Store
from kv_memory.store.schema import JobRow, TaskRow, utc_now

__all__ = ["LEASE_S", "Claims"]

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

    def claim(self) -> Task | None:
        """The next document, now in this worker's hand; None if none is pending."""
        other = aliased(TaskRow)
        pending = (
            select(other.id)
            .where(other.job_id == self._job_id, other.state == "pending")
            .order_by(other.priority, other.id)
            .limit(1)
            # Two workers on PostgreSQL must not wait for each other's rows. SQLite has no such clause, and needs none.
            .with_for_update(skip_locked=True)
        )
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
        with self._catalog.write(alone=False) as session:
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

    def finish(self, task: Task, result: TaskResult) -> bool:
        """Say what became of a document; False if it is another worker's by now."""
        return self._end(
            task,
            state="done",
            outcome=result.outcome,
            error=None,
            n_passages=result.n_passages,
            n_tokens=result.n_tokens,
            cache_bytes=result.cache_bytes,
            full_kv_bytes=result.full_kv_bytes,
            elapsed_s=result.elapsed_s,
        )

    def fail(self, task: Task, error: dict[str, str | None], *, elapsed_s: float) -> bool:
        """Say why a document cannot be compressed; False if it is another worker's by now."""
        return self._end(task, state="failed", error=error, elapsed_s=elapsed_s)

    def release(self, task: Task) -> bool:
        """Give a document back unfinished; the attempt does not count."""
        return self._end(task, state="pending", worker=None, attempts=TaskRow.attempts - 1)

    def renew(self, task: Task) -> bool:
        """Keep a document in hand for another lease; False if it is another worker's by now."""
        return self._change(task, lease_expires_at=self._until())

    @contextmanager
    def holding(self, task: Task) -> Iterator[None]:
        """A context in which a thread renews the lease, so that a long document may take its time."""
        ended = threading.Event()
        thread = threading.Thread(target=self._renew_until, args=(task, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _renew_until(self, task: Task, ended: threading.Event) -> None:
        while not ended.wait(self._lease_s / 4):
            with suppress(StoreError):  # tried again soon; if the catalog stays away, the worker itself will notice
                if not self.renew(task):
                    return

    def _end(self, task: Task, **values: Any) -> bool:
        return self._change(task, lease_expires_at=None, **values)

    def _change(self, task: Task, **values: Any) -> bool:
        mine = update(TaskRow).where(TaskRow.id == task.id, TaskRow.worker == self._worker, TaskRow.state == "running")
        with self._catalog.write(alone=False) as session:
            result = session.execute(mine.values(**values, updated_at=utc_now()))
            assert isinstance(result, CursorResult)
            return result.rowcount > 0

    def _until(self) -> Any:
        return utc_now() + timedelta(seconds=self._lease_s)
