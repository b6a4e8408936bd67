"""Records of the ledger: frozen dataclasses that are independent of the database."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from kv_memory.errors import ConfigError

JobState = Literal["running", "interrupted", "done", "cancelled"]
"""`interrupted` is stored as `running`: no process drives the job any more."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings for reading and compressing a job's documents, kept in the ledger so that all workers use the same.

    Attributes:
        memory: `MemorySettings` as a dict.
        encoding: Encoding of text files without a byte order mark.
        id_field: Field of a record that holds its id.
        text_field: Field of a record that holds its text.
        max_attempts: Number of workers that may die over one document before it counts as failed.
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
                next_step="With 3, a document counts as failed once three workers have died while processing it.",
            )
        for name in ("id_field", "text_field"):
            if not getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    "a field name must not be empty",
                    where=name,
                    next_step=f"Pass the name of a column to {option}, or leave the option out.",
                )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as stored in the ledger.

    Attributes:
        id: Id of the job's row.
        name: Name, unique in the store.
        collection_id: Id of the collection that receives the documents.
        collection: Name of this collection.
        state: State of the job: `running`, `interrupted`, `done` or `cancelled`.
        sources: Requested sources, `{"items": [SPEC, ...], "sync": bool}`.
        settings: Settings for reading and compressing the documents.
        fingerprint: Digest of the caches' fingerprint; None until a worker has loaded the model.
        discovered: True once every document of the sources has a task.
        n_deleted: Number of documents deleted by a sync.
        n_unchanged: Number of documents that a sync found stored and unchanged; they have no tasks.
        created_at: Time of creation, in UTC.
        updated_at: Time of the last change, in UTC.
        finished_at: Time of the end, in UTC; None while the job is unfinished.
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
    """The result of one document.

    Attributes:
        outcome: Kind of change to the document, where `unchanged` costs only a hash; None if it failed.
        error: Error of a failed document, in the form of `KVMemoryError.to_dict`; None if it is stored.
        n_passages: Number of passages compressed.
        n_tokens: Number of tokens compressed.
        cache_bytes: Size of the new distilled caches in bytes.
        full_kv_bytes: Size that their uncompressed caches would have, in bytes.
        elapsed_s: Processing time in seconds.
    """

    outcome: Literal["added", "replaced", "unchanged"] | None = None
    error: dict[str, str | None] | None = None
    n_passages: int = 0
    n_tokens: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FailedTask:
    """A document that failed, with the error in the form of `KVMemoryError.to_dict`."""

    document_id: str
    uri: str
    attempts: int
    error: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The progress of a job.

    Attributes:
        pending: Number of documents not yet claimed.
        running: Number of documents in progress.
        failed: Number of failed documents.
        cancelled: Number of documents left out because the job was cancelled.
        outcomes: Number of finished documents by outcome.
        n_passages: Number of passages compressed.
        n_tokens: Number of tokens compressed.
        cache_bytes: Size of the new distilled caches in bytes.
        full_kv_bytes: Size that their uncompressed caches would have, in bytes.
        done_bytes: Size in bytes of the sources of done and failed documents, as far as known.
        open_bytes: Size in bytes of the sources of pending and running documents, as far as known.
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
        """Number of finished documents."""
        return sum(self.outcomes.values())

    @property
    def open(self) -> int:
        """Number of documents pending or in progress."""
        return self.pending + self.running

    @property
    def total(self) -> int:
        """Number of documents found so far."""
        return self.open + self.done + self.failed + self.cancelled


def worker_name() -> str:
    """A worker name unique across machines; it starts with the host name."""
    return f"{socket.gethostname()[:100]}-{uuid.uuid4().hex[:12]}"
