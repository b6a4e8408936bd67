"""Alembic's environment. The connection comes from `Catalog`, already inside the transaction that holds the lock."""

from __future__ import annotations

from alembic import context

from kv_memory.store.sql.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    # Alembic thinks SQLite cannot roll DDL back; it can, and a half-made schema would be worse than none.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
