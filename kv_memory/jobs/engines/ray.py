"""RayEngine: workers as actors of a Ray cluster; the only file that imports ray.

An actor runs the same code as a worker of the local engine: it claims documents from the ledger and writes caches
directly to the store, until the job ends. No text and no tensor passes through Ray, and the ledger remains the
checkpoint. Ray Data was rejected: its checkpoint requires sources and sinks that are files on a shared disk, and at the
end of a job its actors wait for the one with the last block of documents.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kv_memory.errors import ConfigError, JobError
from kv_memory.jobs.engines import WorkerEnd, check_n_workers, last_line, n_cores, threads_of
from kv_memory.jobs.job_records import Job, worker_name
from kv_memory.jobs.leases import LEASE_S
from kv_memory.store import Store

_RESTARTS = 3  # an actor whose process has died once more is replaced by the driver, which counts its deaths
_PATIENCE_S = 10.0  # time for the actors to end after their current documents
_KILL_S = 5.0
_KNOCK_S = 5.0
_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # off, as on these systems, Ray opens no port to other machines


class RayWorker:
    """The class of the actors."""

    def run(self, path: str, **options: Any) -> dict[str, Any]:
        """Work on a job until it ends or Ray cancels this call; see `worker.run`. Returns the `WorkerEnd` as a dict."""
        import ray

        from kv_memory.jobs.worker import run

        # A restarted actor needs a new name: the ledger frees the documents of the old one.
        end = run(path, worker=worker_name(), alone=ray.get_runtime_context().is_canceled, **options)
        here = f"{end.reason} (on {socket.gethostname()})"
        error = None if end.error is None else {**end.error, "what": here}
        return dataclasses.asdict(dataclasses.replace(end, reason=here, error=error))


class RayEngine:
    """Workers as actors of a Ray cluster: the cluster at `RAY_ADDRESS`, or one started on this machine for the job.

    A cluster started here listens on the loopback address only, requires Ray's token, has no dashboard, reports no
    usage, and ends with the engine.

    Args:
        store: Store of the job. Its folder must be at the same path on every machine of the cluster: SQLite allows
            only one machine; with PostgreSQL and an object store, run `kv-memory db init` on each. Source files must be
            at the same paths too.
        n_workers: Maximum number of actors; those for which there is no room wait for it.
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
        if n_gpus is not None and not 0 <= n_gpus < math.inf:
            raise ConfigError(
                f"the number of GPUs per worker must be at least 0, got {n_gpus}",
                where="gpus_per_worker",
                next_step="Pass 1, 0.5 for two workers that share a GPU, or 0 for none.",
            )
        self._store = store
        self._most = check_n_workers(n_workers)
        self._lease_s = lease_s
        self._actors: dict[Any, Any] = {}  # by the reference to the result of its `run`
        self._ray, self._cluster = _join()
        try:
            self._share = share_of(self._check_machines(), n_workers=n_workers, n_gpus=n_gpus)
        except BaseException:
            self._cluster.close()
            raise

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """See `Engine.poll`; Ray itself restarts an actor whose process has died, a few times."""
        running = list(self._actors)
        done = self._ray.wait(running, num_returns=len(running), timeout=0)[0] if running else []
        ended = [self._end_of(result) for result in done]
        while len(self._actors) < min(self._most, n_open):
            self._start(job)
        return ended

    def n_workers(self) -> int:
        """See `Engine.n_workers`; actors that wait for room are included."""
        return len(self._actors)

    def stop(self) -> None:
        """See `Engine.stop`."""
        ray, running = self._ray, list(self._actors)
        if running:
            for result in running:
                ray.cancel(result)
            ray.wait(running, num_returns=len(running), timeout=_PATIENCE_S)
            for actor in self._actors.values():
                ray.kill(actor)
            ray.wait(running, num_returns=len(running), timeout=_KILL_S)
            self._actors.clear()
        self._cluster.close()

    def _start(self, job: Job) -> None:
        resources = {"num_cpus": self._share.n_cpus, "num_gpus": self._share.n_gpus}
        restarts = {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        actor = self._ray.remote(**resources, **restarts)(RayWorker).remote()
        result = actor.run.remote(
            str(self._store.path),
            collection=job.collection,
            job=job.name,
            n_threads=self._share.n_threads,
            device="auto" if self._share.n_gpus else "cpu",
            lease_s=self._lease_s,
        )
        self._actors[result] = actor

    def _end_of(self, result: Any) -> WorkerEnd:
        actor = self._actors.pop(result)
        try:
            return WorkerEnd(**self._ray.get(result))
        except Exception as error:  # its process has died once too often, or could not begin
            return WorkerEnd(worker="actor", reason=_last_line(error), n_deaths=1 + _RESTARTS)
        finally:
            self._ray.kill(actor)

    def _check_machines(self) -> list[dict[str, float]]:
        """Check that all machines can reach the store, and return the resources of each."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        n_machines = len(machines)
        here = "catalog" if self._store.catalog.dialect == "sqlite" else "blobs"
        if n_machines > 1 and (here == "catalog" or "://" not in self._store.blobs_url):
            raise JobError(
                f"the cluster has {n_machines} machines, but the store's {here} are in a folder on this machine",
                where=str(self._store.path),
                next_step="Use PostgreSQL and an object store for the store: run `kv-memory db init` on each machine.",
            )
        return machines


def _join() -> tuple[Any, ExitStack]:
    """Import Ray and join the cluster; closing the returned stack leaves it, unless the application had joined it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # or leftovers of a run would start another cluster later
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _knock(address)
    else:
        os.environ.setdefault(_ON_LOOPBACK, "0")  # Ray reads it at import
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", where="engine", next_step="Run `pip install 'kv-memory[ray]'`."
        ) from error
    if ray.is_initialized():
        return ray, ExitStack()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as joined:
        try:
            if address:
                ray.init(address=address, **quiet)
            else:  # "local", or it would join a cluster started earlier on this machine
                ray.init(address="local", include_dashboard=False, num_cpus=n_cores(), **quiet)
        except Exception as error:
            raise _no_cluster(address, error) from error
        # Even without log_to_driver, Ray prints messages about dead nodes to standard output, among our JSON.
        internals: Any = ray._private.worker
        joined.callback(setattr, internals, "print_to_stdstream", internals.print_to_stdstream)
        internals.print_to_stdstream = lambda *_, **_options: None
        joined.callback(ray.shutdown)
        return ray, joined.pop_all()


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


def _last_line(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, last_line(str(error)))))


@dataclass(frozen=True, kw_only=True)
class Share:
    """The cores and GPUs of one actor, fractions if actors share one, and the number of CPU threads for its model."""

    n_cpus: float
    n_gpus: float
    n_threads: int


def share_of(machines: Sequence[Mapping[str, float]], *, n_workers: int, n_gpus: float | None) -> Share:
    """The share of the cluster for one actor, with at most the cores of the smallest machine.

    `machines` are the resources of each machine, by Ray's names. `n_gpus` are GPUs per actor; None for one if the
    cluster has any. It is a JobError if no machine has that many GPUs.
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
    return Share(n_cpus=n_cpus, n_gpus=n_gpus, n_threads=threads_of(share))
