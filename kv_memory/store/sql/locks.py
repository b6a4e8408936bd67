"""Named locks, exclusive or shared, that end with the process that holds them.

Many processes use one store, and rows alone cannot say which of them is compressing a text, writing a blob or reading
one: such a row outlives the process that wrote it, and takes a timeout to be recognised as stale. Locks of the
operating system need none. On one machine they are locks on single bytes of one file, one byte per name. They belong
to the open file (`F_OFD_SETLK`), not to the process, so that threads exclude each other too. If many machines share a
catalog, they are PostgreSQL's advisory locks, which end with the connection.

One lock file per name was rejected: thousands of files that cannot be removed safely. `flock` was rejected too: it
locks a whole file, and one file descriptor for each cache being read runs into the limit of open files.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine, text

from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import private_opener

try:
    import fcntl
except ImportError:  # Windows: locks only work among the threads of a process
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileLocks", "Locks", "PostgresLocks"]

_LINUX = sys.platform.startswith("linux")
# struct flock: type, whence, start, length, process (0 for locks of open files); macOS has another order.
_FLOCK = "hhqqi0q" if _LINUX else "qqihh"
_POLL_S = 0.002, 0.05


class Locks(Protocol):
    """Exclusive locks by name."""

    def hold(self, name: str, *, wait: bool = True) -> _Held:
        """A context that holds a lock; yields True if it was acquired, False if `wait` is off and it is taken.

        Args:
            name: Name of the lock, any text.
            wait: Whether to wait for a taken lock; if off, the context is then entered with False.
        """


class _Held(Protocol):
    def __enter__(self) -> bool: ...

    def __exit__(self, *_: object) -> bool | None: ...


def _number(name: str, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> (64 - bits)


class FileLocks:
    """Locks among the threads and processes of one machine.

    Args:
        file: Lock file, created if missing; it stays empty.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._mutex = threading.RLock()  # a finaliser may call `unshare` from anywhere, also from inside `share`
        self._pid = os.getpid()
        self._readers_fd: int | None = None
        self._readers: dict[str, list[object]] = {}

    # one at a time

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """See `Locks.hold`."""
        key = (str(self._file), name)
        with _THREADS.hold(key, wait=wait) as had:
            if not had:
                yield False
                return
            fd = self._open()
            try:
                if not self._lock(fd, name, exclusive=True, wait=wait):
                    yield False
                    return
                try:
                    yield True
                finally:
                    # Explicitly, not by close(): a process forked meanwhile shares the open file.
                    self._unlock(fd, name)
            finally:
                if fd is not None:
                    os.close(fd)

    # many at a time

    def share(self, name: str, by: object = None) -> None:
        """Take a shared lock for this process, held until `unshare` was called as often.

        Args:
            name: Name of the lock, any text.
            by: Owner of this share; `unshare` with the same owner takes it back.
        """
        with self._mutex:
            self._after_fork()
            readers = self._readers.setdefault(name, [])  # first: after an interruption `unshare` finds it
            if not readers:
                if self._readers_fd is None:
                    self._readers_fd = self._open()
                self._lock(self._readers_fd, name, exclusive=False, wait=True)
            readers.append(by)

    def unshare(self, name: str, by: object = None) -> None:
        """Release one `share`; one too many is not an error, because a forked process releases its parent's."""
        with self._mutex:
            self._after_fork()
            readers = self._readers.get(name)
            if readers is None:
                return
            if by in readers:
                readers.remove(by)
            if not readers:
                self._unlock(self._readers_fd, name)
                del self._readers[name]

    @contextmanager
    def sharing(self, name: str) -> Iterator[None]:
        """`share` for a block; waits while the lock is held exclusively."""
        by = object()
        try:
            self.share(name, by)
            yield
        finally:
            try:
                self.unshare(name, by)
            except BaseException:  # Ctrl-C inside `unshare`: with the lock left, this process would wait for itself
                self.unshare(name, by)
                raise

    def shared(self, name: str) -> bool:
        """Whether any process of this machine has a shared lock of this name."""
        with self._mutex:
            self._after_fork()
            if self._readers.get(name):
                return True
        fd = self._open()
        if fd is None or fcntl is None:
            return False
        try:
            asked = self._region(fcntl.F_WRLCK, name)
            kind = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0 if _LINUX else 3]
            return bool(kind != fcntl.F_UNLCK)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Release all shared locks; exclusive locks stay until their contexts end."""
        with self._mutex:
            self._readers.clear()
            if self._readers_fd is not None:
                if self._pid == os.getpid() and fcntl is not None:
                    with suppress(OSError):
                        fcntl.fcntl(self._readers_fd, fcntl.F_OFD_SETLK, self._region(fcntl.F_UNLCK, None))
                os.close(self._readers_fd)
                self._readers_fd = None

    def _after_fork(self) -> None:
        # The child inherits the parent's open file, and unlocking it here would release the parent's locks.
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._readers = {}
            if self._readers_fd is not None:
                os.close(self._readers_fd)
                self._readers_fd = None

    def _open(self) -> int | None:
        if fcntl is None or not hasattr(fcntl, "F_OFD_SETLK"):
            return None
        with mapped(self._file):
            return private_opener(str(self._file), os.O_RDWR | os.O_CREAT)

    def _region(self, kind: int, name: str | None) -> bytes:
        start, length = (0, 0) if name is None else (_number(name, 62), 1)  # a length of 0 means the whole file
        fields = (kind, os.SEEK_SET, start, length, 0) if _LINUX else (start, length, 0, kind, os.SEEK_SET)
        return struct.pack(_FLOCK, *fields)

    def _lock(self, fd: int | None, name: str, *, exclusive: bool, wait: bool) -> bool:
        if fd is None or fcntl is None:
            return True
        region = self._region(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, name)
        pause_s, longest_s = _POLL_S
        while True:
            # Polled. F_OFD_SETLKW was rejected, because Ctrl-C does not interrupt it in every thread.
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, region)
                return True
            except (BlockingIOError, PermissionError):
                if not wait:
                    return False
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, longest_s)

    def _unlock(self, fd: int | None, name: str) -> None:
        if fd is not None and fcntl is not None:
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, self._region(fcntl.F_UNLCK, name))


class PostgresLocks:
    """Locks among all users of one schema of one database.

    Args:
        engine: Engine of the catalog; each lock that is held takes one of its connections.
        scope: Prefix that separates the names of several stores in one database.
        where: Name of the database in errors.
    """

    def __init__(self, engine: Engine, scope: str, where: str) -> None:
        self._engine = engine
        self._scope = scope
        self._where = where

    @contextmanager
    def hold(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """See `Locks.hold`."""
        number = _number(f"{self._scope}:{name}", 63)
        with _THREADS.hold((f"{self._engine.url!r} {self._scope}", name), wait=wait) as had:
            if not had:
                yield False
                return
            with mapped(self._where):
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                function = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
                try:
                    answer = connection.scalar(text(f"SELECT {function}(:number)"), {"number": number})
                except BaseException:
                    connection.invalidate()
                    connection.close()
                    raise
            if not wait and not answer:
                connection.close()
                yield False
                return
            try:
                yield True
            finally:
                try:
                    connection.execute(text("SELECT pg_advisory_unlock(:number)"), {"number": number})
                except Exception:
                    connection.invalidate()  # the lock dies with it
                connection.close()


class _Threads:
    """Locks among the threads of this process, which wake at once; other processes are polled.

    An interruption (Ctrl-C) may come between any two lines here. Only `with` on a bare lock is safe from it, so bare
    locks hold the names and guard the table. A `Condition` with a set of names was rejected: an interruption could
    leave a name locked permanently. The count of users only decides when an entry may be deleted; at worst it is too
    high and the entry stays. One gap remains: an interruption in the very instruction that acquires a lock without
    waiting.
    """

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._mutex = threading.Lock()  # after a fork, a thread that is not in the child may hold it
        self._locks: dict[tuple[str, str], _NameLock] = {}

    @contextmanager
    def hold(self, key: tuple[str, str], *, wait: bool) -> Iterator[bool]:
        with self._mutex:
            entry = self._locks.setdefault(key, _NameLock())
            entry.users += 1
        try:
            if wait:
                with entry.lock:
                    yield True
                return
            had = entry.lock.acquire(blocking=False)
            try:
                yield had
            finally:
                if had:
                    entry.lock.release()
        finally:
            with self._mutex:
                entry.users -= 1
                if not entry.users:
                    self._locks.pop(key, None)


class _NameLock:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


_THREADS = _Threads()
