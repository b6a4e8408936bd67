"""Jobs that add documents: kept in the ledger, run one after the other by this process, with the server's own model.

The documents of a request are first written to a file in the store's folder. A job is therefore as safe as one of
`kv-memory job run`: after a crash, the next server on this folder resumes it, or `kv-memory job resume` does.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import select

from kv_memory.documents import Document
from kv_memory.errors import KVMemoryError, QueueFullError
from kv_memory.ingest.pipeline import AddProgress, IngestPipeline
from kv_memory.jobs import Job, JobSettings, Ledger
from kv_memory.jobs.driver import drive
from kv_memory.jobs.engines import WorkerEnd
from kv_memory.jobs.events import Event
from kv_memory.jobs.job_records import worker_name
from kv_memory.jobs.job_tables import JobRow
from kv_memory.jobs.sources.uploads import write_uploads
from kv_memory.jobs.worker import end_of, run_in
from kv_memory.memory import KVMemory
from kv_memory.serve.errors import ApiError
from kv_memory.serve.metrics import Metrics
from kv_memory.store import Store
from kv_memory.store.sql.schema import CollectionRow

_log = logging.getLogger(__name__)
_ORPHAN_S = 600.0  # a younger file without a job may belong to a request in progress


class _Stopped(BaseException):
    """The request to stop; not an Exception, which would count as the document's error."""


class ThreadEngine:
    """An engine with one worker: a thread that uses the server's model.

    A process of its own would load the model a second time. Stopping it takes a passage at most.
    """

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._end: WorkerEnd | None = None

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """See `Engine.poll`."""
        ended: list[WorkerEnd] = []
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            if self._end is not None:
                ended, self._end = [self._end], None
        if self._thread is None and n_open:
            self._thread = threading.Thread(target=self._run, args=(job,), name=f"adding {job.name}", daemon=True)
            self._thread.start()
        return ended

    def n_workers(self) -> int:
        """See `Engine.n_workers`."""
        return int(self._thread is not None)

    def stop(self) -> None:
        """See `Engine.stop`."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, job: Job) -> None:
        worker, store = worker_name(), self._memory.store

        def body() -> None:
            run_in(store, job=job.name, worker=worker, alone=self._halt.is_set, make_pipeline=self._pipeline)

        try:
            self._end = end_of(worker, body)
        except _Stopped:
            self._end = WorkerEnd(worker=worker, reason="stopped")

    def _pipeline(self, _: Store, __: Job) -> IngestPipeline:
        return self._memory.pipeline(on_progress=self._check)

    def _check(self, _: AddProgress) -> None:
        if self._halt.is_set():
            raise _Stopped


class Jobs:
    """The jobs of this process.

    Args:
        memory: Memory of the server.
        most: Largest number of jobs that wait.
    """

    def __init__(self, memory: KVMemory, *, most: int, metrics: Metrics) -> None:
        self._memory = memory
        self._folder = memory.path / "uploads"
        self._most = most
        self._metrics = metrics
        self._waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._names: set[str] = set()  # of the jobs that wait or run here
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._errors: dict[str, KVMemoryError] = {}
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Resume the jobs that a previous server on this folder has left, and wait for new ones."""
        known = {name: (collection, state) for collection, name, state in self._rows()}
        for path in sorted(self._folder.glob("*.jsonl")) if self._folder.is_dir() else ():
            collection, state = known.get(path.stem, ("", "lost"))
            if state == "running":
                self._put(collection, path.stem)
            elif state != "lost" or time.time() - path.stat().st_mtime > _ORPHAN_S:
                path.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current passage; what is left is resumed by the next server."""
        self._halt.set()
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive()

    def submit(self, memory: KVMemory, documents: Sequence[Document]) -> Job:
        """Create a job that adds documents to a collection.

        Raises:
            QueueFullError: Too many jobs wait.
            StoreFullError: No space is left.
        """
        with self._lock:
            if len(self._names) >= self._most:
                raise QueueFullError(
                    f"{len(self._names)} jobs wait, which is as many as this server admits",
                    next_step="Try again later, or send more documents in one request.",
                )
        name = f"upload-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:12]}"
        path = self._path(name)
        write_uploads(path, documents)
        try:
            settings = JobSettings(memory=asdict(memory.settings))
            sources = {"items": [{"kind": "uploads", "path": str(path)}], "sync": False}
            job = Ledger(memory.store).create(name, sources=sources, settings=settings)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._put(memory.collection, name)
        return job

    def collection_of(self, name: str) -> str:
        """The collection of a job of this store; an `ApiError` if there is no such job."""
        for collection, known, _ in self._rows(name):
            if known == name:
                return collection
        raise ApiError(404, f"no job {name!r}; GET /v1/jobs lists them", code="job_not_found")

    def waits(self, name: str) -> bool:
        """Whether a job waits or runs in this process."""
        return name in self._names

    def error(self, name: str) -> KVMemoryError | None:
        """The error that stopped a job in this process: a full disk, for example; None if there was none."""
        return self._errors.get(name)

    def _rows(self, name: str | None = None) -> list[tuple[str, str, str]]:
        statement = select(CollectionRow.name, JobRow.name, JobRow.state).join_from(
            JobRow, CollectionRow, JobRow.collection_id == CollectionRow.id
        )
        if name is not None:
            statement = statement.where(JobRow.name == name)
        with self._memory.store.catalog.read() as session:
            return [(collection, job, state) for collection, job, state in session.execute(statement)]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _put(self, collection: str, name: str) -> None:
        with self._lock:
            self._names.add(name)
            self._metrics.jobs.set(len(self._names))
        self._waiting.put((collection, name))

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None and not self._halt.is_set():
            try:
                self._drive(*waiting)
            except _Stopped:
                return
            except Exception as error:  # one job must not end all others
                _log.error("job %s stopped: %s", waiting[1], error, exc_info=not isinstance(error, KVMemoryError))
                if isinstance(error, KVMemoryError):
                    self._errors[waiting[1]] = error
            finally:
                with self._lock:
                    self._names.discard(waiting[1])
                    self._metrics.jobs.set(len(self._names))

    def _drive(self, collection: str, name: str) -> None:
        memory = self._memory.in_collection(collection)
        ledger = Ledger(memory.store)
        job = ledger.job(name)
        if job.state == "running":  # in another server on this folder
            return
        if job.state == "interrupted":  # not done, and not cancelled while it waited
            drive(memory.store, job, ThreadEngine(memory), resumed=True, on_event=self._check)
        with suppress(OSError):
            self._path(name).unlink()

    def _check(self, _: Event) -> None:
        if self._halt.is_set():
            raise _Stopped
