"""The catalog: transactions on one database, and its schema upgrades.

Every writing transaction, except with `alone=False`, keeps all other writers out from its first statement: `BEGIN
IMMEDIATE` on SQLite, an advisory lock on PostgreSQL. Rows that it has read therefore do not change under it. Blobs
are not written inside transactions, because an upload may take any time; named locks (`Catalog.hold`) keep a blob
from being removed before a row refers to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.orm import Session

from kv_memory.errors import StoreError, StoreVersionError, interruption_behind
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.engine import open_database
from kv_memory.store.sql.schema import SCHEMA_HEAD

__all__ = ["BUSY_TIMEOUT_S", "MIGRATIONS", "Catalog"]

BUSY_TIMEOUT_S = 30.0
MIGRATIONS = Path(__file__).parent / "migrations"


class Catalog:
    """Transactions on one database. Thread-safe; may be carried over a fork.

    Args:
        where: Path of a SQLite file, created if missing, or URL of a PostgreSQL database.
        busy_timeout_s: Time that a writer waits for another one, in seconds.
        upgrade: Whether to upgrade old tables to this version's schema; if off, an old catalog is refused.

    Raises:
        StoreVersionError: A newer version of this package wrote the catalog, or an older one did and `upgrade` is
            off. It was not changed.
        StoreConnectionError: The server cannot be reached.
        StoreError: The database is not a catalog, or cannot be opened.
    """

    def __init__(self, where: Path | str, *, busy_timeout_s: float = BUSY_TIMEOUT_S, upgrade: bool = True) -> None:
        with mapped(where):
            self._database = open_database(where, busy_timeout_s=busy_timeout_s)
        self.where = self._database.where
        self._engine = self._database.engine
        reads, writes = self._database.options
        self._reader = self._engine.execution_options(**reads)
        self._writer = self._engine.execution_options(**writes)
        self._pid = os.getpid()
        try:
            with mapped(self.where):
                self._upgrade(allowed=upgrade)
        except BaseException:
            self.close()
            raise

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the catalog and blocks nobody."""
        with (
            mapped(self.where),
            self._after_fork(self._reader).connect() as connection,
            _not_used_again_if_interrupted(connection),
            Session(connection, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def write(self, *, alone: bool = True) -> Iterator[Session]:
        """A transaction that keeps other writers out from its start and is durable once it has committed.

        Args:
            alone: Whether to keep other writers out. False suits statements that are safe beside them, such as
                claiming a task: on PostgreSQL they then do not wait for the write lock.

        Raises:
            StoreLockedError: The write lock was not acquired within the busy timeout.
        """
        with (
            mapped(self.where),
            # Begun here and not by the session, which begins at its first statement: that may come after the blobs
            # were checked. And a session that is interrupted while it begins keeps other writers waiting.
            self._after_fork(self._writer).connect() as connection,
            _not_used_again_if_interrupted(connection),
            connection.begin(),
            Session(connection, expire_on_commit=False) as session,
            session.begin(),
        ):
            if alone:
                self._database.lock(connection)
            yield session

    def hold(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        """A context that holds a lock against all threads, processes and machines with this catalog, see `Locks.hold`.

        Args:
            name: Name of the lock, any text.
            wait: Whether to wait for a taken lock; if off, the context is then entered with False.
        """
        self._after_fork(self._engine)
        return self._database.hold(name, wait=wait)

    def revision(self) -> str | None:
        """The schema version of the catalog, None if it has none yet."""
        with mapped(self.where), self._engine.connect() as connection:
            return _revision(connection)

    def scrub(self) -> None:
        """Remove deleted data from the database's files: free pages and, with SQLite, the log. See `purge`."""
        with mapped(self.where):
            self._after_fork(self._engine)
            self._database.scrub()

    @classmethod
    def revision_at(cls, where: Path | str) -> str | None:
        """The schema version of a catalog of any version, which is left unchanged."""
        with mapped(where):
            database = open_database(where, busy_timeout_s=BUSY_TIMEOUT_S)
        try:
            with mapped(database.where), database.engine.connect() as connection:
                return _revision(connection)
        finally:
            database.engine.dispose()

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._engine.dispose()

    def _after_fork(self, engine: Engine) -> Engine:
        # A forked process must neither use nor close its parent's connections.
        if self._pid != os.getpid():
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        return engine

    def _upgrade(self, *, allowed: bool) -> None:
        with self._engine.connect() as connection:
            revision, empty = _revision(connection), _is_empty(connection)
        if revision == SCHEMA_HEAD:
            return
        if empty:
            self._database.create()
        elif not allowed and revision is not None:
            self._refuse_newer(revision)
            raise StoreVersionError(
                f"the store has schema {revision}, this version needs {SCHEMA_HEAD}",
                where=self.where,
                next_step="Run `kv-memory db upgrade` while nothing else uses the store.",
            )
        with self._writer.connect() as connection, connection.begin():
            self._database.lock(connection)
            # Under the write lock: of two processes that open an old store, the second finds it upgraded.
            self._migrate(connection)

    def _migrate(self, connection: Connection) -> None:
        # Imported here: Alembic takes longer to import than a store at head takes to open.
        from alembic import command
        from alembic.config import Config

        revision = _revision(connection)
        if revision is not None:
            self._refuse_newer(revision)
        elif not _is_empty(connection):
            raise StoreError(
                "this database is not a catalog of kv-memory",
                where=self.where,
                next_step="Choose another folder for the store, or another schema of the database.",
            )
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    def _refuse_newer(self, revision: str) -> None:
        if revision > SCHEMA_HEAD:  # versions are numbers of four digits
            raise StoreVersionError(
                f"the store has schema {revision}, this version supports up to {SCHEMA_HEAD}",
                where=self.where,
                next_step="Upgrade kv-memory to the version that wrote it. Nothing was changed.",
            )


@contextmanager
def _not_used_again_if_interrupted(connection: Connection) -> Iterator[None]:
    """Close the connection after Ctrl-C instead of returning it to the pool.

    A cursor may live on in the traceback, and SQLite refuses to commit while its statement is open. Closing a
    generator does not count as an interruption.
    """
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) or interruption_behind(error) is not None:
            connection.invalidate()
        raise


def _is_empty(connection: Connection) -> bool:
    if connection.dialect.name == "sqlite":
        return connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0
    return not inspect(connection).get_table_names()  # in the search path's schema


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
