"""Actor: a worker on a Ray cluster, the counterpart of the local engine's process; it does not import ray.

It works in turns. In each turn it claims documents from the ledger until none is left; the model stays loaded for the
next turn.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kv_memory.errors import StoreConnectionError, StoreLockedError, WorkerDiedError
from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.jobs.leases import LEASE_S, LiveWorkers, TaskQueue, locks_reach
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import worker_name
from kv_memory.store import Store

__all__ = ["Actor", "call_of"]

_LOOK_S = 1.0
_MOST_LOADS = 10
_LOST_S = 3.0  # pause before an actor returns its turn because the store does not respond


def call_of(driver: str) -> str:
    """Name of the lock that a driver holds while it wants work done."""
    return f"call of {driver}"


class Actor:
    """A worker; it opens nothing before its first turn, so that errors can be reported in a row.

    Args:
        path: Path of the store's folder on this machine.
        collection: Name of the job's collection.
        job: Name of the job.
        driver: Name of the driver that called the actor.
        n_threads: Number of CPU threads for the model.
        device: Device of the model; `auto` for the GPU assigned to the actor.
        lease_s: Duration of a lease in seconds, see `TaskQueue`.
    """

    def __init__(
        self,
        *,
        path: str,
        collection: str,
        job: str,
        driver: str,
        n_threads: int,
        device: str = "auto",
        lease_s: float = LEASE_S,
    ) -> None:
        self._place = Path(path), collection, job
        self._driver = driver
        self._n_threads = n_threads
        self._device = device
        self._lease_s = lease_s
        self._name = f"{driver}-{worker_name()}"
        self._stack: ExitStack | None = None
        self._pipeline: IngestPipeline | None = None
        self._called = True
        self._looked_s = -_LOOK_S

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Run one turn and return a row: the number of documents processed, and the error that ended the turn, if any.

        Args:
            batch: Batch of one row, which holds the number of the turn.
        """
        n_done, lost, fatal = 0, "", ""
        # An exception would end the job, and Ray would report neither the actor nor the cause.
        try:
            n_done = self._turn()
        except (StoreConnectionError, StoreLockedError) as error:
            lost = f"{error.what} (on {socket.gethostname()})"
            self.close()
            time.sleep(_LOST_S)
        except Exception as error:
            from kv_memory.jobs.worker import error_of

            told = error_of(error)
            fatal = json.dumps({**told, "what": f"{told['what']} (on {socket.gethostname()})"})
            self.close()
        return {"turn": list(batch["turn"]), "n_done": [n_done], "lost": [lost], "fatal": [fatal]}

    def close(self) -> None:
        """Close the store and drop the model; the next turn opens them again."""
        self._pipeline = None
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()

    def _turn(self) -> int:
        from kv_memory.jobs.worker import make_pipeline, work

        if self._stack is None:
            self._open()
        if not self._is_called() or not self._is_wanted():
            return 0
        if self._pipeline is None:
            with self._counted():
                self._pipeline = make_pipeline(self._store, self._job, device=self._device)
            if self._job.fingerprint != self._pipeline.fingerprint.digest:
                self._ledger.set_fingerprint(self._job, self._pipeline.fingerprint.digest)
        return work(self._store, self._job, self._name, self._pipeline, alone=self._is_over, lease_s=self._lease_s)

    def _open(self) -> None:
        import torch

        torch.set_num_threads(self._n_threads)
        path, collection, name = self._place
        with ExitStack() as stack:
            self._store = stack.enter_context(Store.open(path, collection=collection, create=False))
            stack.enter_context(LiveWorkers(self._store).hold_worker_lock(self._name))
            self._ledger = Ledger(self._store)
            self._job = self._ledger.job(name)
            self._task_queue = TaskQueue(self._store, self._job.id, self._name, lease_s=self._lease_s)
            self._stack = stack.pop_all()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count model loads that killed the process on this machine; otherwise Ray would restart actors endlessly."""
        loads = Path(tempfile.gettempdir()) / f"kv-memory-{self._driver}"
        with loads.open("ab") as file:
            file.write(b".")
        try:
            if (n_before := loads.stat().st_size - 1) >= _MOST_LOADS:
                raise WorkerDiedError(
                    f"{n_before} actors in a row died while they loaded the model",
                    where=self._job.name,
                    next_step="If the system killed them, there may be too little memory: use fewer --workers or "
                    f"a smaller model. Resume with `kv-memory job resume {self._job.name} --engine ray`.",
                )
            yield
        finally:
            loads.unlink(missing_ok=True)

    def _is_over(self) -> bool:
        """Whether the turn is over; other workers may release their documents, so the turn waits for those."""
        return not self._is_called() or (not self._task_queue.pending() and not self._is_wanted())

    def _is_called(self) -> bool:
        """Whether the driver still wants work done; False is final, and the lock is checked at most once a second."""
        catalog = self._store.catalog
        if self._called and time.monotonic() - self._looked_s > _LOOK_S and locks_reach(catalog):
            with catalog.hold(call_of(self._driver), wait=False) as had:
                self._called = not had
            self._looked_s = time.monotonic()
        return self._called

    def _is_wanted(self) -> bool:
        """Whether documents of the job are open, or may still be discovered."""
        job = self._ledger.job(self._job.name)
        return job.state == "running" and (not job.discovered or self._ledger.is_open(job))
