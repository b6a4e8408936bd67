"""Engines that run the workers: as processes of this machine, or on Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from kv_memory.errors import ConfigError
from kv_memory.jobs.job_records import Job

__all__ = ["Engine", "WorkerEnd", "check_n_workers", "last_line", "n_cores", "threads_of"]


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """The end of a worker.

    Attributes:
        n_deaths: Number of processes that died as this worker, without an `error`; 0 for a normal end.
        error: Error that keeps every worker from processing documents, in the form of `KVMemoryError.to_dict`; None
            for any other end.
    """

    worker: str
    reason: str
    n_deaths: int = 0
    error: dict[str, str | None] | None = None


class Engine(Protocol):
    """Keeps workers running; the workers claim their documents from the ledger themselves."""

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """Start missing workers, no more than `n_open` documents need; return those that have ended."""

    def n_workers(self) -> int:
        """Number of running workers."""

    def stop(self) -> None:
        """Stop all workers soon, and kill those that do not release their documents."""


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(share: float) -> int:
    """Number of threads for a worker with this share of the cores; `OMP_NUM_THREADS` if that is lower."""
    most = max(1, int(share))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(most, int(asked)) if asked.isdigit() and int(asked) else most


def check_n_workers(n: int) -> int:
    """Return the number of workers if it is at least 1; otherwise raise a ConfigError."""
    if n < 1:
        raise ConfigError(
            f"there must be at least 1 worker, got {n}",
            where="workers",
            next_step="Pass the number of GPUs; without GPUs 1, or on Ray one worker per few CPU cores.",
        )
    return n


def last_line(text: str) -> str:
    """The last line of an output, for a message: at most 300 characters, possibly empty."""
    return text.strip().rpartition("\n")[2].strip()[:300]
