"""RayEngine: workers as actors of a Ray cluster, in a pool of Ray Data; the only file that imports ray.

A row of the data set is a turn of work. An actor takes a row, loads its model the first time, and then runs the same
code as a worker of the local engine: it claims documents from the ledger and writes caches directly to the store, until
no document is left. It returns a row of a few bytes. No text and no tensor passes through Ray, and the ledger remains
the checkpoint: the checkpoint of Ray Data requires sources and sinks that are files on a shared disk. Documents as rows
were rejected: an actor receives a block of them, and at the end the others wait for the actor with the last block.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kv_memory.errors import ConfigError, JobError
from kv_memory.jobs.engines.actor import Actor, call_of
from kv_memory.jobs.engines.base import WorkerEnd
from kv_memory.jobs.engines.guard import Guard
from kv_memory.jobs.leases import LEASE_S, LiveWorkers
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import Job
from kv_memory.store import Store

__all__ = ["RayEngine", "Share", "share_of"]

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0  # time for the actors to end after their current documents
_FREE_S = 5.0
_KNOCK_S = 5.0
_SPARE_TURNS = 16  # beyond two per actor: for actors that join late or return a turn
_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # off, as on these systems, Ray opens no port to other machines


class RayEngine:
    """Workers as actors of a Ray cluster: the cluster at `RAY_ADDRESS`, or one started on this machine for the job.

    A cluster started here listens on the loopback address only, requires Ray's token, has no dashboard, reports no
    usage, and ends with the engine.

    Args:
        store: Store of the job. Its folder must be at the same path on every machine of the cluster: SQLite allows
            only one machine; with PostgreSQL and an object store, run `kv-memory db init` on each. Source files must be
            at the same paths too.
        n_workers: Maximum number of actors; as many are started as there is room for.
        n_gpus: Number of GPUs per actor, e.g. 0.5 for two actors that share one; None for one if the cluster has any.
        lease_s: Duration of a lease in seconds, see `TaskQueue`.

    Raises:
        ConfigError: Ray is not installed, or a number is out of range.
        JobError: The cluster cannot be joined or started, no machine has that many GPUs, or there are several machines
            while the store is in a folder of this one.
    """

    def __init__(
        self, store: Store, *, n_workers: int = 1, n_gpus: float | None = None, lease_s: float = LEASE_S
    ) -> None:
        if n_workers < 1:
            raise ConfigError(
                f"there must be at least 1 worker, got {n_workers}",
                where="workers",
                next_step="Pass the number of GPUs in the cluster; without GPUs, one worker per few CPU cores.",
            )
        if n_gpus is not None and not 0 <= n_gpus < math.inf:
            raise ConfigError(
                f"the number of GPUs per worker must be at least 0, got {n_gpus}",
                where="gpus_per_worker",
                next_step="Pass 1, 0.5 for two workers that share a GPU, or 0 for none.",
            )
        self._store = store
        self._ledger = Ledger(store)
        self._live_workers = LiveWorkers(store)
        self._most = n_workers
        self._lease_s = lease_s
        self._name = f"ray-{uuid.uuid4().hex[:8]}"
        self._cluster = _join()
        try:
            self._share = share_of(self._check_machines(), n_workers=n_workers, n_gpus=n_gpus)
        except BaseException:
            self._shut_down()
            raise
        self._run: _Run | None = None
        self._job: Job | None = None
        self._calling = ExitStack()  # while it is open, the actors see that the driver wants work done
        self._freed_s = 0.0
        self._stopping = False

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """See `Engine.poll`; Ray replaces dead actors, so this reports returned turns and runs that broke off."""
        ended: list[WorkerEnd] = []
        if self._job is None:
            self._job = job
            self._calling.enter_context(self._store.catalog.hold(call_of(self._name)))
        if self._run is not None:
            ended += self._run.lost()
            if not self._run.is_alive():
                ended += self._ends(self._run)
                self._run = None
        if time.monotonic() - self._freed_s > _FREE_S:
            self._freed_s = time.monotonic()
            self._live_workers.free_dead(job)  # documents of dead actors; the other actors wait for them
        if self._run is None and n_open and not self._stopping and not any(end.error for end in ended):
            self._run = _Run(self._turns(job), self._name)
            self._run.start()
        return ended

    def n_workers(self) -> int:
        """See `Engine.n_workers`; the maximum while a run is active."""
        return 0 if self._run is None else self._most

    def stop(self) -> list[WorkerEnd]:
        """See `Engine.stop`."""
        patience_s = 0.0 if self._stopping else _PATIENCE_S
        self._stopping = True
        self._calling.close()
        if self._run is not None:
            self._run.join(patience_s)
            self._run = None
        self._shut_down()
        if self._job is not None:
            self._live_workers.release_all(self._job, self._name)
        return []

    def _turns(self, job: Job) -> Any:
        import ray

        n_turns = 2 * self._most + _SPARE_TURNS
        turns = ray.data.from_items([{"turn": number} for number in range(n_turns)], override_num_blocks=n_turns)
        turns = turns.map_batches(
            Actor,
            fn_constructor_kwargs={
                "path": str(self._store.path),
                "collection": job.collection,
                "job": job.name,
                "driver": self._name,
                "n_threads": self._share.n_threads,
                "device": "auto" if self._share.n_gpus else "cpu",
                "lease_s": self._lease_s,
            },
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,  # one is enough to start
                max_size=self._most,
                initial_size=self._most,
                max_tasks_in_flight_per_actor=2,  # with one, Ray never notices that more actors would help
            ),
            num_cpus=self._share.n_cpus,
            num_gpus=self._share.n_gpus,
        )
        turns.context.enable_progress_bars = False
        return turns

    def _ends(self, run: _Run) -> list[WorkerEnd]:
        """The ends to report for a run that is over although documents are left."""
        if run.fatal is not None:
            return [WorkerEnd(worker=self._name, reason=str(run.fatal.get("what")), error=run.fatal)]
        return [] if run.broken is None else [WorkerEnd(worker=self._name, reason=run.broken, died=True)]

    def _check_machines(self) -> list[dict[str, float]]:
        """Check that all machines can reach the store, and return the resources of each."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        n_machines = len(machines)
        here = "catalog" if self._store.catalog.dialect == "sqlite" else "blobs"
        if n_machines > 1 and (here == "catalog" or "://" not in self._store.blobs_url):
            raise JobError(
                f"the cluster has {n_machines} machines, but the store's {here} are in a folder on this machine",
                where=str(self._store.path),
                next_step="Use PostgreSQL and an object store for the store: run `kv-memory db init` on each machine.",
            )
        return machines

    def _shut_down(self) -> None:
        self._cluster.close()


def _join() -> ExitStack:
    """Join the cluster; closing the returned stack leaves it, unless the application had joined it before."""
    left = ExitStack()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ENABLE_AUTO_CONNECT", "0"
    )  # or leftovers of a run would start another cluster after the last one
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _knock(address)
    else:
        os.environ.setdefault(_ON_LOOPBACK, "0")  # Ray reads it at import
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", where="engine", next_step="Run `pip install 'kv-memory[ray]'`."
        ) from error
    if ray.is_initialized():
        return left
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns about actions of Ray Data itself
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # this engine reports its errors
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as joined:
        try:
            if address:
                ray.init(address=address, **quiet)
            else:  # "local", or it would join a cluster started earlier on this machine
                guard = Guard()
                joined.callback(guard.close)
                with guard.marking():
                    ray.init(address="local", include_dashboard=False, num_cpus=_n_cores(), **quiet)
        except Exception as error:
            raise _no_cluster(address, error) from error
        joined.callback(ray.shutdown)
        # Even without log_to_driver, Ray prints messages about dead nodes to standard output, among our JSON.
        internals: Any = ray._private.worker
        joined.callback(setattr, internals, "print_to_stdstream", internals.print_to_stdstream)
        internals.print_to_stdstream = _note
        left = joined.pop_all()
    return left


def _note(said: Mapping[str, Any], *_: Any, **_options: Any) -> None:
    for line in said.get("lines", ()):
        _LOG.info("Ray reported: %s", line)


def _knock(address: str) -> None:
    """Check that HOST:PORT accepts connections, since Ray would retry for minutes; other addresses are left to Ray."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> JobError:
    return JobError(
        f"the Ray cluster cannot be {'joined' if address else 'started'}: {_last_line(error)}",
        where=f"RAY_ADDRESS={address}" if address else "ray",
        next_step="Check `ray status` on the head node, and that RAY_AUTH_MODE and the token are the same here."
        if address
        else "Ray's logs are in /tmp/ray/session_latest/logs.",
    )


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of the cluster's resources for one actor.

    Attributes:
        n_cpus: Number of cores, as counted by Ray; a fraction if actors outnumber cores.
        n_gpus: Number of GPUs; a fraction if actors share a GPU.
        n_threads: Number of CPU threads for the model.
    """

    n_cpus: float
    n_gpus: float
    n_threads: int


def share_of(machines: Sequence[Mapping[str, float]], *, n_workers: int, n_gpus: float | None) -> Share:
    """The share of the cluster for one actor, with at most the cores of the smallest machine.

    Args:
        machines: Resources of each machine, by Ray's names.
        n_workers: Number of actors that must fit into the cluster.
        n_gpus: Number of GPUs per actor; None for one if the cluster has any.

    Raises:
        JobError: No machine has that many GPUs.
    """
    cores = [cores for machine in machines if (cores := machine.get("CPU", 0))]  # a head node often has no cores
    most_gpus = max((machine.get("GPU", 0) for machine in machines), default=0)
    if n_gpus is None:
        n_gpus = 1.0 if most_gpus else 0.0
    if n_gpus > most_gpus:
        raise JobError(
            f"a worker needs {n_gpus:g} GPUs, but no machine of the cluster has more than {most_gpus:g}",
            where="gpus_per_worker",
            next_step="Use fewer GPUs per worker, or none with `--gpus-per-worker 0`.",
        )
    share = min(sum(cores) / n_workers, min(cores)) if cores else 1.0
    # A worker on a GPU takes one core at most, and leaves the others to other programs. Ray counts in 1/10,000.
    n_cpus = min(share, 1) if n_gpus or share < 1 else int(share)
    n_cpus = max(1, math.floor(n_cpus * 1e4)) / 1e4
    return Share(n_cpus=n_cpus, n_gpus=n_gpus, n_threads=_threads_asked(max(1, int(share))))


def _threads_asked(share: int) -> int:
    """The smaller of `share` and `OMP_NUM_THREADS`, as for the local engine's workers."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


class _Run(threading.Thread):
    """A thread that iterates over a data set; each row reports how a turn ended."""

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(name=f"{name} run", daemon=True)
        self.fatal: dict[str, str | None] | None = None
        self.broken: str | None = None
        self._dataset = dataset
        self._worker = name
        self._lost: list[str] = []

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            for row in self._dataset.iter_rows():
                if row["lost"]:
                    self._lost.append(row["lost"])
                if row["fatal"]:
                    self.fatal = json.loads(row["fatal"])
                    return
        except Exception as error:
            self.broken = _last_line(error)

    def lost(self) -> list[WorkerEnd]:
        """The turns that actors have returned since the last call."""
        told, self._lost = self._lost, []
        return [WorkerEnd(worker=self._worker, reason=reason, died=True) for reason in told]
