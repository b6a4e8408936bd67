"""An engine whose workers are threads of the test, around a model that is loaded once."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.jobs import Job, Ledger
from kv_memory.jobs.engines import WorkerEnd
from kv_memory.jobs.job_records import worker_name
from kv_memory.jobs.leases import TaskQueue
from kv_memory.jobs.sources import Sources
from kv_memory.jobs.worker import error_of, work
from kv_memory.store import Store


class Gate:
    """Lets a few documents pass, and the next ones once it is open: a job is then half done for as long as it takes.

    Without it, what a test does in the middle of a job would have to be quicker than the job.
    """

    def __init__(self, *, n_pass: int) -> None:
        self._n_left = threading.Semaphore(n_pass)
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        if not self._n_left.acquire(blocking=False):
            assert self._open.wait(timeout=60), "nobody has opened the gate"


class _Gated:
    """A pipeline in front of which documents wait, in a worker's hand already."""

    def __init__(self, pipeline: IngestPipeline, gate: Gate) -> None:
        self._pipeline = pipeline
        self._gate = gate

    def add(self, *args: Any, **options: Any) -> Any:
        self._gate.wait()
        return self._pipeline.add(*args, **options)

    def add_passages(self, *args: Any, **options: Any) -> Any:
        self._gate.wait()
        return self._pipeline.add_passages(*args, **options)


class ThreadEngine:
    """See `Engine`. A gate is opened at the latest when the engine is stopped: what is in hand is finished."""

    def __init__(self, store: Store, pipeline: IngestPipeline, *, n_workers: int = 1, gate: Gate | None = None) -> None:
        self.n_started = 0
        self._store = store
        self._pipeline: Any = pipeline if gate is None else _Gated(pipeline, gate)
        self._gate = gate
        self._most = n_workers
        self._threads: list[tuple[str, threading.Thread]] = []
        self._errors: dict[str, dict[str, str | None]] = {}
        self._stopping = threading.Event()

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        ended = [self._end(name) for name, thread in self._threads if not thread.is_alive()]
        self._threads = [(name, thread) for name, thread in self._threads if thread.is_alive()]
        while len(self._threads) < min(self._most, n_open):
            name = worker_name()
            thread = threading.Thread(target=self._work, args=(job, name))
            thread.start()
            self.n_started += 1
            self._threads.append((name, thread))
        return ended

    def n_workers(self) -> int:
        return len(self._threads)

    def stop(self) -> None:
        self._stopping.set()
        if self._gate is not None:
            self._gate.open()
        for _, thread in self._threads:
            thread.join()
        self._threads = []

    def _end(self, name: str) -> WorkerEnd:
        return WorkerEnd(worker=name, reason="ended", error=self._errors.get(name))

    def _work(self, job: Job, name: str) -> None:
        try:
            with (
                Ledger(self._store).hold_worker_lock(name),
                closing(Sources(job.sources["items"], job.settings)) as sources,
                TaskQueue(self._store, job.id, name) as queue,
            ):
                work(queue, sources, self._pipeline, alone=self._stopping.is_set)
        except Exception as error:
            self._errors[name] = error_of(error)
