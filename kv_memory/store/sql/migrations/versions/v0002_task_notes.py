"""Remarks on the documents of a job: what their parsers replaced or lost.

Revision: 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("task", sa.Column("notes", sa.JSON(), nullable=True))
