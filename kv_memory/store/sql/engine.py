"""Differences between SQLite and PostgreSQL: connect, begin, create and scrub.

All other statements of the catalog are the same for both.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import tenacity
from sqlalchemy import URL, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from kv_memory.errors import ConfigError, StoreLockedError
from kv_memory.store.error_mapping import mapped, refused_login
from kv_memory.store.fs import private_file
from kv_memory.store.sql.locks import FileLocks, PostgresLocks

BUSY_TIMEOUT_S = 30.0  # a writer's wait for another one
_WRITE = "Write postgresql+psycopg://USER@HOST/DATABASE, or leave it out for SQLite in the store's folder."


def open_database(where: Path | str, *, durable: bool = True) -> SQLiteDatabase | PostgresDatabase:
    """The database at a file, or at a URL `postgresql+psycopg://USER@HOST/NAME?schema=NAME`.

    Raises:
        ConfigError: The URL is invalid or names another kind of database, or psycopg is not installed.
    """
    if isinstance(where, Path):
        return SQLiteDatabase(where, durable=durable)
    try:
        url = make_url(where)
    except ArgumentError:
        raise ConfigError("this is not a database URL", where="catalog", next_step=_WRITE) from None
    if url.get_backend_name() == "postgresql":
        return PostgresDatabase(url.set(drivername="postgresql+psycopg"))
    raise ConfigError(
        f"a catalog outside the folder must be in PostgreSQL, not in {url.get_backend_name()}",
        where="catalog",
        next_step=_WRITE,
    )


class SQLiteDatabase:
    """A file in the store's folder, with one writer at a time by SQLite's own lock.

    Attributes:
        where: Name of the database in errors.
        reading, writing: Execution options of transactions.
        begin_read, begin_write: Statements that begin transactions.
        begin_alone: Statement that begins a writing transaction and keeps other writers out.
    """

    reading: dict[str, Any] = {}  # noqa: RUF012
    writing: dict[str, Any] = {}  # noqa: RUF012
    begin_read = "BEGIN"
    # Upgrading a read transaction to a write fails at once if another writer wrote in between.
    begin_write = begin_alone = "BEGIN IMMEDIATE"

    def __init__(self, file: Path, *, durable: bool) -> None:
        self.file = file
        self.where = str(file)
        self.locks = FileLocks(file.with_name("locks"))
        # FULL: a row that names a blob must survive a power cut once put() has returned. Reads are as fast as before.
        self._pragmas = ("foreign_keys = ON", f"synchronous = {'FULL' if durable else 'OFF'}")
        self.engine = create_engine(
            URL.create("sqlite", database=str(file)),
            connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False, "isolation_level": None},
            hide_parameters=True,  # otherwise errors would print the texts in the statements
            poolclass=QueuePool,
            max_overflow=-1,  # callers wait in SQLite, whose error we can map, not in the pool
        )
        event.listen(self.engine, "connect", self._set_pragmas)
        event.listen(self.engine, "invalidate", self._roll_back)
        private_file(file)

    def create(self) -> None:
        """Switch a new file to the write-ahead log; the mode is stored in the file."""
        # SQLite does not apply its busy timeout here, so we wait ourselves.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_message(match=".*locked"),
            stop=tenacity.stop_after_delay(BUSY_TIMEOUT_S),
            wait=tenacity.wait_fixed(0.01),
            reraise=True,
        )
        for attempt in retrying:
            with attempt, closing(sqlite3.connect(self.file)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")

    def scrub(self) -> None:
        """Remove from the database's files the data that was deleted from its tables."""
        scrub_sqlite(self.file)

    def _set_pragmas(self, connection: Any, _entry: ConnectionPoolEntry) -> None:
        for pragma in self._pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @staticmethod
    def _roll_back(connection: Any, _entry: ConnectionPoolEntry, _error: BaseException | None) -> None:
        # After Ctrl-C in a statement SQLAlchemy closes the connection. SQLite delays that, and the end of the
        # transaction and its lock, until the last cursor is gone, and the traceback keeps one alive. So roll back
        # here.
        with suppress(sqlite3.Error):
            connection.rollback()


class PostgresDatabase:
    """A schema of a PostgreSQL database: `kv_memory`, or another by `?schema=NAME` in the URL.

    It is a separate schema, because our table names are common ones. An advisory lock admits one writer at a time, so
    that the guarantees of SQLite hold here too: transactions are short, and blobs are uploaded outside them. Attributes
    are those of `SQLiteDatabase`.
    """

    # A reader sees one state of the catalog, as on SQLite.
    reading: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}  # noqa: RUF012
    writing: dict[str, Any] = {"isolation_level": "READ COMMITTED"}  # noqa: RUF012
    begin_read = begin_write = None  # the driver begins at the first statement

    def __init__(self, url: URL) -> None:
        query = dict(url.query)
        schema = query.pop("schema", "kv_memory")
        if not isinstance(schema, str) or not schema.isidentifier():
            raise ConfigError(
                f"a schema name must consist of letters, digits and underscores, got {schema!r}",
                where="catalog",
                next_step=None,
            )
        url = url.set(query=query)
        self.schema = schema
        self.where = f"{url.render_as_string(hide_password=True)} schema {schema}"
        self.begin_alone = f"SELECT pg_advisory_xact_lock(hashtextextended('kv_memory write {schema}', 0))"
        try:
            self.engine = create_engine(
                url,
                connect_args={
                    "connect_timeout": 10,
                    "options": f"-c search_path={schema} -c lock_timeout={int(1000 * BUSY_TIMEOUT_S)} -c timezone=UTC",
                    # A server that vanishes silently is noticed within a minute.
                    "keepalives_idle": 20,
                    "keepalives_interval": 10,
                    "keepalives_count": 3,
                },
                hide_parameters=True,
                pool_pre_ping=True,  # a connection that died in the pool is replaced
                max_overflow=-1,
            )
        except ModuleNotFoundError as error:
            raise ConfigError(
                "a catalog in PostgreSQL needs psycopg, which is not installed",
                where="catalog",
                next_step="Run `pip install 'kv-memory[postgres]'`.",
            ) from error
        self.locks = PostgresLocks(self.engine, schema, self.where)
        event.listen(self.engine, "do_connect", self._connect)

    def create(self) -> None:
        """Create the schema."""
        with self.engine.begin() as connection:
            # CREATE SCHEMA IF NOT EXISTS fails if two processes run it at once.
            connection.exec_driver_sql(self.begin_alone)
            connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{self.schema}"'))

    def scrub(self) -> None:
        """Rewrite the tables, each locked meanwhile; the server's log and backups are up to its operator."""
        # A plain VACUUM leaves the bytes of deleted rows in place until new rows overwrite them.
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in inspect(connection).get_table_names():  # the tables of jobs too
                connection.execute(text(f'VACUUM (FULL) "{table}"'))

    @staticmethod
    def _connect(dialect: Any, _record: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # A server that restarts is back within seconds: at most five tries, none of them started after 20 s, then the
        # error.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(20),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
            reraise=True,
        )
        return retrying(dialect.connect, *arguments, **named)


def _may_pass(error: BaseException) -> bool:
    """Whether a retry may connect: not with a wrong password or a missing database."""
    return type(error).__name__ == "OperationalError" and refused_login(error) is None


def scrub_sqlite(file: Path) -> None:
    """Rewrite a database from its live rows and truncate its write-ahead log; a missing file is left alone.

    Raises:
        StoreLockedError: Other processes kept reading or writing it for 30 s.
        StoreFullError: No space left for a copy of the database.
    """
    if not file.is_file():
        return
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    with mapped(file), closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
        # Zero new pages. Otherwise SQLite leaves in them what the memory held before, such as pages it has just read.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("VACUUM")
        # VACUUM wrote to the log. The old pages stay in the file until they are copied over, and in the log until it
        # is truncated. Neither happens while a reader uses an older state.
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise StoreLockedError(
                    "another process keeps reading the database, so deleted data is still in its log",
                    where=str(file),
                    next_step="Stop everything else that uses the store, then run `kv-memory remove --purge` again.",
                )
            time.sleep(0.01)
