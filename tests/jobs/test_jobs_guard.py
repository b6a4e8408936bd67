"""What is started under a guard ends with the process that made the guard. All of them are real."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kv_memory.jobs.engines.guard import Guard
from tests.jobs.test_jobs_local import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(99)"]
KEEPER = f"""
import subprocess, time
from kv_memory.jobs.engines.guard import Guard

guard = Guard(grace_s=0.2)
with guard.marking():
    deaf = subprocess.Popen({SLEEP}, start_new_session=True)
free = subprocess.Popen({SLEEP})
print(guard._process.pid, deaf.pid, free.pid, flush=True)
time.sleep(99)
"""


def lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_guard_ends_marked_processes_after_their_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        guard, deaf, free = map(int, keeper.stdout.readline().split())
        try:
            assert lives(guard) and lives(deaf)
            keeper.kill()
            wait_for(lambda: not lives(deaf) and not lives(guard), timeout_s=30)
            assert lives(free)  # it was none of the guard's
        finally:
            os.kill(free, 9)


def test_close_ends_marked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(grace_s=0.2)
    with guard.marking():
        left = subprocess.Popen(SLEEP)
    assert not any(name.startswith("KV_MEMORY_GUARDED") for name in os.environ)
    guard.close()
    guard.close()
    assert left.wait(timeout=5) == -9
