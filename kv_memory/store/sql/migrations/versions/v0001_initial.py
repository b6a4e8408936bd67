"""The first catalog, with the tables of `kv_memory.jobs`.

Revision: 0001. Types are written out rather than taken from schema.py: a migration must not change with the models.
Names of constraints follow the convention of `Base.metadata`, which `env.py` gives to Alembic.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "collection",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False, unique=True),
        *_columns(sa.Integer(), "revision"),
        *_columns(sa.JSON(), "settings"),
        *_columns(sa.BigInteger(), "max_size_bytes", nullable=True),
        *_columns(sa.Double(), "ttl_s", nullable=True),
        *_columns(sa.DateTime(), "created_at"),
    )
    op.create_table(
        "document",
        *_owned_by("collection", "collection_id"),
        *_columns(sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), "document_id"),
        *_columns(sa.String(64), "content_sha256"),
        *_columns(sa.Text(), "source_uri", nullable=True),
        *_columns(sa.JSON(), "metadata"),
        *_columns(sa.Integer(), "passage_tokens", nullable=True),
        *_columns(sa.DateTime(), "created_at", "updated_at"),
        sa.UniqueConstraint("collection_id", "document_id"),
    )
    op.create_table(
        "passage",
        *_owned_by("document", "document_pk"),
        *_columns(sa.Integer(), "ordinal", "n_tokens"),
        *_columns(sa.Text(), "text", nullable=True),
        *_columns(sa.JSON(), "terms", nullable=True),
        sa.Column("text_sha256", sa.String(64), nullable=False, index=True),
        sa.UniqueConstraint("document_pk", "ordinal"),
    )
    op.create_table("fingerprint", sa.Column("digest", sa.String(64), primary_key=True), *_columns(sa.Text(), "json"))
    op.create_table(
        "distilled_cache",
        *_owned_by("collection", "collection_id"),
        *_columns(sa.String(64), "text_sha256"),
        sa.Column("fingerprint", sa.String(64), sa.ForeignKey("fingerprint.digest"), nullable=False),
        *_columns(sa.Text(), "method"),
        *_columns(sa.Double(), "keep_ratio"),
        *_columns(sa.Integer(), "n_tokens", "n_kept", "refined_steps"),
        *_columns(sa.String(32), "dtype"),
        *_columns(sa.BigInteger(), "size_bytes"),
        sa.Column("blob_key", sa.String(64), nullable=False, index=True),
        *_columns(sa.Double(), "fidelity", nullable=True),
        *_columns(sa.Boolean(), "pinned"),
        *_columns(sa.DateTime(), "created_at"),
        *_columns(sa.DateTime(), "last_used_at", nullable=True),
        sa.Column("expires_at", sa.DateTime(), index=True),
        sa.UniqueConstraint(
            "collection_id", "text_sha256", "fingerprint", "keep_ratio", name="uq_distilled_cache_text_settings"
        ),
    )
    op.create_table(
        "prefix",
        *_owned_by("collection", "collection_id"),
        *_columns(sa.Text(), "key"),
        *_columns(sa.BigInteger(), "size_bytes"),
        sa.Column("blob_key", sa.String(64), nullable=False, index=True),
        *_columns(sa.DateTime(), "created_at"),
        sa.UniqueConstraint("collection_id", "key"),
    )
    op.create_table("option", sa.Column("key", sa.String(64), primary_key=True), *_columns(sa.JSON(), "value"))
    op.create_table(
        "job",
        *_owned_by("collection", "collection_id"),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        *_columns(sa.String(16), "state"),
        *_columns(sa.JSON(), "sources", "settings"),
        *_columns(sa.String(64), "fingerprint", nullable=True),
        *_columns(sa.Boolean(), "discovered"),
        *_columns(sa.Integer(), "n_deleted", "n_unchanged"),
        *_columns(sa.DateTime(), "created_at", "updated_at"),
        *_columns(sa.DateTime(), "finished_at", nullable=True),
    )
    op.create_table(
        "task",
        *_owned_by("job", "job_id"),
        *_columns(sa.Text(), "document_id", "uri"),
        *_columns(sa.String(16), "state"),
        *_columns(sa.Integer(), "attempts", "n_passages"),
        *_columns(sa.BigInteger(), "priority", "n_tokens", "cache_bytes", "full_kv_bytes"),
        *_columns(sa.String(255), "worker", nullable=True),
        *_columns(sa.String(16), "outcome", nullable=True),
        *_columns(sa.JSON(), "error", nullable=True),
        *_columns(sa.Double(), "elapsed_s", nullable=True),
        *_columns(sa.DateTime(), "created_at", "updated_at"),
        *_columns(sa.DateTime(), "lease_expires_at", nullable=True),
        sa.UniqueConstraint("job_id", "document_id"),
        sa.Index(None, "job_id", "state", "priority", "id"),
    )


def _columns(kind: sa.types.TypeEngine[Any], *names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=nullable) for name in names]


def _owned_by(table: str, name: str) -> list[sa.Column[int]]:
    owner = sa.ForeignKey(f"{table}.id", ondelete="CASCADE")
    return [sa.Column("id", sa.Integer(), primary_key=True), sa.Column(name, sa.Integer(), owner, nullable=False)]
