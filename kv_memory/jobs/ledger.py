"""The ledger: a collection's jobs, their documents and their progress, all in SQL.

It is the checkpoint: a finished document is never processed again, whichever process dies. Workers claim tasks from it,
see `leases.TaskQueue`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from sqlalchemy import Select, and_, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import DocumentError, JobError, WorkerDiedError
from kv_memory.jobs.job_records import Counts, FailedTask, Job, JobSettings, NotedTask, SourceItem, Work
from kv_memory.jobs.job_tables import JobRow, TaskRow
from kv_memory.jobs.leases import count_of
from kv_memory.model.embedded import recorded_settings
from kv_memory.store import Store
from kv_memory.store.sql.catalog import batches
from kv_memory.store.sql.schema import FingerprintRow, utc_now

_Shown = TypeVar("_Shown", FailedTask, NotedTask)


class Ledger:
    """The jobs of one collection, in the catalog of its store; thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._catalog = store.catalog

    # jobs

    def create(self, name: str, *, sources: Mapping[str, Any], settings: JobSettings) -> Job:
        """Create a job without tasks; a JobError if the name is taken or invalid."""
        if not 0 < len(name) <= 64 or not name.isprintable():
            raise JobError(
                f"a job name must have 1 to 64 printable characters, got {name!r}",
                where="name",
                next_step="Choose another --name, or leave it out: the job is then named after the time.",
            )
        row = JobRow(
            name=name,
            collection_id=self._store.collection_id,
            state="running",
            sources=dict(sources),
            settings=dataclasses.asdict(settings),
        )
        with self._catalog.write() as session:
            if session.scalar(select(JobRow.id).where(JobRow.name == name)) is not None:
                raise JobError(
                    f"the store already has a job {name!r}",
                    where=name,
                    next_step=f"Resume it with `kv-memory job resume {name}`, or choose another name.",
                )
            session.add(row)
        return self.job(name)

    def job(self, name: str) -> Job:
        """Look up a job by its name; a JobError if the collection has no job of this name."""
        with self._catalog.read() as session:
            row = session.scalar(self._jobs().where(JobRow.name == name))
        if row is None:
            raise JobError(
                f"no job {name!r} in this collection", where=name, next_step="List them with `kv-memory job list`."
            )
        return self._record(row)

    def jobs(self) -> list[Job]:
        """All jobs of the collection, the newest first."""
        with self._catalog.read() as session:
            rows = session.scalars(self._jobs().order_by(JobRow.id.desc())).all()
        return [self._record(row) for row in rows]

    def state(self, job: Job) -> str:
        """The stored state: `running`, `done` or `cancelled`; `running` whether or not a process drives the job."""
        with self._catalog.read() as session:
            return session.scalar(select(JobRow.state).where(JobRow.id == job.id)) or "cancelled"

    @contextmanager
    def hold_driver_lock(self, job: Job) -> Iterator[None]:
        """Hold the lock that lets nobody else drive the job; a JobError if another process holds it."""
        with self._catalog.hold(f"job {job.id}", wait=False) as had:
            if not had:
                raise JobError(
                    "another process is running this job",
                    where=job.name,
                    next_step=f"Watch it with `kv-memory job show {job.name}`, or stop that process first.",
                )
            yield

    def update(self, job: Job, **values: Any) -> None:
        """Set fields of the job, such as `fingerprint`, `discovered` or `n_deleted`."""
        with self._catalog.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job.id).values(**values))

    def known_fingerprint(self, memory: Mapping[str, Any]) -> Fingerprint | None:
        """Fingerprint of caches with these settings; None if no job of the collection has determined it yet."""
        digests = (job.fingerprint for job in self.jobs() if job.fingerprint and job.settings.memory == memory)
        with self._catalog.read() as session:
            row = session.get(FingerprintRow, next(digests, None) or "")
            return None if row is None else Fingerprint.from_json(row.json)

    def finish(self, job: Job) -> None:
        """Mark the job as done, unless it was cancelled meanwhile."""
        with self._catalog.write() as session:
            done = update(JobRow).where(JobRow.id == job.id, JobRow.state == "running")
            session.execute(done.values(state="done", finished_at=utc_now()))

    def reopen(self, job: Job, *, retry_failed: bool = False) -> Job:
        """Set a job to running again; tasks held by dead workers are left to `free_dead`.

        With `retry_failed`, failed documents are retried, and the discovery is repeated if it found broken ones.

        Raises:
            JobError: The job was cancelled.
        """
        if job.state == "cancelled":
            raise JobError("this job was cancelled", where=job.name, next_step=_ANEW)
        with self._catalog.write() as session:
            again: dict[str, Any] = {"state": "running", "finished_at": None}
            if retry_failed:
                failed = (TaskRow.job_id == job.id) & (TaskRow.state == "failed")
                # Without attempts: discovery found the error before any worker claimed the document.
                if count_of(session.execute(delete(TaskRow).where(failed, TaskRow.attempts == 0))):
                    again["discovered"] = False
                retried = update(TaskRow).where(failed)
                session.execute(retried.values(state="pending", attempts=0, error=None, worker=None))
            session.execute(update(JobRow).where(JobRow.id == job.id).values(**again))
        return self.job(job.name)

    def cancel(self, job: Job) -> int:
        """Cancel a job and return the number of documents left out.

        Workers of a running job finish their current documents. An interrupted job has no workers, so its documents in
        progress are left out too.

        Raises:
            JobError: The job is neither running nor interrupted.
        """
        if job.state not in {"running", "interrupted"}:
            raise JobError(
                f"this job is already {job.state}, so there is nothing to cancel",
                where=job.name,
                next_step="List the running jobs with `kv-memory job list`.",
            )
        with self._catalog.write() as session:
            states = ["pending"] if job.state == "running" else _OPEN
            left = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state.in_(states))
            result = session.execute(left.values(state="cancelled", worker=None))
            ended = update(JobRow).where(JobRow.id == job.id, JobRow.state == "running")
            session.execute(ended.values(state="cancelled", finished_at=utc_now()))
            return count_of(result)

    def forget(self, job: Job) -> None:
        """Delete a job with its tasks."""
        with self._catalog.write() as session:
            session.execute(delete(JobRow).where(JobRow.id == job.id))

    # tasks

    def add(self, job: Job, items: Sequence[SourceItem]) -> None:
        """Insert tasks for at most a few hundred items; existing tasks stay unchanged.

        A second document with the same id, from another place, becomes a failed task of its own. Dropping it would lose
        its text silently.

        Raises:
            JobError: The job was cancelled.
        """
        if not items:
            return
        with self._catalog.write() as session:
            if session.scalar(select(JobRow.state).where(JobRow.id == job.id)) != "running":
                raise JobError("this job was cancelled", where=job.name, next_step=_ANEW)
            self._insert(session, job, items)
            there = select(TaskRow.document_id, TaskRow.uri).where(
                TaskRow.job_id == job.id, TaskRow.document_id.in_({item.document_id for item in items})
            )
            uris = {document_id: uri for document_id, uri in session.execute(there)}
            again = [item for item in items if uris[item.document_id] != item.uri]
            self._insert(session, job, [_duplicate(item, uris[item.document_id]) for item in again])

    def _insert(self, session: Session, job: Job, items: Sequence[SourceItem]) -> None:
        if not items:
            return
        rows = [
            {
                "job_id": job.id,
                "document_id": item.document_id,
                "uri": item.uri,
                "priority": -item.size_bytes,
                "state": "pending" if item.error is None else "failed",
                "error": item.error,
            }
            for item in items
        ]
        insert = postgresql.insert if self._catalog.dialect == "postgresql" else sqlite.insert
        session.execute(insert(TaskRow).on_conflict_do_nothing(index_elements=["job_id", "document_id"]), rows)

    def counts(self, job: Job) -> Counts:
        """Progress of the job."""
        sums = [func.coalesce(func.sum(getattr(TaskRow, name)), 0) for name in (*_WORK, "priority")]
        kinds = select(TaskRow.state, TaskRow.outcome, func.count(), func.count(TaskRow.notes), *sums).where(
            TaskRow.job_id == job.id
        )
        with self._catalog.read() as session:
            rows = session.execute(kinds.group_by(TaskRow.state, TaskRow.outcome)).all()
        totals = Counter[str]()
        for state, outcome, n, n_noted, *work, priority in rows:
            totals.update(dict(zip(_WORK, map(int, work), strict=True)))
            totals[outcome if state == "done" else state] += n
            totals["noted"] += n_noted
            if state != "cancelled":
                totals["open_bytes" if state in _OPEN else "done_bytes"] -= int(priority)
        return Counts(**totals)

    def failed(self, job: Job, *, limit: int | None = None) -> list[FailedTask]:
        """Failed documents in the order of their tasks."""
        return self._tasks(FailedTask, job, TaskRow.state == "failed", limit)

    def noted(self, job: Job, *, limit: int | None = None) -> list[NotedTask]:
        """Stored documents with remarks, in the order of their tasks."""
        return self._tasks(NotedTask, job, TaskRow.notes.is_not(None), limit)

    def _tasks(self, kind: type[_Shown], job: Job, which: Any, limit: int | None) -> list[_Shown]:
        names = [field.name for field in dataclasses.fields(kind)]
        wanted = select(*(getattr(TaskRow, name) for name in names)).order_by(TaskRow.id).limit(limit)
        with self._catalog.read() as session:
            rows = session.execute(wanted.where(TaskRow.job_id == job.id, which)).all()
        return [kind(**row._mapping) for row in rows]

    # workers

    def hold_worker_lock(self, worker: str) -> AbstractContextManager[bool]:
        """Hold the lock by which other processes see that this worker is alive.

        It is released when the process is killed: the driver detects that at once, and with PostgreSQL on any machine.
        Process ids were rejected: they are reused, and containers have the same ones.
        """
        return self._catalog.hold(f"worker {worker}")

    def free_dead(self, job: Job, *, counted: bool = True) -> int:
        """Free the tasks of dead workers and those with expired leases; return their number.

        Without `counted`, the attempt does not count: the workers were stopped on purpose.
        """
        held = select(TaskRow.worker, TaskRow.lease_expires_at)
        with self._catalog.read() as session:
            rows = session.execute(held.where(TaskRow.job_id == job.id, TaskRow.state == "running")).all()
        n_freed = 0
        for worker, until in rows:
            mine = TaskRow.worker == worker
            if until is not None and until < utc_now():
                mine = and_(mine, TaskRow.lease_expires_at < utc_now())
                n_freed += self._free(job, mine, "its lease has expired", counted=counted)
                continue
            with self._catalog.hold(f"worker {worker}", wait=False) as is_dead:
                pass
            if is_dead:
                n_freed += self._free(job, mine, "its process has died", counted=counted)
        return n_freed

    def free(self, job: Job, worker: str, reason: str) -> int:
        """Free the tasks of a dead worker and return their number; tasks with too many attempts fail."""
        return self._free(job, TaskRow.worker == worker, reason)

    def _free(self, job: Job, whose: Any, reason: str, *, counted: bool = True) -> int:
        held = update(TaskRow).where(TaskRow.job_id == job.id, TaskRow.state == "running", whose)
        held = held.values(worker=None, lease_expires_at=None).execution_options(synchronize_session=False)
        error = WorkerDiedError(
            f"every worker that claimed this document died; the last one: {reason}",
            next_step="It may be too large for memory, or crash the model. Leave it out, or try again with "
            f"`kv-memory job resume {job.name} --retry-failed`.",
        )
        failed = held.where(TaskRow.attempts >= job.settings.max_attempts).values(state="failed", error=error.to_dict())
        pending = held.values(state="pending", attempts=TaskRow.attempts - (0 if counted else 1))
        with self._catalog.write(alone=False) as session:
            n_failed = count_of(session.execute(failed)) if counted else 0
            return n_failed + count_of(session.execute(pending))

    # rows

    def _jobs(self) -> Select[JobRow]:
        return select(JobRow).where(JobRow.collection_id == self._store.collection_id)

    def _record(self, row: JobRow) -> Job:
        values = {name: getattr(row, name) for name in _COLUMNS}
        values["settings"] = JobSettings(**{**row.settings, "memory": recorded_settings(row.settings["memory"])})
        if row.state == "running":
            with self._catalog.hold(f"job {row.id}", wait=False) as had:
                values["state"] = "interrupted" if had else "running"
        return Job(**values, collection=self._store.collection)


def _duplicate(item: SourceItem, first: str) -> SourceItem:
    """A failed item for a second document with the same id."""
    error = DocumentError(
        "two documents have the same id",
        where=f"{item.document_id}: {first} and {item.uri}",
        next_step="Pass a field with unique values as --id-field, or leave out one of the two documents.",
    )
    return SourceItem(document_id=f"{item.document_id} [{item.uri}]", uri=item.uri, error=error.to_dict())


def forget_documents(store: Store, ids: Sequence[str]) -> None:
    """Delete the tasks of these documents from all jobs of the collection; `Store.purge` then wipes their bytes."""
    jobs = select(JobRow.id).where(JobRow.collection_id == store.collection_id)
    with store.catalog.write() as session:
        for batch in batches(ids):
            session.execute(delete(TaskRow).where(TaskRow.document_id.in_(batch), TaskRow.job_id.in_(jobs)))


_ANEW = "Start a new job with `kv-memory job run`; documents that are already stored cost almost nothing."
_OPEN = ("pending", "running")
_WORK = [field.name for field in dataclasses.fields(Work)]
_COLUMNS = [field.name for field in dataclasses.fields(Job) if field.name != "collection"]
