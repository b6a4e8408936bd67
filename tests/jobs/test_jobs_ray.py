"""The Ray engine on a cluster of this machine: the same job, the same outcome. Drivers are processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kv_memory.errors import ConfigError
from kv_memory.jobs import Job, Ledger
from kv_memory.store import Store
from tests.jobs.conftest import write_notes
from tests.jobs.test_jobs_local import assert_all_there, wait_for

Make = Callable[..., Job]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the `ray` extra is not installed")

DRIVE = """
import dataclasses, json, sys
from kv_memory.jobs import Ledger
from kv_memory.jobs.ray import RayEngine
from kv_memory.jobs.run import drive
from kv_memory.store import Store

with Store.open(sys.argv[1], create=False) as store:
    engine = RayEngine(store, n_workers=int(sys.argv[3]), lease_s=20)
    ended = drive(store, Ledger(store).job(sys.argv[2]), engine, resumed=True)
    print(json.dumps(dataclasses.asdict(ended)))
"""


def start(store: Store, job: Job, *, n_workers: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVE, str(store.path), job.name, str(n_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )


def ended(driver: subprocess.Popen[str]) -> dict[str, int]:
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.ray
@pytest.mark.slow
@needs_ray
def test_a_job_on_ray(store: Store, new_job: Make, notes: Path) -> None:
    (notes / "0004.txt").write_bytes(b"\0")
    job = new_job(notes)
    found = ended(start(store, job, n_workers=2))
    assert (found["added"], found["failed"]) == (11, 1)
    assert_all_there(store, 11)
    assert Ledger(store).job(job.name).fingerprint == store.caches()[0].fingerprint
    assert store.settings()["passage_tokens"] == 64


@pytest.mark.ray
@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, /proc")
def test_an_actor_that_is_killed_is_replaced(store: Store, new_job: Make, notes: Path) -> None:
    write_notes(notes, 120)
    job, ledger = new_job(notes), Ledger(store)
    driver = start(store, job)
    wait_for(lambda: ledger.counts(job).done >= 3, timeout_s=120)
    killed = [pid for pid in actors_of(driver) if not os.kill(pid, signal.SIGKILL)]
    assert len(killed) == 1
    assert ended(driver)["added"] == 120
    assert_all_there(store, 120)


@pytest.mark.ray
@pytest.mark.slow
@needs_ray
def test_a_driver_that_is_killed_and_resumed(store: Store, new_job: Make, notes: Path) -> None:
    write_notes(notes, 120)
    job, ledger = new_job(notes), Ledger(store)
    driver = start(store, job)
    wait_for(lambda: ledger.counts(job).done >= 3, timeout_s=120)
    driver.kill()
    driver.communicate()
    time.sleep(1)
    n_done = ledger.counts(job).done
    assert n_done < 120
    assert ended(start(store, job))["added"] == 120
    assert_all_there(store, 120)


def actors_of(driver: subprocess.Popen[str]) -> list[int]:
    """The processes of our actors; those of other clusters on this machine are not ours to kill."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (entry / "cmdline").read_bytes()
            if name.startswith(b"ray::") and b"_Actor" in name and is_below(entry, driver.pid):
                found.append(int(entry.name))
    return found


def is_below(process: Path, pid: int) -> bool:
    """Whether a process is a descendant of another one."""
    while (parent := int((process / "stat").read_text().rpartition(")")[2].split()[1])) not in {0, 1, pid}:
        process = Path("/proc", str(parent))
    return parent == pid


def test_ray_is_an_extra(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from kv_memory.jobs.ray import RayEngine

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"kv-memory\[ray\]"):
        RayEngine(store)
    with pytest.raises(ConfigError, match="at least 1 worker"):
        RayEngine(store, n_workers=0)
