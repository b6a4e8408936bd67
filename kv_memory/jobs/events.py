"""Events that a job reports while it runs, each a frozen record."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from kv_memory.jobs.job_records import Counts, FailedTask, NotedTask, Outcomes

_WINDOW_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event; `kind` is its machine-readable name."""

    kind: ClassVar[str]
    job: str


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A job starts, or resumes; its sources are named for display."""

    kind = "started"
    sources: tuple[str, ...]
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The progress of a job in numbers of documents; speeds are those of the last minute.

    Attributes:
        discovered: True once all documents are known; until then `total` grows.
        n_tokens: Number of tokens compressed in this job.
        elapsed_s: Time since the job started or resumed, in seconds.
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
class DocumentNoted(NotedTask, Event):
    """A document is stored, but its parser replaced or lost something."""

    kind = "noted"


@dataclass(frozen=True, kw_only=True)
class WorkerEnded(Event):
    """A worker died and is replaced; its document is retried, unless its attempts are used up."""

    kind = "worker_died"
    worker: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobEnded(Outcomes, Event):
    """The job is `done` or `cancelled`, `elapsed_s` seconds after it started or resumed.

    `deleted` is the number of documents that a sync deleted.
    """

    kind = "ended"
    state: str
    deleted: int
    elapsed_s: float


class RateMeter:
    """The speed of a job over the last minute: its first minute says little about its tenth hour."""

    def __init__(self) -> None:
        self._begun = False
        self._seen: deque[tuple[float, Counts]] = deque()

    def see(self, now_s: float, counts: Counts) -> tuple[float, float, float | None]:
        """Record the counts at a point in time.

        Returns:
            Documents done or failed per second, tokens compressed per second, and the estimated remaining time in
            seconds, by the sizes of the documents if they are known; None while it is unknown.
        """
        if not self._begun:
            self._seen.clear()  # the time for loading models does not count
        self._begun = self._begun or bool(counts.running)
        self._seen.append((now_s, counts))
        while len(self._seen) > 2 and now_s - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()
        begin_s, begin = self._seen[0]
        elapsed_s = max(now_s - begin_s, 1e-3)
        n_documents = counts.done + counts.failed - begin.done - begin.failed
        done, left = n_documents, counts.open
        if counts.open_bytes:
            done, left = counts.done_bytes - begin.done_bytes, counts.open_bytes
        left_s = 0.0 if not counts.open else left / done * elapsed_s if done else None
        return n_documents / elapsed_s, (counts.n_tokens - begin.n_tokens) / elapsed_s, left_s
