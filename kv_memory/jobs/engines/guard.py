"""Guard: end the processes of a cluster once the process that started it has died, for whatever reason.

Ray's processes exit by themselves, but two of its agents, which are notified last, may wait for the others endlessly.
The guard is a separate process, because a killed process cannot clean up. It runs this file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Guard"]

_MARK = "KV_MEMORY_GUARDED"
_PROCESSES = Path("/proc")


class Guard:
    """A process that waits until this one has ended or calls `close`; it does nothing on systems without /proc.

    Args:
        grace_s: Time in which the other processes may exit by themselves, in seconds.
    """

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._value = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        if (_PROCESSES / "self" / "environ").exists():
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, self._value, str(grace_s)],
                stdin=subprocess.PIPE,  # the guard reads until it is closed, at the latest when this process ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C must not reach it
            )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark all processes started in this context, and their descendants, to be ended."""
        os.environ[_MARK] = self._value
        try:
            yield
        finally:
            os.environ.pop(_MARK, None)

    def close(self) -> None:
        """End the marked processes that are left."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def _watch(value: str, grace_s: float) -> None:
    sys.stdin.buffer.read()
    deadline = time.monotonic() + grace_s
    while left := _marked(f"{_MARK}={value}".encode()):
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: bytes) -> list[int]:
    found = []
    for entry in _PROCESSES.glob("[0-9]*"):
        with suppress(OSError):
            # It is empty for zombies: processes that have ended and were not yet waited for.
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]))
