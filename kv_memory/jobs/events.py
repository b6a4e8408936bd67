"""What a job tells while it runs: events, each a frozen record."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kv_memory.jobs.records import Counts

__all__ = ["DocumentFailed", "Event", "JobEnded", "JobStarted", "Progress", "Speedometer", "WorkerEnded"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; `kind` names it for machines."""

    kind: ClassVar[str]
    job: str


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A job begins, or goes on.

    Attributes:
        sources: What it reads, for people.
        resumed: It was begun before.
    """

    kind = "started"
    sources: tuple[str, ...]
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """How far a job is.

    Attributes:
        discovered: Whether all documents are known; else `total` grows.
        total: Documents known.
        done: Documents done.
        failed: Documents that failed.
        in_hand: Documents that workers are at.
        n_tokens: Compressed in this job.
        n_workers: Worker processes at work.
        elapsed_s: Since the job began or went on.
        documents_per_s: Lately.
        tokens_per_s: Lately.
        left_s: Estimate; None where nothing is known yet.
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
class DocumentFailed(Event):
    """A document failed; the job goes on."""

    kind = "failed"
    document_id: str
    uri: str
    attempts: int
    error: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class WorkerEnded(Event):
    """A worker died and is replaced; its document is done again."""

    kind = "worker_died"
    worker: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobEnded(Event):
    """There is nothing left to do.

    Attributes:
        state: `done` or `cancelled`.
        added: Documents that are new.
        replaced: Documents whose text, metadata or settings had changed.
        unchanged: Documents for which there was nothing to do.
        deleted: Documents that a sync has deleted.
        failed: Documents that failed.
        cancelled: Documents left out because the job was cancelled.
        n_passages: Compressed.
        n_tokens: Compressed.
        cache_bytes: Of the new distilled caches.
        full_kv_bytes: What their uncompressed caches would take.
        elapsed_s: Since the job began or went on.
    """

    kind = "ended"
    state: str
    added: int
    replaced: int
    unchanged: int
    deleted: int
    failed: int
    cancelled: int
    n_passages: int
    n_tokens: int
    cache_bytes: int
    full_kv_bytes: int
    elapsed_s: float


class Speedometer:
    """How fast a job is, lately: a job's first minute says little about its tenth hour.

    Args:
        window_s: What counts as lately, in seconds.
    """

    def __init__(self, *, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._begun = False
        self._seen: deque[tuple[float, int, int, int]] = deque()

    def see(self, now_s: float, counts: Counts) -> None:
        """Look at the counts at a time."""
        if len(self._seen) == 1 and not self._begun:
            self._seen.clear()  # the time in which models are loaded is not that of documents
        self._begun = self._begun or bool(counts.running)
        self._seen.append((now_s, counts.done + counts.failed, counts.n_tokens, counts.done_bytes))
        while len(self._seen) > 2 and now_s - self._seen[1][0] > self._window_s:
            self._seen.popleft()

    @property
    def documents_per_s(self) -> float:
        """Documents done or failed a second."""
        return self._rate(1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens compressed a second."""
        return self._rate(2)

    def left_s(self, counts: Counts) -> float | None:
        """How long the rest takes, by the sizes of the documents where these are known."""
        if not counts.open:
            return 0.0
        done, left = (self._rate(3), counts.open_bytes) if counts.open_bytes else (self._rate(1), counts.open)
        return left / done if done else None

    def _rate(self, column: int) -> float:
        if len(self._seen) < 2:
            return 0.0
        first, last = self._seen[0], self._seen[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-3)
