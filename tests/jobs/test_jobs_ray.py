"""The Ray engine on clusters of this machine: the same job, the same outcome. Drivers are processes of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import ConfigError, JobError
from kv_memory.jobs import Job, JobSettings, Ledger
from kv_memory.jobs.driver import JobRequest, create_job, drive
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.jobs.engines.ray import RayEngine, Share, share_of
from kv_memory.store import Store
from tests.jobs.conftest import write_notes
from tests.jobs.test_jobs_local import DRIVER, assert_all_there, wait_for

Make = Callable[..., Job]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the `ray` extra is not installed")
linux = pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, /proc")

N_NOTES = 60


class Marked:
    """Processes that are known by a variable of their environment, which those they start inherit."""

    def __init__(self, **variables: str) -> None:
        self._mark = f"KV_MEMORY_TEST={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        # Given a token, Ray writes none into the home folder.
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = {**os.environ, **ray, **variables, name: value}
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, start_new_session=True, env=self.environment, **pipes)
        self._started.append(process)
        return process

    def drive(self, store: Store, job: Job, *, n_workers: int = 1) -> subprocess.Popen[str]:
        return self.start(sys.executable, DRIVER, str(store.path), job.name, str(n_workers), "ray")

    def processes(self) -> dict[int, str]:
        """Command lines of those that are left, by process id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def actors(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if command.startswith("ray::RayWorker")]

    def end(self) -> None:
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            if process.stdout is not None and not process.stdout.closed:
                process.communicate()


@contextmanager
def marked(**variables: str) -> Iterator[Marked]:
    processes = Marked(**variables)
    try:
        yield processes
    finally:
        processes.end()


def listening(pids: set[int]) -> set[str]:
    """The addresses that these processes can be reached at."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(str(entry.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = b"".join(raw[k : k + 4][::-1] for k in range(0, len(raw), 4))
                address = ipaddress.ip_address(words)
                found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def blobs_of(store: Store) -> dict[str, str]:
    """The SHA-256s of the blobs by those of the texts."""
    return {info.text_sha256: info.blob_key for info in store.caches()}


@pytest.fixture(scope="module")
def begun_on_ray(tmp_path_factory: pytest.TempPathFactory, settings: JobSettings) -> dict[str, str]:
    """Blobs of a job that was begun by two actors of a cluster of its own, whose driver was killed, and ended here."""
    folder = tmp_path_factory.mktemp("begun")
    write_notes(folder / "notes", N_NOTES)
    with Store.open(folder / "store") as store, marked() as processes:
        job, ledger = create_job(store, JobRequest(sources=[str(folder / "notes")]), settings), Ledger(store)
        driver = processes.drive(store, job, n_workers=2)
        # With both actors at work, but not for long: on a busy machine one may do all before the other is up.
        wait_for(lambda: (done := ledger.counts(job).done) >= 3 and (len(processes.actors()) == 2 or done > 20))
        addresses = listening(set(processes.processes()))
        driver.kill()
        driver.communicate()
        assert addresses == {"127.0.0.1"}
        assert ledger.job(job.name).state == "interrupted"
        assert ledger.counts(job).done < N_NOTES
        ended = drive(store, ledger.job(job.name), LocalEngine(store.path), resumed=True)
        # In hand when the driver was killed: stored perhaps, but not written into the ledger.
        assert ended.added + ended.unchanged == N_NOTES and ended.unchanged <= 2
        assert_all_there(store, N_NOTES)
        # Of Ray only two agents are left, which wait a minute for the rest.
        wait_for(lambda: all("Agent" in command for command in processes.processes().values()))
        return blobs_of(store)


@pytest.mark.ray
@pytest.mark.slow
@needs_ray
@linux
def test_ray_job_with_a_killed_actor_stores_the_same_bytes(
    store: Store, new_job: Make, notes: Path, begun_on_ray: dict[str, str]
) -> None:
    write_notes(notes, N_NOTES)
    (notes / "broken.txt").write_bytes(b"\0")
    job, ledger = new_job(notes), Ledger(store)
    with marked(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0") as cluster, tempfile.TemporaryDirectory(prefix="kvr-") as short:
        head = ["start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
        ray = str(Path(sys.executable).with_name("ray"))
        cluster.start(ray, *head, "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={short}")
        written = Path(short, "ray_current_cluster")
        wait_for(lambda: written.exists() and ":" in written.read_text(), timeout_s=120)
        cluster.environment["RAY_ADDRESS"] = written.read_text().strip()
        driver = cluster.drive(store, job)
        wait_for(lambda: ledger.counts(job).done >= 3, timeout_s=240)
        (actor,) = cluster.actors()
        os.kill(actor, signal.SIGKILL)
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        assert "Warning" not in err, err
        wait_for(lambda: not cluster.actors())  # and the cluster lives
        assert any("gcs_server" in command for command in cluster.processes().values())
    ended = json.loads(out.splitlines()[-1])
    assert ended["failed"] == 1 and ended["added"] + ended["unchanged"] == N_NOTES and ended["unchanged"] <= 1
    (failed,) = ledger.failed(job)
    assert failed.document_id.endswith("broken.txt") and failed.attempts == 1
    assert failed.error["error"] == "UnreadableDocumentError"
    assert_all_there(store, N_NOTES)
    assert ledger.job(job.name).fingerprint == store.caches()[0].fingerprint
    assert store.settings()["passage_tokens"] == 64
    assert blobs_of(store) == begun_on_ray


def test_unreachable_cluster_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(JobError, match=r"cannot be joined: ConnectionRefusedError.*\[RAY_ADDRESS=127\.0\.0\.1:9\]"):
        RayEngine(store)


MACHINES = [
    ([{"CPU": 8.0}], 2, None, Share(n_cpus=4, n_gpus=0, n_threads=4)),
    ([{"CPU": 8.0}], 3, None, Share(n_cpus=2, n_gpus=0, n_threads=2)),
    ([{"CPU": 2.0}], 4, None, Share(n_cpus=0.5, n_gpus=0, n_threads=1)),
    ([{"CPU": 1.0}], 3, None, Share(n_cpus=0.3333, n_gpus=0, n_threads=1)),
    ([{}, {"CPU": 16.0}, {"CPU": 4.0}], 2, None, Share(n_cpus=4, n_gpus=0, n_threads=4)),
    ([{"CPU": 8.0, "GPU": 2.0}] * 3, 6, None, Share(n_cpus=1, n_gpus=1, n_threads=4)),
    ([{"CPU": 8.0, "GPU": 2.0}] * 3, 12, 0.5, Share(n_cpus=1, n_gpus=0.5, n_threads=2)),
    ([{"CPU": 8.0, "GPU": 2.0}], 2, 0.0, Share(n_cpus=4, n_gpus=0, n_threads=4)),
    ([{}], 1, None, Share(n_cpus=1, n_gpus=0, n_threads=1)),
]


@pytest.mark.parametrize(("machines", "n_workers", "n_gpus", "share"), MACHINES)
def test_share_of_cores_and_gpus_per_actor(
    machines: list[dict[str, float]],
    n_workers: int,
    n_gpus: float | None,
    share: Share,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert share_of(machines, n_workers=n_workers, n_gpus=n_gpus) == share
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert share_of(machines, n_workers=n_workers, n_gpus=n_gpus) == dataclasses.replace(share, n_threads=1)


def test_more_gpus_per_worker_than_any_machine_has_are_refused() -> None:
    with pytest.raises(JobError, match=r"2 GPUs, but no machine of the cluster has more than 1 .*--gpus-per-worker 0"):
        share_of([{"CPU": 8.0, "GPU": 1.0}] * 3, n_workers=1, n_gpus=2)


def test_missing_ray_and_invalid_numbers_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"kv-memory\[ray\]"):
        RayEngine(store)
    with pytest.raises(ConfigError, match="at least 1 worker"):
        RayEngine(store, n_workers=0)
    for n_gpus in (-1, float("nan")):
        with pytest.raises(ConfigError, match="GPUs per worker must be at least 0"):
            RayEngine(store, n_gpus=n_gpus)
