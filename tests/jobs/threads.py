"""An engine whose workers are threads of the test, around a model that is loaded once."""

from __future__ import annotations

import threading

from kv_memory.intake import Intake
from kv_memory.jobs import Job
from kv_memory.jobs.engine import WorkerEnd
from kv_memory.jobs.names import worker_name
from kv_memory.jobs.worker import error_of, work
from kv_memory.store import Store


class ThreadEngine:
    """See `Engine`."""

    def __init__(self, store: Store, intake: Intake, *, n_workers: int = 1) -> None:
        self.n_started = 0
        self._store = store
        self._intake = intake
        self._most = n_workers
        self._threads: list[tuple[str, threading.Thread]] = []
        self._errors: dict[str, dict[str, str | None]] = {}
        self._stopping = threading.Event()

    def tend(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
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

    def stop(self) -> list[WorkerEnd]:
        self._stopping.set()
        for _, thread in self._threads:
            thread.join()
        ended = [self._end(name) for name, _ in self._threads]
        self._threads = []
        return ended

    def _end(self, name: str) -> WorkerEnd:
        return WorkerEnd(worker=name, reason="ended", error=self._errors.get(name))

    def _work(self, job: Job, name: str) -> None:
        try:
            work(self._store, job, name, self._intake, alone=self._stopping.is_set)
        except Exception as error:
            self._errors[name] = error_of(error)
