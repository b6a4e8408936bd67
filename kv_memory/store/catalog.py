"""The catalog: one SQLite database, its transactions, and its migrations.

Every writing transaction begins with `BEGIN IMMEDIATE`, so it holds SQLite's one write lock from its first statement.
The store leans on that lock for more than rows: a blob is written, and unreferenced blobs are removed, only inside a
writing transaction. So nobody can refer to a blob while it is being removed, and a collection of garbage never meets
an unfinished write. A lock file was rejected: it needs platform code, and this lock already dies with its process.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from kv_memory.errors import StoreError, StoreVersionError
from kv_memory.store.faults import mapped
from kv_memory.store.schema import SCHEMA_HEAD

__all__ = ["BUSY_TIMEOUT_S", "MIGRATIONS", "Catalog"]

BUSY_TIMEOUT_S = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"


class Catalog:
    """Transactions on one database file. Thread-safe; may be carried over a fork.

    Args:
        file: The SQLite file; made if it is not there.
        busy_timeout_s: How long a writer waits for another one, in seconds.

    Raises:
        StoreVersionError: A newer version of this package wrote the file. It was not touched.
        StoreError: The file is no catalog, or cannot be opened.
    """

    def __init__(self, file: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.file = file
        self._busy_timeout_s = busy_timeout_s
        self._engine = create_engine(
            URL.create("sqlite", database=str(file)),
            connect_args={"timeout": busy_timeout_s, "check_same_thread": False, "isolation_level": None},
            poolclass=QueuePool,
            max_overflow=-1,  # SQLite is the one to make callers wait, with an error we can name
        )
        event.listen(self._engine, "connect", _set_pragmas)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(kv_memory_write=True)
        self._pid = os.getpid()
        try:
            with mapped(file):
                self._upgrade()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the catalog and blocks nobody."""
        with (
            mapped(self.file),
            Session(self._after_fork(self._engine), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that holds the write lock from its start and is durable once it has committed.

        Raises:
            StoreLockedError: The lock was not to be had within the busy timeout.
        """
        with (
            mapped(self.file),
            Session(self._after_fork(self._writer), expire_on_commit=False) as session,
            session.begin(),
        ):
            # A session begins at its first statement, which may come after the blobs were looked at. Begin now.
            session.connection()
            yield session

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._engine.dispose()

    def _after_fork(self, engine: Engine) -> Engine:
        # SQLite's connections must not be used on the other side of a fork, nor closed there.
        if self._pid != os.getpid():
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        return engine

    def _upgrade(self) -> None:
        with self._engine.connect() as connection:
            if _revision(connection) == SCHEMA_HEAD:
                return
            empty = _is_empty(connection)
        if empty:
            self._switch_to_wal()
        with self._writer.connect() as connection, connection.begin():
            # Under the lock now, so of two processes that open an old store the second finds it done.
            self._migrate(connection)

    def _migrate(self, connection: Connection) -> None:
        # Imported here: Alembic takes longer to import than a store at head takes to open.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        revision = _revision(connection)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            raise StoreVersionError(
                f"the store has schema {revision}, this version knows up to {SCHEMA_HEAD}",
                where=str(self.file),
                next_step="Upgrade kv-memory to the version that wrote it. Nothing was changed.",
            )
        if revision is None and not _is_empty(connection):
            raise StoreError(
                "this database is not a catalog of kv-memory",
                where=str(self.file),
                next_step="Choose another folder for the store.",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    def _switch_to_wal(self) -> None:
        # Once, at birth: the mode is kept in the file. SQLite does not wait for its busy timeout here, so we do.
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                with closing(sqlite3.connect(self.file, timeout=self._busy_timeout_s)) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "is locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def _set_pragmas(connection: Any, _entry: ConnectionPoolEntry) -> None:
    # FULL: a row that names a blob must survive a power cut once put() has returned. Reading pays nothing for it.
    for pragma in ("foreign_keys = ON", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # Upgrading a read transaction to a write fails at once if anybody wrote in between; so writers say so first.
    writes = connection.get_execution_options().get("kv_memory_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_empty(connection: Connection) -> bool:
    return connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0


def _revision(connection: Connection) -> str | None:
    tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").all()
    if not tables:
        return None
    revision: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return revision
