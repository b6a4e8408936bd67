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
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}

# Class, text with `{}` for the foreign error's own words, and next step.
_Kind = tuple[type[StoreError], str, str]
_FULL: _Kind = (
    StoreFullError,
    "no space left to write",
    "Free some space (`kv-memory gc` removes unreferenced caches), then run the same command again.",
)
_LOCKED: _Kind = (
    StoreLockedError,
    "another process has held the store's lock for too long",
    "Wait for it to finish, or stop it, then try again.",
)
_FORBIDDEN: _Kind = (
    StoreError,
    "no permission to read or write the store: {}",
    "Give your user read and write permission on the folder, or open a store somewhere else.",
)
_SYSTEM: _Kind = (
    StoreError,
    "the operating system reported an error: {}",
    "Check the disk and the path, then try again; the stored data is unchanged.",
)
_DAMAGED: _Kind = (
    StoreError,
    "the database is damaged: {}",
    "Restore the folder from a backup, or move it away and add the documents again.",
)
_FAILED: _Kind = StoreError, "the database failed: {}", "Check the disk and its free space, then try again."
_SERVER_FAILED: _Kind = StoreError, "the database failed: {}", "Check the server's log, then try again."
_NO_ANSWER: _Kind = (
    StoreConnectionError,
    "the database does not answer: {}",
    "Check that the server runs and can be reached, then try again; the stored data is unchanged.",
)
_LOGIN = (
    "Check the user, the password (`~/.pgpass`, PGPASSWORD) and the database name; the user needs the right to create "
    "the schema, or to use it and write to it."
)
_NO_DATABASE: _Kind = StoreConnectionError, "there is no such database: {}", _LOGIN
_REFUSED: _Kind = StoreError, "the database refused access: {}", _LOGIN
_NO_BUCKET: _Kind = (
    StoreConnectionError,
    "there is no such bucket",
    "Check its name, and the endpoint in the environment; the stored data is unchanged.",
)
_OBJECTS_REFUSED: _Kind = (
    StoreError,
    "the object store refused access: {}",
    "Check the credentials in the environment and the bucket's policy, then try again.",
)
_OBJECTS_UNFIT: _Kind = StoreError, "the object store does not support this request: {}", "Check its URL."
_OBJECTS_FAILED: _Kind = (
    StoreConnectionError,
    "the request to the object store failed: {}",
    "Check its URL, the network and the service, then try again; the stored data is unchanged.",
)


def store_error(error: BaseException, where: str) -> StoreError | None:
    """The store's error for one of the disk, SQLite, PostgreSQL, diskcache or obstore; None for any other.

    `where` is the file, folder or URL at which it occurred.
    """
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.Error):
        error = error.orig
    if isinstance(error, sqlite3.Error) and "no transaction is active" in str(error):
        # SQLite rolls back by itself when the disk is full; diskcache's own ROLLBACK then hides the real error.
        error = error.__context__ or error
    own = error.orig if isinstance(error, DBAPIError) else error
    reason = next(iter(str(own).strip().splitlines()), type(own).__name__)[:300]
    if isinstance(error, DBAPIError):
        kind = _of_postgres(error)
    elif isinstance(error, sqlite3.Error):
        kind = _of_sqlite(error)
    elif isinstance(error, diskcache.Timeout):
        kind = _LOCKED
    elif type(error).__module__.startswith("obstore"):
        kind = _of_objects(error)
    elif not isinstance(error, OSError):
        return None
    elif error.errno is None and "://" in where:  # obstore raises Python's own FileNotFoundError, without an errno
        kind = _of_objects(error)
    else:
        kind = _FULL if error.errno in _NO_SPACE else _FORBIDDEN if error.errno in _NO_PERMISSION else _SYSTEM
        where, reason = str(error.filename or where), error.strerror or reason
    make, what, next_step = kind
    return make(what.format(reason), where=where, next_step=next_step)


def _of_sqlite(error: sqlite3.Error) -> _Kind:
    # Names, not messages, which change between SQLite releases. An extended name starts with that of its primary.
    name: str = getattr(error, "sqlite_errorname", "") or ""
    # SHMSIZE: the shared memory file of the WAL could not grow, the first sign of a full disk.
    if name.startswith("SQLITE_FULL") or name == "SQLITE_IOERR_SHMSIZE":
        return _FULL
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "is locked" in str(error):
        return _LOCKED
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return _FORBIDDEN
    return _DAMAGED if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) else _FAILED


def _of_postgres(error: DBAPIError) -> _Kind:
    state: str = getattr(error.orig, "sqlstate", None) or ""  # psycopg has none without an answer
    if state in {"53100", "53200"}:  # the server's disk or memory
        return _FULL
    if state == "55P03":
        return _LOCKED
    if state[:2] in {"28", "42"} and state not in {"42P01", "42703"}:
        return _REFUSED
    if error.orig is not None and (refusal := refused_login(error.orig)) is not None:
        return refusal
    broken = not state and isinstance(error, OperationalError | InterfaceError)
    if error.connection_invalidated or broken or state[:2] in {"08", "57", "53"}:
        return _NO_ANSWER
    return _SERVER_FAILED


def refused_login(error: BaseException) -> _Kind | None:
    """The kind of a connection refused for a lasting reason, by psycopg's error; None for any other.

    psycopg gives no code for a failed connection, only the server's message, so its words are searched. A refusal
    that is not in English counts as no answer: it is retried, then reported with its message.
    """
    text = str(error)
    signs = ("FATAL:", "no password supplied")
    if getattr(error, "sqlstate", None) is not None or not any(sign in text for sign in signs):
        return None
    if "database" in text.rpartition("FATAL:")[2] and "does not exist" in text:
        return _NO_DATABASE
    if any(sign in text for sign in ("password", "role", "pg_hba.conf", "authentication", "permission denied")):
        return _REFUSED
    return None  # starting up, shutting down, no free connection slot


def no_such_bucket(error: BaseException) -> bool:
    """Whether the bucket itself was not found; otherwise a misspelt one would make every blob look lost."""
    return any(sign in str(error) for sign in ("NoSuchBucket", "bucket does not exist", "ContainerNotFound"))


def _of_objects(error: BaseException) -> _Kind:
    name = type(error).__name__
    if name in {"PermissionDeniedError", "UnauthenticatedError"}:
        return _OBJECTS_REFUSED
    if no_such_bucket(error):
        return _NO_BUCKET
    unfit = name in {"InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError"}
    return _OBJECTS_UNFIT if unfit else _OBJECTS_FAILED


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
