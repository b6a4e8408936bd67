"""The catalog: transactions on one database, and its migrations.

Every writing transaction keeps all other writers out from its first statement: `BEGIN IMMEDIATE` on SQLite, an advisory
lock on PostgreSQL. So whoever has looked at rows in one may rely on what he saw. Blobs are not written in them, because
an upload takes as long as it likes; names that are held (`Catalog.hold`) keep a blob from being removed while somebody
is about to refer to it.
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
        where: A SQLite file, made if it is not there, or the URL of a PostgreSQL database.
        busy_timeout_s: How long a writer waits for another one, in seconds.
        upgrade: Bring old tables to this version's; else an old catalog is refused.

    Raises:
        StoreVersionError: A newer version of this package wrote it, or an older one and `upgrade` is off. It was not
            touched.
        StoreConnectionError: The server cannot be reached.
        StoreError: It is no catalog, or cannot be opened.
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
            alone: False for statements that are safe beside other writers, such as claiming a task: on PostgreSQL they
                then need not wait for their turn.

        Raises:
            StoreLockedError: The turn did not come within the busy timeout.
        """
        with (
            mapped(self.where),
            # Begun here and not by the session, which does so at its first statement, and that may come after the blobs
            # were looked at; and which, interrupted while it begins, keeps the others waiting.
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
        """A context in which no other thread, process or machine with this catalog holds the name.

        Args:
            name: Any text.
            wait: Wait for whoever holds it; else the context is entered with False.
        """
        self._after_fork(self._engine)
        return self._database.hold(name, wait=wait)

    def revision(self) -> str | None:
        """The version of the tables, None where there are none."""
        with mapped(self.where), self._engine.connect() as connection:
            return _revision(connection)

    def scrub(self) -> None:
        """Take out of the database's files what was deleted: free pages and, with SQLite, the log. See `purge`."""
        with mapped(self.where):
            self._after_fork(self._engine)
            self._database.scrub()

    @classmethod
    def revision_at(cls, where: Path | str) -> str | None:
        """The version of the tables of a catalog, whatever it is; they are not touched."""
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
        # Connections must not be used on the other side of a fork, nor closed there.
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
                next_step="Run `kv-memory db upgrade`, with nothing else at work on the store.",
            )
        with self._writer.connect() as connection, connection.begin():
            self._database.lock(connection)
            # Alone now, so of two processes that open an old store the second finds it done.
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
        if revision > SCHEMA_HEAD:  # they are numbers of four digits
            raise StoreVersionError(
                f"the store has schema {revision}, this version knows up to {SCHEMA_HEAD}",
                where=self.where,
                next_step="Upgrade kv-memory to the version that wrote it. Nothing was changed.",
            )


@contextmanager
def _not_used_again_if_interrupted(connection: Connection) -> Iterator[None]:
    """Close the connection after Ctrl-C rather than give it back to the pool.

    A cursor may live on in the traceback, and SQLite refuses to commit beside its statement. Closing a generator is
    no interruption.
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
    return not inspect(connection).get_table_names()  # of the search path's schema


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
