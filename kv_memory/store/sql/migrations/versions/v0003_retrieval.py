"""What passages are found by besides their words: stems of a language, headings, and the vector of an encoder.

Revision: 0003. Passages from before are found by their words, until their documents are added again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    for name, kind in (("headings", sa.Text()), ("language", sa.String(8)), ("encoder", sa.String(255))):
        op.add_column("passage", sa.Column(name, kind, nullable=False, server_default=sa.text("''")))
    op.add_column("passage", sa.Column("vector", sa.LargeBinary(), nullable=True))
