"""RayEngine: workers as actors of a Ray cluster, fed by Ray Data. The only file that imports ray.

Rows are `{number, document_id, uri}`: which document, never its text. An actor holds the model, writes caches straight
into the store and gives back a row of a few bytes. The ledger stays the checkpoint: Ray Data's own wants sources and
sinks that are files on a shared disk, and keeps all ids in memory. When an actor dies, Ray gives its rows to another,
which finds in the ledger what was done of them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError, JobError, StoreError
from kv_memory.jobs.claims import LEASE_S, Claims, Renewer
from kv_memory.jobs.engine import WorkerEnd
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.local import threads_of
from kv_memory.jobs.names import worker_name
from kv_memory.jobs.records import Job, TaskResult
from kv_memory.jobs.roll import Roll
from kv_memory.store import Store

__all__ = ["RayEngine"]

_MOST_BLOCKS = 1000  # of a run; a block is what an actor gets at a time
_LEAST_ROWS = 4
_SETTLED_S = 2.0  # a run takes the documents found so far, so it waits until no more are found for a moment
_ENOUGH = 10_000  # or for so many
_PATIENCE_S = 10.0


class RayEngine:
    """Workers as actors of a Ray cluster: that of `RAY_ADDRESS`, or one of this machine, started for the job.

    Args:
        store: The job's. Every machine of the cluster needs its folder at the same path: with SQLite there can be one
            machine only, with PostgreSQL and an object store it is `kv-memory db init` on each. Files that are sources
            must be at the same paths too.
        n_workers: At most so many actors.
        n_gpus: Of each actor; None for one, where the cluster has any.
        lease_s: See `Claims`.

    Raises:
        ConfigError: Ray is not installed, or `n_workers` is below 1.
        JobError: The cluster has several machines, and the catalog is a file of this one.
    """

    def __init__(
        self, store: Store, *, n_workers: int = 1, n_gpus: float | None = None, lease_s: float = LEASE_S
    ) -> None:
        if n_workers < 1:
            raise ConfigError(f"there must be at least 1 worker, got {n_workers}", where="workers")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ConfigError(
                "Ray is not installed", where="engine", next_step="Run `pip install 'kv-memory[ray]'`."
            ) from error
        self._store = store
        self._ledger = Ledger(store)
        self._roll = Roll(store)
        self._most = n_workers
        self._n_gpus = n_gpus
        self._lease_s = lease_s
        self._name = f"ray-{uuid.uuid4().hex[:8]}"
        self._ours = not ray.is_initialized()
        if self._ours:
            options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data does by itself
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        n_machines = sum(node["Alive"] for node in ray.nodes())
        if n_machines > 1 and store.catalog.dialect == "sqlite":
            self._shut_down()
            raise JobError(
                f"the cluster has {n_machines} machines, and the store's catalog is a file of this one",
                where=str(store.path),
                next_step="Make a store in PostgreSQL and an object store with `kv-memory db init`.",
            )
        self._run: _Run | None = None
        self._seen = (0, 0.0)  # documents to do, and since when there have been so many
        self._stopping = False

    def tend(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """See `Engine.tend`. Ray itself replaces actors that die; what is told are runs that broke off."""
        ended: list[WorkerEnd] = []
        if self._run is not None and not self._run.is_alive():
            ended, self._run = self._run.ended(), None
        if self._run is None and n_open and not self._stopping and self._is_settled(n_open):
            found = self._ledger.pending_range(job)
            if found is not None:
                self._run = _Run(self._dataset(job, *found), self._name)
                self._run.start()
            else:
                self._roll.free_dead(job)  # nobody else would, before the leases run out
        return ended

    def n_workers(self) -> int:
        """See `Engine.n_workers`: how many there may be."""
        return 0 if self._run is None else self._most

    def stop(self) -> list[WorkerEnd]:
        """See `Engine.stop`."""
        patience_s = 0.0 if self._stopping else _PATIENCE_S
        self._stopping = True
        if self._run is not None:
            self._run.stop(patience_s)
            self._run = None
        self._shut_down()
        for job in self._ledger.jobs():
            self._roll.release_all(job, self._name)
        return []

    def _is_settled(self, n_open: int) -> bool:
        now_s = time.monotonic()
        if n_open != self._seen[0]:
            self._seen = n_open, now_s
        return n_open >= _ENOUGH or now_s - self._seen[1] >= _SETTLED_S

    def _dataset(self, job: Job, low: int, high: int) -> Any:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        n = high - low + 1
        size = max(_LEAST_ROWS, -(-n // _MOST_BLOCKS))
        n_blocks = -(-n // size)
        resources = ray.cluster_resources()
        n_gpus = (1.0 if resources.get("GPU") else 0.0) if self._n_gpus is None else self._n_gpus
        n_threads = threads_of(self._most)
        place = {"path": str(self._store.path), "collection": job.collection, "job": job.name}
        return (
            ray.data.range(n_blocks, override_num_blocks=n_blocks)
            .flat_map(_Rows(**place, low=low, size=size))
            .map_batches(
                _Actor,
                fn_constructor_kwargs={
                    **place,
                    "prefix": self._name,
                    "n_threads": n_threads,
                    "lease_s": self._lease_s,
                },
                batch_size=1,
                concurrency=(1, self._most),
                num_cpus=1 if n_gpus else min(n_threads, max(1, int(resources.get("CPU", 1)) // self._most)),
                num_gpus=n_gpus,
            )
        )

    def _shut_down(self) -> None:
        import ray

        if self._ours and ray.is_initialized():
            ray.shutdown()


class _Run(threading.Thread):
    """Goes through a data set; whatever comes out of it was written into the ledger by the actors already."""

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(name=f"{name} run", daemon=True)
        self._dataset = dataset
        self._worker = name
        self._stopped = threading.Event()
        self._fatal: dict[str, str | None] | None = None
        self._broken: str | None = None

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            for row in self._dataset.iter_rows():
                if row["fatal"]:
                    self._fatal = json.loads(row["fatal"])
                    return
                if self._stopped.is_set():
                    return
        except Exception as error:
            self._broken = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"

    def ended(self) -> list[WorkerEnd]:
        """How it ended, after it has."""
        if self._fatal is None and self._broken is None:
            return []
        reason = self._broken or str((self._fatal or {}).get("what"))
        return [WorkerEnd(worker=self._worker, reason=reason, died=self._fatal is None, error=self._fatal)]

    def stop(self, patience_s: float) -> None:
        """End it with the next row; whoever waits no longer shuts Ray down."""
        self._stopped.set()
        self.join(patience_s)


class _Rows:
    """Numbers of blocks to rows: the documents to do of each. Runs on the cluster."""

    def __init__(self, *, path: str, collection: str, job: str, low: int, size: int) -> None:
        self._place = path, collection, job
        self._low = low
        self._size = size

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        path, collection, name = self._place
        low = self._low + int(row["id"]) * self._size
        with Store.open(Path(path), collection=collection, create=False) as store:
            ledger = Ledger(store)
            tasks = ledger.pending(ledger.job(name), low=low, high=low + self._size)
        return [{"number": task.id, "document_id": task.document_id, "uri": task.uri} for task in tasks]


class _Actor:
    """A worker. Runs on the cluster."""

    def __init__(self, *, path: str, collection: str, job: str, prefix: str, n_threads: int, lease_s: float) -> None:
        self._place = path, collection, job
        self._name = f"{prefix}-{worker_name()}"
        self._n_threads = n_threads
        self._lease_s = lease_s
        self._stack = ExitStack()
        self._ready = False
        self._fatal = ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        outcomes: list[str] = []
        for number in batch["number"]:
            # An exception would end the job, and Ray would say neither whose nor why. So it is told in the row.
            if not self._fatal:
                try:
                    outcomes.append(self._do(int(number)))
                except Exception as error:
                    from kv_memory.jobs.worker import error_of

                    self._fatal = json.dumps(error_of(error))
        return {
            "document_id": [str(id_) for id_ in batch["document_id"]],
            "outcome": outcomes + ["skipped"] * (len(batch["number"]) - len(outcomes)),
            "fatal": [self._fatal] * len(batch["number"]),
        }

    def _do(self, number: int) -> str:
        from kv_memory.jobs.worker import do_one

        if not self._ready:
            self._open()
        task = self._claims.claim(number)
        if task is None:
            self._roll.free_dead(self._job)  # an actor that died may have had it
            task = self._claims.claim(number)
        if task is None:
            return "skipped"
        self._renewer.task = task
        try:
            result = do_one(task, self._sources, self._intake)
        except BaseException:
            with suppress(StoreError):
                self._claims.release(task)
            raise
        finally:
            self._renewer.task = None
        self._claims.finish(task, result, go_on=False)
        return result.outcome if isinstance(result, TaskResult) else "failed"

    def _open(self) -> None:
        import torch

        from kv_memory.jobs.sources import Sources
        from kv_memory.jobs.worker import make_intake

        torch.set_num_threads(self._n_threads)
        path, collection, name = self._place
        store = self._stack.enter_context(Store.open(Path(path), collection=collection, create=False))
        ledger, self._roll = Ledger(store), Roll(store)
        self._stack.enter_context(self._roll.living(self._name))
        self._job = ledger.job(name)
        self._intake = make_intake(store, self._job)
        if self._job.fingerprint != self._intake.fingerprint.digest:
            ledger.set_fingerprint(self._job, self._intake.fingerprint.digest)
        if store.settings() != self._job.settings.memory:
            store.update_settings(self._job.settings.memory)
        self._claims = Claims(store, self._job.id, self._name, lease_s=self._lease_s)
        self._renewer = self._stack.enter_context(Renewer(self._claims, lease_s=self._lease_s))
        self._sources = Sources(self._job.sources["items"], self._job.settings)
        self._ready = True
