"""Engine: the protocol for running a job's workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kv_memory.jobs.records import Job

__all__ = ["Engine", "WorkerEnd"]


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """The end of a worker.

    Attributes:
        worker: Name of the worker in the ledger.
        reason: Reason of the end, for display.
        died: True if the worker ended abnormally, without an `error`.
        error: Error that keeps every worker from processing documents, in the form of `KVMemoryError.to_dict`; None
            for any other end.
    """

    worker: str
    reason: str
    died: bool = False
    error: dict[str, str | None] | None = None


class Engine(Protocol):
    """Keeps workers running; the workers claim their documents from the ledger themselves."""

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """Start missing workers, no more than there are open documents; return those that have ended.

        Args:
            job: Job that the workers process.
            n_open: Number of documents pending or in progress.
        """

    def n_workers(self) -> int:
        """Number of running workers."""

    def stop(self) -> list[WorkerEnd]:
        """Stop all workers soon and kill those that do not release their documents; a second call kills at once."""
