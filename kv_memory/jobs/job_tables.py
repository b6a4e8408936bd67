"""The tables of jobs and their tasks, in the catalog of a store; the store's migrations create them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from kv_memory.store.sql.schema import Base, utc_now


class JobRow(Base):
    """A batch of documents to compress."""

    __tablename__ = "job"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id", ondelete="CASCADE"))
    state: Mapped[str] = mapped_column(String(16))
    sources: Mapped[dict[str, Any]]
    settings: Mapped[dict[str, Any]]
    # Fingerprint of its caches; known once a worker has loaded the model.
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    # Whether every document of the sources has its task.
    discovered: Mapped[bool] = mapped_column(default=False)
    n_deleted: Mapped[int] = mapped_column(default=0)
    n_unchanged: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
    finished_at: Mapped[datetime | None]


class TaskRow(Base):
    """One document of a job: an entry of the ledger."""

    __tablename__ = "task"
    __table_args__ = (
        UniqueConstraint("job_id", "document_id"),
        Index(None, "job_id", "state", "priority", "id"),  # for claiming a task
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    document_id: Mapped[str] = mapped_column(Text)
    uri: Mapped[str] = mapped_column(Text)
    # Lowest first: the negative size of the document in bytes, or 0 if it is unknown.
    priority: Mapped[int] = mapped_column(BigInteger, default=0)
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_expires_at: Mapped[datetime | None]
    # Result: added, replaced or unchanged; or the error.
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    notes: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    n_passages: Mapped[int] = mapped_column(default=0)
    n_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    cache_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    full_kv_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    elapsed_s: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
