"""Budgets and ages, counters, passages without their text, and the ledger of jobs.

Revision: 0003. Everything that is there stays as it is: no bound, no age, texts kept.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables."""
    # Not in a batch, which would make `collection` again on SQLite: dropping the old one deletes, by the foreign keys,
    # all that belongs to it.
    op.add_column("collection", sa.Column("max_size_bytes", sa.BigInteger(), nullable=True))
    op.add_column("collection", sa.Column("ttl_s", sa.Double(), nullable=True))
    with op.batch_alter_table("passage") as table:
        table.alter_column("text", existing_type=sa.Text(), nullable=True)
        table.add_column(sa.Column("terms", sa.JSON(), nullable=True))
    op.create_index("ix_distilled_cache_expires_at", "distilled_cache", ["expires_at"])
    op.create_table(
        "option",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_option"),
    )
    op.create_table(
        "counter",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collection.id"], name="fk_counter_collection_id_collection", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_counter"),
        sa.UniqueConstraint("collection_id", "name", name="uq_counter_collection_id_name"),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("sources", sa.JSON(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=True),
        sa.Column("discovered", sa.Boolean(), nullable=False),
        sa.Column("n_deleted", sa.Integer(), nullable=False),
        sa.Column("n_unchanged", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collection.id"], name="fk_job_collection_id_collection", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
        sa.UniqueConstraint("name", name="uq_job_name"),
    )
    op.create_table(
        "task",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("document_id", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(), nullable=True),
        sa.Column("outcome", sa.String(16), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("n_passages", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_bytes", sa.BigInteger(), nullable=False),
        sa.Column("full_kv_bytes", sa.BigInteger(), nullable=False),
        sa.Column("elapsed_s", sa.Double(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_task_job_id_job", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_task"),
        sa.UniqueConstraint("job_id", "document_id", name="uq_task_job_id_document_id"),
    )
    op.create_index("ix_task_job_id_state_priority_id", "task", ["job_id", "state", "priority", "id"])


def downgrade() -> None:
    """Drop them; passages without their text go, because what came before cannot hold them."""
    for table_name in ("task", "job", "counter", "option"):
        op.drop_table(table_name)
    op.drop_index("ix_distilled_cache_expires_at", "distilled_cache")
    op.execute("DELETE FROM passage WHERE text IS NULL")
    with op.batch_alter_table("passage") as table:
        table.drop_column("terms")
        table.alter_column("text", existing_type=sa.Text(), nullable=False)
    op.drop_column("collection", "ttl_s")
    op.drop_column("collection", "max_size_bytes")
