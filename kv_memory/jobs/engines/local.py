"""LocalEngine: worker processes on this machine.

The engine starts its own processes. `ProcessPoolExecutor` was rejected, because it is unusable once one of its
processes is killed: in a trial, 30 of 40 documents were lost with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kv_memory.jobs.engines import WorkerEnd, check_n_workers, last_line, n_cores, threads_of
from kv_memory.jobs.job_records import Job, worker_name
from kv_memory.jobs.leases import LEASE_S

_WORKER = (sys.executable, "-m", "kv_memory.jobs.worker")
_PATIENCE_S = 10.0  # time for a worker to release its document
_NOISE_BYTES = 2000  # at the end of the standard error, looked through for the last line
_SIGNALS = {member.value: member.name for member in signal.Signals}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# Output of libraries would be lost, or would garble the error.
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass
class _Process:
    name: str
    number: int
    process: subprocess.Popen[bytes]
    said: IO[bytes]  # standard output: how it ended
    noise: IO[bytes]  # standard error: the output of a library before it crashes


class LocalEngine:
    """Workers as processes of this machine, each with its own model; `command`, which starts one, is for tests.

    Raises:
        ConfigError: `n_workers`, the maximum number of workers at a time, is below 1.
    """

    def __init__(
        self, store_path: Path, *, n_workers: int = 1, lease_s: float = LEASE_S, command: Sequence[str] = _WORKER
    ) -> None:
        self._store_path = store_path
        self._most = check_n_workers(n_workers)
        self._lease_s = lease_s
        self._command = tuple(command)
        self._threads = threads_of(n_cores() / n_workers)
        self._processes: list[_Process] = []

    def poll(self, job: Job, *, n_open: int) -> list[WorkerEnd]:
        """See `Engine.poll`."""
        ended = self._collect()
        while len(self._processes) < min(self._most, n_open):
            self._start(job)
        return ended

    def n_workers(self) -> int:
        """See `Engine.n_workers`."""
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [entry.process.pid for entry in self._processes]

    def stop(self) -> None:
        """See `Engine.stop`."""
        for entry in self._processes:
            with suppress(OSError):
                entry.process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        while self._processes:
            if time.monotonic() > deadline:
                for entry in self._processes:
                    entry.process.kill()
                    entry.process.wait()
            self._collect()
            time.sleep(0.01)

    def _start(self, job: Job) -> None:
        number = min(set(range(self._most)) - {entry.number for entry in self._processes})
        name = worker_name()
        said, noise = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        options = {
            "path": str(self._store_path),
            "collection": job.collection,
            "job": job.name,
            "worker": name,
            "n_threads": self._threads,
            "lease_s": self._lease_s,
            "parent": os.getpid(),
            "number": number,
        }
        process = subprocess.Popen(
            [*self._command, json.dumps(options)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=noise,
            env={**os.environ, **dict.fromkeys(_THREADS, str(self._threads)), **_QUIET},
            # Ctrl-C reaches a whole foreground group; the engine stops its workers.
            start_new_session=os.name == "posix",
        )
        self._processes.append(_Process(name, number, process, said, noise))

    def _collect(self) -> list[WorkerEnd]:
        """Remove the workers that have ended, and return how they ended."""
        ended: list[WorkerEnd] = []
        for entry in [entry for entry in self._processes if entry.process.poll() is not None]:
            self._processes.remove(entry)
            ended.append(_end_of(entry))
            entry.said.close()
            entry.noise.close()
        return ended


def _end_of(entry: _Process) -> WorkerEnd:
    code = entry.process.returncode
    if code == 0:
        entry.said.seek(0)
        return WorkerEnd(**json.loads(entry.said.read().splitlines()[-1]))
    reason = f"exit code {code}" if code > 0 else f"killed by {_SIGNALS.get(-code, f'signal {-code}')}"
    entry.noise.seek(max(0, entry.noise.seek(0, os.SEEK_END) - _NOISE_BYTES))
    said = last_line(entry.noise.read().decode("utf-8", "replace"))
    return WorkerEnd(worker=entry.name, reason=f"{reason}: {said}" if said else reason, n_deaths=1)
