"""Events that a job reports while it runs, each a frozen record."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from kv_memory.jobs.job_records import Counts, FailedTask, Outcomes


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event; `kind` is its machine-readable name."""

    kind: ClassVar[str]
    job: str


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A job starts or resumes.

    Attributes:
        sources: Names of the job's sources, for display.
        resumed: True if the job was started before.
    """

    kind = "started"
    sources: tuple[str, ...]
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The progress of a job.

    Attributes:
        discovered: True once all documents are known; until then `total` grows.
        total: Number of known documents.
        done: Number of finished documents.
        failed: Number of failed documents.
        in_hand: Number of documents in progress.
        n_tokens: Number of tokens compressed in this job.
        n_workers: Number of running workers.
        elapsed_s: Time since the job started or resumed, in seconds.
        documents_per_s: Recent rate of documents per second.
        tokens_per_s: Recent rate of tokens per second.
        left_s: Estimated remaining time in seconds; None while it is unknown.
    """

    kind = "progress"
    discovered: bool
    total: int
    done: int
    failed: int
    in_hand: int
    n_tokens: int
    n_workers: int
    elapsed_s: float
    documents_per_s: float
    tokens_per_s: float
    left_s: float | None


@dataclass(frozen=True, kw_only=True)
class DocumentFailed(FailedTask, Event):
    """A document failed; the job continues."""

    kind = "failed"


@dataclass(frozen=True, kw_only=True)
class WorkerEnded(Event):
    """A worker died and is replaced; its document is retried, unless its attempts are used up."""

    kind = "worker_died"
    worker: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobEnded(Outcomes, Event):
    """The job has ended.

    Attributes:
        state: Final state, `done` or `cancelled`.
        deleted: Number of documents deleted by a sync.
        elapsed_s: Time since the job started or resumed, in seconds.
    """

    kind = "ended"
    state: str
    deleted: int
    elapsed_s: float


class RateMeter:
    """The recent speed of a job: its first minute says little about its tenth hour.

    Args:
        window_s: Length of the sliding window in seconds.
    """

    def __init__(self, *, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._begun = False
        self._seen: deque[tuple[float, int, int, int]] = deque()

    def see(self, now_s: float, counts: Counts) -> None:
        """Record the counts at a point in time."""
        if len(self._seen) == 1 and not self._begun:
            self._seen.clear()  # the time for loading models does not count
        self._begun = self._begun or bool(counts.running)
        self._seen.append((now_s, counts.done + counts.failed, counts.n_tokens, counts.done_bytes))
        while len(self._seen) > 2 and now_s - self._seen[1][0] > self._window_s:
            self._seen.popleft()

    @property
    def documents_per_s(self) -> float:
        """Documents done or failed per second."""
        return self._rate(1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens compressed per second."""
        return self._rate(2)

    def left_s(self, counts: Counts) -> float | None:
        """Estimated remaining time, based on the sizes of the documents if they are known; None while it is unknown."""
        if not counts.open:
            return 0.0
        done, left = (self._rate(3), counts.open_bytes) if counts.open_bytes else (self._rate(1), counts.open)
        return left / done if done else None

    def _rate(self, column: int) -> float:
        if len(self._seen) < 2:
            return 0.0
        first, last = self._seen[0], self._seen[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-3)
