"""Names that one thread of one process holds at a time, and names that many read. All of it dies with its process.

A store is used by many processes, and the rows alone cannot say who is compressing a text, who is writing a blob, or
who is reading one: a row that says so outlives the process that wrote it, and needs a clock to be disbelieved. Locks of
the system need none. On one machine they are locks on single bytes of one file, a byte for each name, belonging to the
open file (`F_OFD_SETLK`) rather than to the process, so that threads exclude each other too. Where many machines share
a catalog they are PostgreSQL's advisory locks, which die with the connection.

A lock file for each name was rejected: thousands of files that nobody can remove safely. `flock` was too: it locks a
whole file, and one file descriptor for each cache that is being read runs into the limit of open files.
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
except ImportError:  # Windows: names are held among the threads of a process only
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileLocks", "Locks", "PostgresLocks"]

_LINUX = sys.platform.startswith("linux")
# struct flock: type, whence, start, length, process (0 for locks of open files); macOS orders it otherwise.
_FLOCK = "hhqqi0q" if _LINUX else "qqihh"
_POLL_S = 0.002, 0.05


class Locks(Protocol):
    """Who may hold a name."""

    def hold(self, name: str, *, wait: bool = True) -> _Held:
        """A context in which nobody else holds the name; entering gives whether it was had.

        Args:
            name: Any text.
            wait: Wait for whoever holds it; else the context is entered with False.
        """


class _Held(Protocol):
    def __enter__(self) -> bool: ...

    def __exit__(self, *_: object) -> bool | None: ...


def _number(name: str, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> (64 - bits)


class FileLocks:
    """Locks among the threads and processes of one machine.

    Args:
        file: Made if it is not there; it stays empty.
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
                    # Said, not left to close(): a process forked meanwhile has the open file too.
                    self._unlock(fd, name)
            finally:
                if fd is not None:
                    os.close(fd)

    # many at a time

    def share(self, name: str, by: object = None) -> None:
        """Say that this process reads under a name, until `unshare` was called as often.

        Args:
            name: Any text.
            by: Who says so; `unshare` takes back only what the same one said.
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
        """Take one `share` back; one too many is no error, because a forked process takes back its parent's."""
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
        """`share` for a block; waits while somebody holds the name."""
        by = object()
        try:
            self.share(name, by)
            yield
        finally:
            try:
                self.unshare(name, by)
            except BaseException:  # Ctrl-C, at some point of it: left undone, this process would wait for itself
                self.unshare(name, by)
                raise

    def shared(self, name: str) -> bool:
        """Whether any process of this machine reads under the name."""
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
        """Give up what is read; names that are held stay so until their contexts end."""
        with self._mutex:
            self._readers.clear()
            if self._readers_fd is not None:
                if self._pid == os.getpid() and fcntl is not None:
                    with suppress(OSError):
                        fcntl.fcntl(self._readers_fd, fcntl.F_OFD_SETLK, self._region(fcntl.F_UNLCK, None))
                os.close(self._readers_fd)
                self._readers_fd = None

    def _after_fork(self) -> None:
        # The parent's open file came along, and what is unlocked on it here is unlocked there.
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
        start, length = (0, 0) if name is None else (_number(name, 62), 1)  # a length of 0 is all of it
        fields = (kind, os.SEEK_SET, start, length, 0) if _LINUX else (start, length, 0, kind, os.SEEK_SET)
        return struct.pack(_FLOCK, *fields)

    def _lock(self, fd: int | None, name: str, *, exclusive: bool, wait: bool) -> bool:
        if fd is None or fcntl is None:
            return True
        region = self._region(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, name)
        pause_s, longest_s = _POLL_S
        while True:
            # Asked again and again rather than F_OFD_SETLKW, which Ctrl-C does not end in every thread.
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
    """Locks among all that use one schema of one database.

    Args:
        engine: Of the catalog; each name that is held takes one of its connections.
        scope: Keeps the names of several stores in one database apart.
        where: Named in errors.
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
    """Names held among the threads of this process: they wake at once, where processes are polled.

    An interruption (Ctrl-C) may come between any two lines here. Only `with` on a bare lock cannot be parted by it, so
    that is what holds a name and what guards the table: a `Condition` and a set of names, tried before, could leave a
    name held for ever. The count of users decides only when an entry may go; at worst it is too high and one stays.
    One place is left: a name asked for without waiting, interrupted in the very instruction that takes it.
    """

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._mutex = threading.Lock()  # a thread that is not here may have had it
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
