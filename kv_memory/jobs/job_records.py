"""Records of the ledger: frozen dataclasses that are independent of the database."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kv_memory.errors import ConfigError

JobState = Literal["running", "interrupted", "done", "cancelled"]
"""`interrupted` is stored as `running`: no process drives the job any more."""
Outcome = Literal["added", "replaced", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings for reading and compressing a job's documents, kept in the ledger so that all workers use the same.

    Attributes:
        memory: `MemorySettings` as a dict.
        encoding: Encoding of text files without a byte order mark.
        id_field: Field with the id of a record; a record without one is named after its source and number.
        text_field: Field with the text of a record.
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
    """A job as stored in the ledger; times are in UTC.

    Attributes:
        name: Name, unique in the store.
        sources: Requested sources, `{"items": [SPEC, ...], "sync": bool}`.
        fingerprint: Digest of the caches' fingerprint; None until a worker has loaded the model.
        discovered: True once every document of the sources has a task.
        n_deleted: Number of documents deleted by a sync.
        n_unchanged: Number of documents that a sync found stored and unchanged; they have no tasks.
    """

    id: int
    name: str
    collection: str
    state: JobState
    sources: dict[str, Any]
    settings: JobSettings
    fingerprint: str | None
    discovered: bool
    n_deleted: int
    n_unchanged: int
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """A document of a source, without its text.

    Attributes:
        document_id: Id of the document in the collection.
        uri: Address from which a worker reads this document: `file:///a.md`, `file:///a.jsonl#BYTE OFFSET`.
        size_bytes: Size of the source in bytes; 0 if unknown. Larger documents are processed first, so that none is
            left alone at the end, and consecutive documents have about the same length.
        error: Error found while listing the source, in the form of `KVMemoryError.to_dict`; None if it can be read.
    """

    document_id: str
    uri: str
    size_bytes: int = 0
    error: dict[str, str | None] | None = None

    @property
    def locator(self) -> str:
        """The place of the document in its source: the part of the uri after the `#`."""
        return self.uri.partition("#")[2]


@dataclass(frozen=True, kw_only=True)
class Task(SourceItem):
    """A document that a worker has claimed."""

    id: int
    attempts: int


@dataclass(frozen=True, kw_only=True)
class FailedTask:
    """A document that failed, with the error in the form of `KVMemoryError.to_dict`."""

    document_id: str
    uri: str
    attempts: int
    error: Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class NotedTask:
    """A document that is stored, with remarks on what its parser replaced or lost."""

    document_id: str
    uri: str
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Passages and tokens compressed for a document, or a whole job, and the sizes of their new caches in bytes.

    `full_kv_bytes` is the size that the uncompressed caches would have.
    """

    n_passages: int = 0
    n_tokens: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskResult(Work):
    """The result of one document.

    Attributes:
        outcome: Kind of change to the document, where `unchanged` costs only a hash; None if it failed.
        error: Error of a failed document, in the form of `KVMemoryError.to_dict`; None if it is stored.
        notes: Remarks on a document that was added or replaced; None without any.
    """

    outcome: Outcome | None = None
    error: dict[str, str | None] | None = None
    notes: Sequence[str] | None = None
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcomes(Work):
    """Numbers of documents by outcome.

    Replaced ones had other text, metadata or settings; cancelled ones were left out because the job was cancelled;
    noted ones are stored, with remarks.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    failed: int = 0
    cancelled: int = 0
    noted: int = 0


@dataclass(frozen=True, kw_only=True)
class Counts(Outcomes):
    """The progress of a job.

    `done_bytes` and `open_bytes` are sizes of the sources of done and failed documents, and of pending and running
    ones, as far as known.
    """

    pending: int = 0
    running: int = 0
    done_bytes: int = 0
    open_bytes: int = 0

    @property
    def done(self) -> int:
        """Number of finished documents."""
        return self.added + self.replaced + self.unchanged

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
