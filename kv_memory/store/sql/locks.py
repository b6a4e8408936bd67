"""Exclusive locks by name, which end with the process that holds them.

A row cannot say which process compresses a text: it outlives its process, and takes a timeout to be recognised as
stale. Locks of the operating system need none. On one machine a lock is a locked file; if many machines share a
catalog, it is one of PostgreSQL's advisory locks, which end with the connection.

The library `filelock` was rejected: Ctrl-C in one of its own short locks leaves the whole process without locks.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from sqlalchemy import Engine, text

from kv_memory.store.error_mapping import mapped, raise_mapped
from kv_memory.store.fs import private_folder, private_opener

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_POLL_S = 0.002, 0.05


class FileLocks:
    """Locks among the threads and processes of one machine.

    Args:
        folder: Folder of the lock files, created if missing. A file is removed with its lock; one that a killed process
            has left is used again.
    """

    def __init__(self, folder: Path) -> None:
        private_folder(folder)
        self._folder = folder

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """A context that holds a lock; yields True if it was acquired, False if `wait` is off and it is taken.

        Another thread than the one that has entered the context may leave it. A name may be any text.
        """
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
        try:
            file = _locked(path, wait=wait)
        except OSError as error:
            raise_mapped(error, str(self._folder))
        try:
            yield file is not None
        finally:
            if file is not None:
                with suppress(OSError):
                    os.unlink(path)  # before it is unlocked: a waiter that locks the removed file makes a new one
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_UN)  # not by closing: a process forked meanwhile shares the open file
                file.close()


def _locked(path: Path, *, wait: bool) -> FileIO | None:
    """Lock a file and return it; None if it is taken and `wait` is off. Ctrl-C closes, and so unlocks, the file."""
    pause_s, longest_s = _POLL_S
    while True:
        file = open(path, "ab", buffering=0, opener=private_opener)  # noqa: SIM115  returned
        try:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            if not wait:
                return None
            # Polled. A blocking call was rejected, because Ctrl-C does not interrupt it in every thread.
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, longest_s)
            continue
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed by the one who held it


class PostgresLocks:
    """Locks among all users of one schema of one database.

    Args:
        engine: Engine of the catalog; each lock that is held or waited for takes one of its connections.
        scope: Prefix that separates the names of several stores in one database.
        where: Name of the database in errors.
    """

    def __init__(self, engine: Engine, scope: str, where: str) -> None:
        self._engine = engine
        self._scope = scope
        self._where = where

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """See `FileLocks.hold`."""
        digest = hashlib.sha256(f"{self._scope}:{name}".encode()).digest()
        number = {"number": int.from_bytes(digest[:8], "big", signed=True)}
        function = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
        with mapped(self._where):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with connection:
            try:
                with mapped(self._where):
                    # pg_advisory_lock returns an empty string.
                    held = connection.scalar(text(f"SELECT {function}(:number)"), number) is not False
            except BaseException:
                connection.invalidate()  # the lock, if it was acquired, ends with the connection
                raise
            try:
                yield held
            finally:
                try:
                    if held:
                        connection.execute(text("SELECT pg_advisory_unlock(:number)"), number)
                except Exception:
                    connection.invalidate()
