"""What the ledger tells: frozen records without any database behind them."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from kv_memory.errors import ConfigError

__all__ = [
    "Counts",
    "FailedResult",
    "FailedTask",
    "Job",
    "JobSettings",
    "JobState",
    "Task",
    "TaskResult",
    "job_name",
    "worker_name",
]

JobState = Literal["running", "interrupted", "done", "cancelled"]
"""`running` in the ledger is `interrupted` where nobody drives the job any more."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How a job's documents are read and compressed; kept in the ledger, so that every worker does the same.

    Attributes:
        memory: `MemorySettings` as a dict.
        encoding: Of text files without a byte order mark.
        id_field: The field of a record that names it.
        text_field: The field of a record that is its text.
        max_attempts: How many workers may die over one document before it counts as failed.
    """

    memory: dict[str, Any]
    encoding: str = "utf-8"
    id_field: str = "id"
    text_field: str = "text"
    max_attempts: int = 3

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(
                f"max_attempts must be at least 1, got {self.max_attempts}",
                where="max_attempts",
                next_step="3 lets a worker die twice over a document before that counts as failed.",
            )
        for name in ("id_field", "text_field"):
            if not getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    "a field has a name, and this one is empty",
                    where=name,
                    next_step=f"Give {option} the name of a column, or leave the option out.",
                )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the ledger has it.

    Attributes:
        id: Its row.
        name: Unique in the store.
        collection_id: The collection its documents go into.
        collection: Its name.
        state: `running`, `interrupted`, `done` or `cancelled`.
        sources: What was asked for: `{"items": [...], "sync": FOLDER or None, ...}`.
        settings: How documents are read and compressed.
        fingerprint: Digest of what its caches are made under; None until a worker has loaded the model.
        discovered: Whether every document of the sources has its task by now.
        n_deleted: Documents that a sync has deleted.
        n_unchanged: Documents that a sync found stored and unchanged; they have no tasks.
        created_at: UTC.
        updated_at: UTC.
        finished_at: UTC; None while there is something to do.
    """

    id: int
    name: str
    collection_id: int
    collection: str
    state: JobState
    sources: dict[str, Any]
    settings: JobSettings
    fingerprint: str | None
    discovered: bool
    n_deleted: int
    n_unchanged: int
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A document that a worker has claimed."""

    id: int
    job_id: int
    document_id: str
    uri: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What became of a document.

    Attributes:
        outcome: `unchanged` ones cost a hash.
        n_passages: Compressed for it.
        n_tokens: Compressed for it.
        cache_bytes: Of the new distilled caches.
        full_kv_bytes: What their uncompressed caches would take.
        elapsed_s: From the claim to here.
    """

    outcome: Literal["added", "replaced", "unchanged"]
    n_passages: int = 0
    n_tokens: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FailedResult:
    """Why a document cannot be compressed: the error as `KVMemoryError.to_dict` has it."""

    error: dict[str, str | None]
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FailedTask:
    """A document that failed, with the error as `KVMemoryError.to_dict` has it."""

    document_id: str
    uri: str
    attempts: int
    error: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How far a job is.

    Attributes:
        pending: Documents to do.
        running: Documents that workers have in hand.
        failed: Documents that failed.
        cancelled: Documents left out because the job was cancelled.
        outcomes: Documents done, by what became of them.
        n_passages: Compressed.
        n_tokens: Compressed.
        cache_bytes: Of the new distilled caches.
        full_kv_bytes: What their uncompressed caches would take.
        done_bytes: Size of the sources of what is done or failed, where known.
        open_bytes: Size of the sources of what is pending or running, where known.
    """

    pending: int = 0
    running: int = 0
    failed: int = 0
    cancelled: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    n_passages: int = 0
    n_tokens: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0
    done_bytes: int = 0
    open_bytes: int = 0

    @property
    def done(self) -> int:
        """Documents done."""
        return sum(self.outcomes.values())

    @property
    def open(self) -> int:
        """Documents pending or in hand."""
        return self.pending + self.running

    @property
    def total(self) -> int:
        """Documents found so far."""
        return self.open + self.done + self.failed + self.cancelled


def worker_name() -> str:
    """A name no other worker has, on any machine; begins with this one's."""
    return f"{socket.gethostname()[:100]}-{uuid.uuid4().hex[:12]}"


def job_name() -> str:
    """A name for a job that was given none: the time, so that they sort, and a little chance."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
