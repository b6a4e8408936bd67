"""The catalog: transactions on one database, and its schema upgrades.

Every writing transaction, except with `alone=False`, keeps all other writers out from its first statement: `BEGIN
IMMEDIATE` on SQLite, an advisory lock on PostgreSQL. Rows that it has read therefore do not change under it. Blobs are
written before such a transaction, because an upload may take any time, and removed inside one (see `BlobReferences`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.orm import Session

from kv_memory.errors import ConfigError, StoreError, interruption_behind
from kv_memory.store.error_mapping import mapped, raise_mapped
from kv_memory.store.sql.engine import open_database
from kv_memory.store.sql.schema import SCHEMA_HEAD

_T = TypeVar("_T")
MIGRATIONS = Path(__file__).parent / "migrations"


class Catalog:
    """Transactions on one database. Thread-safe; may be carried over a fork.

    Args:
        where: Path of a SQLite file, created if missing, or URL of a PostgreSQL database.
        durable: Whether a SQLite file survives a power cut after each transaction.
    """

    def __init__(self, where: Path | str, *, durable: bool = True) -> None:
        with mapped(where):
            self._database = open_database(where, durable=durable)
        self.where = self._database.where
        self.durable = durable
        self._engine = self._database.engine
        self._reader = self._engine.execution_options(**self._database.reading)
        self._writer = self._engine.execution_options(**self._database.writing)
        self._pid = os.getpid()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    def read(self) -> AbstractContextManager[Session]:
        """A transaction that sees one state of the catalog and blocks nobody."""
        return self._transaction(self._reader, self._database.begin_read)

    def write(self, *, alone: bool = True) -> AbstractContextManager[Session]:
        """A transaction that keeps other writers out from its start and is durable once it has committed.

        Args:
            alone: Whether to keep other writers out. False suits statements that are safe beside them, such as
                claiming a task: on PostgreSQL they then do not wait for the write lock.

        Raises:
            StoreLockedError: The write lock was not acquired within the busy timeout.
        """
        begin = self._database.begin_alone if alone else self._database.begin_write
        return self._transaction(self._writer, begin)

    @contextmanager
    def _transaction(self, engine: Engine, begin: str | None) -> Iterator[Session]:
        if self._pid != os.getpid():
            self._after_fork()
        try:
            # Begun here and not by the session, which begins at its first statement: that may come after the blobs
            # were checked. And a session that is interrupted while it begins keeps other writers waiting.
            with engine.connect() as connection:
                try:
                    with connection.begin():
                        if begin is not None:
                            connection.exec_driver_sql(begin)
                        with Session(connection, expire_on_commit=False) as session, session.begin():
                            yield session
                except GeneratorExit:  # a generator that is closed was not interrupted
                    raise
                except BaseException as error:
                    # Close the connection after Ctrl-C instead of returning it to the pool: a cursor may live on in
                    # the traceback, and SQLite refuses to commit while its statement is open.
                    if not isinstance(error, Exception) or interruption_behind(error) is not None:
                        connection.invalidate()
                    raise
        except UnicodeEncodeError as error:
            raise ConfigError(
                "half a surrogate pair, which no database stores",
                where=ascii(error.object)[:120],
                next_step='Replace it: text.encode(errors="replace").decode().',
            ) from error
        except Exception as error:
            raise_mapped(error, self.where)

    def hold(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        """A context that holds a lock against all threads, processes and machines with this catalog.

        Arguments and value are those of `FileLocks.hold`.
        """
        if self._pid != os.getpid():
            self._after_fork()
        return self._database.locks.hold(name, wait=wait)

    def revision(self) -> str | None:
        """The schema version of the catalog, which may be of any version; None if it has none yet."""
        with mapped(self.where), self._engine.connect() as connection:
            return _schema_of(connection)[0]

    def scrub(self) -> None:
        """Remove deleted data from the database's files: free pages and, with SQLite, the log. See `purge`."""
        with mapped(self.where):
            self._database.scrub()

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._engine.dispose()

    def _after_fork(self) -> None:
        # A forked process must neither use nor close its parent's connections.
        self._engine.dispose(close=False)
        self._pid = os.getpid()

    def upgrade(self, *, allowed: bool = True) -> None:
        """Create missing tables, and upgrade old ones to this version's schema.

        Args:
            allowed: Whether to upgrade old tables; if off, they are refused.

        Raises:
            StoreError: A newer version of this package wrote the catalog, or an older one did and `allowed` is off; the
                database is not a catalog, or cannot be opened. It was not changed.
            StoreConnectionError: The server cannot be reached.
        """
        with mapped(self.where):
            with self._engine.connect() as connection:
                revision, empty = _schema_of(connection)
            if revision == SCHEMA_HEAD:
                return
            if empty:
                self._database.create()
            elif not allowed and revision is not None:
                self._refuse_newer(revision)
                raise StoreError(
                    f"the store has schema {revision}, this version needs {SCHEMA_HEAD}",
                    where=self.where,
                    next_step="Run `kv-memory db upgrade` while nothing else uses the store.",
                )
            with self._writer.connect() as connection, connection.begin():
                # Under the write lock: of two processes that open an old store, the second finds it upgraded.
                connection.exec_driver_sql(self._database.begin_alone)
                self._migrate(connection)

    def _migrate(self, connection: Connection) -> None:
        # Imported here: Alembic takes longer to import than a store at head takes to open.
        from alembic import command
        from alembic.config import Config

        revision, empty = _schema_of(connection)
        if revision is not None:
            self._refuse_newer(revision)
        elif not empty:
            raise StoreError(
                "this database is not a catalog of kv-memory",
                where=self.where,
                next_step="Choose another folder for the store, or another schema of the database.",
            )
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        command.upgrade(config, "head")

    def _refuse_newer(self, revision: str) -> None:
        if revision > SCHEMA_HEAD:  # versions are numbers of four digits
            raise StoreError(
                f"the store has schema {revision}, this version supports up to {SCHEMA_HEAD}",
                where=self.where,
                next_step="Upgrade kv-memory to the version that wrote it. Nothing was changed.",
            )


def batches(items: Iterable[_T], size: int = 500) -> Iterator[list[_T]]:
    """Split items into lists of at most `size`: SQLite limits the variables of a statement, in old builds to 999."""
    everything = list(items)
    for start in range(0, len(everything), size):
        yield everything[start : start + size]


def _schema_of(connection: Connection) -> tuple[str | None, bool]:
    """The schema version, None without one, and whether the database (the schema in the search path) has no table."""
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        return None, not tables
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision, False
