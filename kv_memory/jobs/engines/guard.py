"""Ends the processes of a cluster when the one that started it has died, however that came.

Ray's own processes see to that themselves, but two of its agents, which are told last, may wait for the others for
ever. The guard is a process of its own, because nothing is left to do it in the one that was killed. It runs this file.
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
    """A process that waits until this one has ended, or closes it. Does nothing where there is no /proc.

    Args:
        grace_s: Within which the others end by themselves, in seconds.
    """

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._value = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        if (_PROCESSES / "self" / "environ").exists():
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, self._value, str(grace_s)],
                stdin=subprocess.PIPE,  # reads to its end when this process ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """A context in which whatever is started, and whatever that starts later, will be ended."""
        os.environ[_MARK] = self._value
        try:
            yield
        finally:
            os.environ.pop(_MARK, None)

    def close(self) -> None:
        """End what is left."""
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
            # Of those that have ended and are not yet collected, it is empty.
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]))
