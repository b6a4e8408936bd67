"""Maps foreign errors of the disk, the databases and object stores to the store's own, in one place."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import diskcache
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from kv_memory.errors import (
    KVMemoryError,
    StoreConnectionError,
    StoreError,
    StoreFullError,
    StoreLockedError,
    interruption_behind,
)

# EFBIG (a file size limit) is not a full disk, but the user's next step is the same: make room or raise the limit.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_LOGIN = (
    "Check the user, the password (`~/.pgpass`, PGPASSWORD) and the database name; the user needs the right to create "
    "the schema, or to use it and write to it."
)
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def store_error(error: BaseException, where: str) -> StoreError | None:
    """The store's error for a foreign one; None if the store does not know it.

    Args:
        error: Foreign error: an `OSError`, an error of SQLite (bare or wrapped by SQLAlchemy), of PostgreSQL or of
            obstore, or diskcache's `Timeout`.
        where: File, folder or URL at which it occurred.
    """
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.Error):
        error = error.orig
    if isinstance(error, DBAPIError):
        return _of_postgres(error, where)
    if type(error).__module__.startswith("obstore"):
        return _of_objects(error, where)
    if isinstance(error, sqlite3.Error) and "no transaction is active" in str(error):
        # SQLite rolls back by itself when the disk is full; diskcache's own ROLLBACK then hides the real error.
        error = error.__context__ or error
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error, where)
    if isinstance(error, diskcache.Timeout):
        return _locked(where)
    if not isinstance(error, OSError):
        return None
    if error.errno is None and "://" in where:  # obstore raises Python's own FileNotFoundError, without an errno
        return _of_objects(error, where)
    where = str(error.filename) if error.filename else where
    if error.errno in _FULL:
        return _full(where)
    if error.errno in _FORBIDDEN:
        return _forbidden(where, error.strerror or str(error))
    return StoreError(
        f"the operating system reported an error: {error.strerror or error}",
        where=where,
        next_step="Check the disk and the path, then try again; the stored data is unchanged.",
    )


def _of_sqlite(error: sqlite3.Error, where: str) -> StoreError:
    # Names, not messages, which change between SQLite releases. An extended name starts with that of its primary.
    name: str = getattr(error, "sqlite_errorname", "") or ""
    # SHMSIZE: the shared memory file of the WAL could not grow, the first sign of a full disk.
    if name.startswith("SQLITE_FULL") or name == "SQLITE_IOERR_SHMSIZE":
        return _full(where)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "is locked" in str(error):
        return _locked(where)
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return _forbidden(where, str(error))
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StoreError(
            f"the database is damaged: {error}",
            where=where,
            next_step="Restore the folder from a backup, or move it away and add the documents again.",
        )
    return StoreError(
        f"the database failed: {error}",
        where=where,
        next_step="Check the disk and its free space, then try again.",
    )


def _of_postgres(error: DBAPIError, where: str) -> StoreError | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    if state in {"53100", "53200"}:  # the server's disk or memory
        return _full(where)
    if state == "55P03":
        return _locked(where)
    if state is not None and state[:2] in {"28", "42"} and state not in {"42P01", "42703"}:
        return StoreError(f"the database refused access: {reason}", where=where, next_step=_LOGIN)
    if error.orig is not None and (refusal := refused_login(error.orig)) is not None:
        kind, what = refusal
        return kind(f"{what}: {reason}", where=where, next_step=_LOGIN)
    broken = state is None and isinstance(
        error, OperationalError | InterfaceError
    )  # without an answer psycopg has no code
    if error.connection_invalidated or broken or (state or "")[:2] in {"08", "57", "53"}:
        return StoreConnectionError(
            f"the database does not answer: {reason}",
            where=where,
            next_step="Check that the server runs and can be reached, then try again; the stored data is unchanged.",
        )
    return StoreError(
        f"the database failed: {reason}", where=where, next_step="Check the server's log, then try again."
    )


def refused_login(error: BaseException) -> tuple[type[StoreError], str] | None:
    """The class and text for a connection refused for a lasting reason, by psycopg's error; None for any other.

    psycopg gives no code for a failed connection, only the server's message, so its words are searched. A refusal
    that is not in English counts as no answer: it is retried, then reported with its message.
    """
    text = str(error)
    if getattr(error, "sqlstate", None) is not None or not any(
        sign in text for sign in ("FATAL:", "no password supplied")
    ):
        return None
    if "database" in text.rpartition("FATAL:")[2] and "does not exist" in text:
        return StoreConnectionError, "there is no such database"
    if any(sign in text for sign in ("password", "role", "pg_hba.conf", "authentication", "permission denied")):
        return StoreError, "the database refused access"
    return None  # starting up, shutting down, no free connection slot


def no_such_bucket(error: BaseException) -> bool:
    """Whether the bucket itself was not found; otherwise a misspelt one would make every blob look lost."""
    return any(sign in str(error) for sign in ("NoSuchBucket", "bucket does not exist", "ContainerNotFound"))


def _of_objects(error: BaseException, where: str) -> StoreError:
    name = type(error).__name__
    reason = next(iter(str(error).strip().splitlines()), name)[:300]
    if name in {"PermissionDeniedError", "UnauthenticatedError"}:
        return StoreError(
            f"the object store refused access: {reason}",
            where=where,
            next_step="Check the credentials in the environment and the bucket's policy, then try again.",
        )
    if no_such_bucket(error):
        return StoreConnectionError(
            "there is no such bucket",
            where=where,
            next_step="Check its name, and the endpoint in the environment; the stored data is unchanged.",
        )
    if name in {"InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError"}:
        return StoreError(
            f"the object store does not support this request: {reason}", where=where, next_step="Check its URL."
        )
    return StoreConnectionError(
        f"the request to the object store failed: {reason}",
        where=where,
        next_step="Check its URL, the network and the service, then try again; the stored data is unchanged.",
    )


def _full(where: str) -> StoreFullError:
    return StoreFullError(
        "no space left to write",
        where=where,
        next_step="Free some space (`kv-memory gc` removes unreferenced caches), then run the same command again.",
    )


def _locked(where: str) -> StoreLockedError:
    return StoreLockedError(
        "another process has held the store's lock for too long",
        where=where,
        next_step="Wait for it to finish, or stop it, then try again.",
    )


def _forbidden(where: str, reason: str) -> StoreError:
    return StoreError(
        f"no permission to read or write the store: {reason}",
        where=where,
        next_step="Give your user read and write permission on the folder, or open a store somewhere else.",
    )


@contextmanager
def mapped(where: Path | str) -> Iterator[None]:
    """Run a block, and map errors of the disk, the databases and the object store to `StoreError` subclasses.

    Args:
        where: Place named in the error, unless the foreign error names a file itself.

    Raises:
        KeyboardInterrupt: Or another interruption, also one that the interrupted library turned into another error.
        StoreConnectionError: A server does not answer.
        StoreFullError: No space, quota or file size left.
        StoreError: Reading or writing is not allowed; any other failure of the disk or the database.
        StoreLockedError: The wait for another process's lock timed out.
    """
    try:
        yield
    except Exception as error:
        raise_mapped(error, str(where))


def raise_mapped(error: Exception, where: str) -> NoReturn:
    """Raise what `mapped` raises for an error."""
    if isinstance(error, KVMemoryError):
        raise error
    ours = store_error(error, where)
    if ours is not None:
        raise ours from error
    stop = interruption_behind(error)
    if stop is None:
        raise error
    raise type(stop)(*stop.args) from error  # the interruption, not the error that followed from it
