"""Drivers and workers killed at random moments, again and again: nothing is lost, and nothing is done twice.

The short form is one of the normal tests; the full one is a part of `make stress`, which says how many in
KV_MEMORY_STRESS.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kv_memory.jobs import Job, Ledger
from kv_memory.store import Store
from tests.jobs.conftest import write_notes
from tests.jobs.test_jobs_local import DRIVER, log, told, twice

__all__ = ["log"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, /proc")
Make = Callable[..., Job]


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.parent.name))
    return found


def kill_at_random(
    store: Store, new_job: Make, folder: Path, log: Path, *, n_kills: int, n_per_job: int = 40
) -> dict[str, int]:
    """Run jobs, one behind the other, while drivers and workers are killed; what was lost, and what done twice."""
    chance = random.Random(n_kills)
    ledger, kills, n_jobs = Ledger(store), Counter[str](), 0
    killed: list[int] = []
    driver: subprocess.Popen[bytes] | None = None
    job: Job | None = None
    with open(log.with_name("said"), "wb") as said:
        while True:
            if job is None or ledger.state(job) == "done":
                if driver is not None:
                    driver.wait(timeout=60)
                if sum(kills.values()) >= n_kills:
                    break
                write_notes(folder / f"job-{n_jobs}", n_per_job, start=n_jobs * n_per_job)
                # Killed at random, a document may have bad luck more often than three times.
                job = new_job(folder / f"job-{n_jobs}", name=f"job-{n_jobs}", max_attempts=1000)
                n_jobs += 1
            if driver is None or driver.poll() is not None:
                # Where the one before was killed the moment before, its lock is free at once.
                command = [sys.executable, DRIVER, str(store.path), job.name, "2", "local"]
                driver = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            if sum(kills.values()) >= n_kills:
                driver.wait(timeout=300)
                continue
            # Any moment will do, but on a slow machine most of them would be before the first document.
            if chance.random() < 0.75:
                wait_for_text(driver, log)
                time.sleep(chance.uniform(0, 0.5))
            else:
                time.sleep(chance.uniform(0, 5))
            workers = children(driver.pid)
            victim = driver.pid if not workers or chance.random() < 0.3 else chance.choice(workers)
            with suppress(ProcessLookupError):
                if driver.poll() is None:
                    os.kill(victim, signal.SIGKILL)
                    kills["driver" if victim == driver.pid else "worker"] += 1
                    if victim == driver.pid:
                        driver.wait()
                    killed.append(victim)
    total = n_jobs * n_per_job
    failed = sum(ledger.counts(job).failed for job in ledger.jobs())
    assert all(ledger.counts(job).open == 0 for job in ledger.jobs())
    caches = Counter(info.text_sha256 for info in store.caches())
    assert len(caches) == total and set(caches.values()) == {1}
    report = store.check()
    assert not report.damaged and not report.missing and not report.unreferenced
    return {
        "kills": sum(kills.values()),
        "kills_of_drivers": kills["driver"],
        "kills_over_documents": len(in_hand(log) & set(killed)),
        "documents": total,
        "lost_documents": total - len(store.documents()) + failed,
        "done_twice": twice(log),
    }


def in_hand(log: Path) -> set[int]:
    """Processes that had begun a text and did not store it."""
    stored = set(told(log, "stored"))
    return {pid for pid, sha in told(log, "begun") if (pid, sha) not in stored}


def wait_for_text(driver: subprocess.Popen[bytes], log: Path) -> None:
    """Until a worker has begun one more text, or the driver has come to its end."""
    n_begun = len(told(log, "begun"))
    while driver.poll() is None and len(told(log, "begun")) == n_begun:
        time.sleep(0.01)


@pytest.mark.slow
def test_few_random_kills_lose_and_repeat_nothing(
    store: Store, new_job: Make, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD_SLEEP_S", "0.1")
    (tmp_path / "notes").mkdir()
    found = kill_at_random(store, new_job, tmp_path / "notes", log, n_kills=3, n_per_job=20)
    assert (found["lost_documents"], found["done_twice"]) == (0, 0)
    assert found["kills"] >= 3


@pytest.mark.stress
@pytest.mark.skipif(not os.environ.get("KV_MEMORY_STRESS"), reason="takes minutes: `make stress`")
def test_many_random_kills_lose_and_repeat_nothing(
    store: Store,
    new_job: Make,
    tmp_path: Path,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ODD_SLEEP_S", "0.1")
    (tmp_path / "notes").mkdir()
    n_kills = int(os.environ["KV_MEMORY_STRESS"])
    found = kill_at_random(store, new_job, tmp_path / "notes", log, n_kills=n_kills)
    with capsys.disabled():
        print(f"\n{json.dumps(found)}")
    assert (found["lost_documents"], found["done_twice"]) == (0, 0)
    assert found["kills"] >= n_kills
