"""How many steps of refinement are behind a cache.

Revision: 0002. Caches that are there were never refined: 0.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["downgrade", "upgrade"]

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the default is for the rows that are there, and goes again."""
    column = sa.Column("refined_steps", sa.Integer(), nullable=False, server_default="0")
    with op.batch_alter_table("distilled_cache", recreate="always") as table:
        table.add_column(column, insert_after="fidelity")
    with op.batch_alter_table("distilled_cache", recreate="always") as table:
        table.alter_column("refined_steps", existing_type=sa.Integer(), server_default=None)


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("distilled_cache", recreate="always") as table:
        table.drop_column("refined_steps")
