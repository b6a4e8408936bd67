"""Leases: which task a worker holds, and until when."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import CursorResult, Select, select, update
from sqlalchemy.orm import Session

from kv_memory.errors import StoreError
from kv_memory.jobs.job_records import Task, TaskResult
from kv_memory.jobs.job_tables import JobRow, TaskRow
from kv_memory.store import Store
from kv_memory.store.sql.schema import utc_now

LEASE_S = 60.0  # for this long a disconnected worker keeps a document from the others


def count_of(result: Any) -> int:
    """Number of rows that a statement has changed."""
    assert isinstance(result, CursorResult)
    return result.rowcount


class TaskQueue:
    """The tasks of one job, as claimed by one worker, one at a time.

    A lease states until when a worker holds a document. In a `with` statement, a thread renews it four times as often
    as needed, so that a document may take longer than a lease; leaving with an exception releases the document. Once
    the lease has expired, `Ledger.free_dead` frees the document for another worker, and the previous worker's
    result is refused. Leases are compared across machines, so their clocks must differ by less than a lease.
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
        """Record the result of a document and, with `go_on`, claim the next one.

        Both happen in one transaction, because each costs a sync to disk. The result is dropped if this worker no
        longer holds the document.
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

    def _pending(self) -> Select[TaskRow]:
        pending = select(TaskRow).where(TaskRow.job_id == self._job_id, TaskRow.state == "pending")
        return pending.order_by(TaskRow.priority, TaskRow.id).limit(1)

    def _claim(self, session: Session) -> Task | None:
        # Workers on PostgreSQL must not wait for each other's rows. SQLite lacks this clause and does not need it.
        row = session.scalar(self._pending().with_for_update(skip_locked=True))
        if row is None:
            return None
        row.state, row.worker, row.lease_expires_at = "running", self._worker, self._until()
        row.attempts += 1
        return Task(id=row.id, document_id=row.document_id, uri=row.uri, attempts=row.attempts)

    def _change(self, session: Session, task: Task, **values: Any) -> bool:
        mine = update(TaskRow).where(TaskRow.id == task.id, TaskRow.worker == self._worker, TaskRow.state == "running")
        change = mine.values(**values).execution_options(synchronize_session=False)
        return count_of(session.execute(change)) > 0

    def _until(self) -> datetime:
        return utc_now() + timedelta(seconds=self._lease_s)
