"""The catalog's tables, as typed ORM classes. Every change needs a migration; a test compares the two.

The tables of `kv_memory.jobs` are in `kv_memory/jobs/job_tables.py`, with the same `Base`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Double,
    ForeignKey,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# The newest migration. Written here, so that opening a store at head need not import Alembic; a test checks it.
SCHEMA_HEAD = "0003"
_EMPTY = text("''")  # a default of the database, for rows from before their column


def utc_now() -> datetime:
    """The current time as an aware datetime in UTC."""
    return datetime.now(UTC)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC; SQLite drops the time zone, and would return an aware datetime as a naive one."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to naive UTC."""
        assert value is None or value.tzinfo is not None, "naive datetime"
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert back to aware UTC."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Names every constraint, because SQLite's batch migrations can only drop what has a name."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UTCDateTime, dict[str, Any]: JSON, float: Double}  # noqa: RUF012


class CollectionRow(Base):
    """A tenant: every lookup names one."""

    __tablename__ = "collection"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    revision: Mapped[int] = mapped_column(default=0)
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)
    # Size limit of its distilled caches together, and lifetime of each after it was put; None for no limit.
    max_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    ttl_s: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class OptionRow(Base):
    """A setting of the whole store, e.g. its size limit."""

    __tablename__ = "option"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[dict[str, Any]]


class DocumentRow(Base):
    """A document; its text lives in its passages."""

    __tablename__ = "document"
    __table_args__ = (UniqueConstraint("collection_id", "document_id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id", ondelete="CASCADE"))
    # By code points in both databases: PostgreSQL would order by the language of the server.
    document_id: Mapped[str] = mapped_column(Text().with_variant(Text(collation="C"), "postgresql"))
    content_sha256: Mapped[str] = mapped_column(String(64))
    source_uri: Mapped[str | None] = mapped_column(Text)
    # `metadata` is reserved on declarative classes.
    details: Mapped[dict[str, Any]] = mapped_column("metadata")
    passage_tokens: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now)


class PassageRow(Base):
    """One passage of a document."""

    __tablename__ = "passage"
    __table_args__ = (UniqueConstraint("document_pk", "ordinal"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    document_pk: Mapped[int] = mapped_column(ForeignKey("document.id", ondelete="CASCADE"))
    ordinal: Mapped[int]
    # The text and the headings above it, if the user asked to keep texts; otherwise hashes of their words and stems
    # with their counts, for retrieval.
    text: Mapped[str | None] = mapped_column(Text)
    headings: Mapped[str] = mapped_column(Text, server_default=_EMPTY)
    terms: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    language: Mapped[str] = mapped_column(String(8), server_default=_EMPTY)
    # The vector that an encoder made of it, for retrieval; the name is empty without one.
    encoder: Mapped[str] = mapped_column(String(255), server_default=_EMPTY)
    vector: Mapped[bytes | None] = mapped_column(LargeBinary)
    text_sha256: Mapped[str] = mapped_column(String(64), index=True)
    n_tokens: Mapped[int]


class FingerprintRow(Base):
    """A fingerprint in full, so that a mismatch can name both sides."""

    __tablename__ = "fingerprint"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    json: Mapped[str] = mapped_column(Text)


class CacheRow(Base):
    """A distilled cache, keyed by text and not by passage: equal texts share it, and it may precede its document."""

    __tablename__ = "distilled_cache"
    __table_args__ = (
        # Named explicitly: the convention's name has 67 letters, and PostgreSQL allows 63.
        UniqueConstraint(
            "collection_id", "text_sha256", "fingerprint", "keep_ratio", name="uq_distilled_cache_text_settings"
        ),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id", ondelete="CASCADE"))
    text_sha256: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(ForeignKey("fingerprint.digest"))
    method: Mapped[str] = mapped_column(Text)
    keep_ratio: Mapped[float]
    n_tokens: Mapped[int]
    n_kept: Mapped[int]
    dtype: Mapped[str] = mapped_column(String(32))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    blob_key: Mapped[str] = mapped_column(String(64), index=True)
    fidelity: Mapped[float | None]
    refined_steps: Mapped[int] = mapped_column(default=0)
    pinned: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None] = mapped_column(index=True)


class PrefixRow(Base):
    """The cache of a shared prefix, under a key chosen by the caller."""

    __tablename__ = "prefix"
    __table_args__ = (UniqueConstraint("collection_id", "key"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    blob_key: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
