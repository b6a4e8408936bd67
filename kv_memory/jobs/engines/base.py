"""Engine: what runs a job's workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kv_memory.jobs.records import Job

__all__ = ["Engine", "WorkerEnd"]


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """How a worker ended.

    Attributes:
        worker: Its name in the ledger.
        reason: For people.
        died: It did not end by itself.
        error: Why no worker can do any document, as `KVMemoryError.to_dict` has it; None for any other end.
    """

    worker: str
    reason: str
    died: bool = False
    error: dict[str, str | None] | None = None


class Engine(Protocol):
    """Runs workers. They claim their documents from the ledger; an engine only sees to it that there are some."""

    def tend(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """Start what workers are lacking, no more than there are documents to do; tell which have ended.

        Args:
            job: Whose documents they do.
            n_open: Documents pending or in hand.
        """

    def n_workers(self) -> int:
        """How many are at work."""

    def stop(self) -> list[WorkerEnd]:
        """End all of them soon; those that do not give their documents back are killed. Called twice, at once."""
