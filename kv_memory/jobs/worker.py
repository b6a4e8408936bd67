"""A worker: claim, read and compress documents of a job one by one, and record each result, until none is left.

An engine runs it in an actor, or as a process of this machine, `python -m kv_memory.jobs.worker`. Either loads its own
model. The process exits when the job ends; on SIGTERM, after releasing its current document; and if its driver has
died, after finishing its current document. Its last line of standard output is a `WorkerEnd` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from kv_memory.errors import KVMemoryError, StoreConnectionError, StoreError, StoreLockedError
from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.jobs.engines import WorkerEnd
from kv_memory.jobs.job_records import Job, Outcome, Task, TaskResult, Work
from kv_memory.jobs.leases import LEASE_S, TaskQueue
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.sources import Sources
from kv_memory.lazy_compressor import LazyCompressor
from kv_memory.memory import KVMemory
from kv_memory.settings import MemorySettings
from kv_memory.store import Store

_BROKEN = 4  # exit code: the GPU no longer works in this process
_IDLE_S = 0.05, 0.5


def error_of(error: Exception) -> dict[str, str | None]:
    """An error in the form that the ledger stores."""
    if isinstance(error, KVMemoryError):
        return error.to_dict()
    name = type(error).__name__
    return {**KVMemoryError(str(error).strip()[:1000] or name).to_dict(), "error": name}


def run(
    path: str | Path,
    *,
    collection: str,
    job: str,
    worker: str,
    alone: Callable[[], bool],
    n_threads: int,
    device: str = "auto",
    lease_s: float = LEASE_S,
) -> WorkerEnd:
    """Open the store in the folder `path` and work on a job of it; see `work` for `alone`, `TaskQueue` for `lease_s`.

    Errors are returned, not raised.
    """
    torch.set_num_threads(n_threads)

    def body() -> None:
        with Store.open(path, collection=collection, create=False) as store:
            make = partial(pipeline_of, device=device)
            run_in(store, job=job, worker=worker, alone=alone, make_pipeline=make, lease_s=lease_s)

    return end_of(worker, body)


def run_in(
    store: Store,
    *,
    job: str,
    worker: str,
    alone: Callable[[], bool],
    make_pipeline: Callable[[Store, Job], IngestPipeline],
    lease_s: float = LEASE_S,
) -> None:
    """Work on a job of an open store; other arguments as in `run`."""
    ledger = Ledger(store)
    with ledger.hold_worker_lock(worker):
        found = ledger.job(job)
        pipeline = make_pipeline(store, found)
        if found.fingerprint != pipeline.fingerprint.digest:
            ledger.update(found, fingerprint=pipeline.fingerprint.digest)
        with (
            closing(Sources(found.sources["items"], found.settings)) as sources,
            TaskQueue(store, found.id, worker, lease_s=lease_s) as queue,
        ):
            work(queue, sources, pipeline, alone=alone)


def end_of(worker: str, body: Callable[[], None]) -> WorkerEnd:
    """Run a worker; its error is returned, not raised."""
    try:
        body()
    except (StoreConnectionError, StoreLockedError) as error:  # perhaps temporary: a new worker takes over
        return WorkerEnd(worker=worker, reason=error.what, n_deaths=1)
    except Exception as error:
        told = error_of(error)
        return WorkerEnd(worker=worker, reason=str(told["what"]), error=told)
    return WorkerEnd(worker=worker, reason="ended")


def pipeline_of(store: Store, job: Job, *, device: str = "auto") -> IngestPipeline:
    """The pipeline of a memory with the job's settings; errors as in `KVMemory.open`."""
    settings = MemorySettings(**job.settings.memory)
    memory = KVMemory(store, settings, LazyCompressor(settings, device=device))
    # Storing mostly waits for the disk or a server.
    return memory.pipeline(writer=ThreadPoolExecutor(1, thread_name_prefix="writer"))


def work(queue: TaskQueue, sources: Sources, pipeline: IngestPipeline, *, alone: Callable[[], bool]) -> None:
    """Process documents of a job until it ends, or until `alone` is true, e.g. because its driver has died."""
    idle_s = _IDLE_S[0]
    while not alone():
        task = queue.claim()
        if task is None:
            if not queue.wanted():
                return
            time.sleep(idle_s)
            idle_s = min(2 * idle_s, _IDLE_S[1])
            continue
        idle_s = _IDLE_S[0]
        while task is not None:
            task = queue.finish(task, do_one(task, sources, pipeline), go_on=not alone())


def do_one(task: Task, sources: Sources, pipeline: IngestPipeline) -> TaskResult:
    """Read and compress one document; a StoreError is about the store, not the document."""
    start_s = time.perf_counter()
    try:
        read = sources.read(task)
        if read.whole:  # stored under the exact text, which callers look up
            text, metadata = read.document.text, read.document.metadata
            report = pipeline.add_passages(read.document.id, [text], metadata=metadata, extend=False)
        else:
            report = pipeline.add([read.document])
    except StoreError:
        raise
    except Exception as error:
        if "CUDA error" in str(error):
            os._exit(_BROKEN)  # every further call in this process would fail too; a new worker takes over
        return TaskResult(error=error_of(error), elapsed_s=time.perf_counter() - start_s)
    outcome: Outcome = "unchanged" if report.unchanged else "added" if report.added else "replaced"
    work = {field.name: getattr(report, field.name) for field in dataclasses.fields(Work)}
    notes = None if outcome == "unchanged" else read.document.notes or None
    return TaskResult(outcome=outcome, notes=notes, elapsed_s=time.perf_counter() - start_s, **work)


class _Stopped(BaseException):
    """The request to stop; raised wherever the worker is, like KeyboardInterrupt."""


def main() -> None:
    """Run a worker process.

    Its argument is a JSON object: options of `run`, `parent`, the process id of the driver, and `number`, the number of
    the worker, which selects its GPU.
    """
    options = json.loads(sys.argv[1])
    parent, number = options.pop("parent"), options.pop("number")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C and stops its workers
    warnings.filterwarnings("ignore")  # standard error is kept for the last line of a crash
    n_gpus = torch.cuda.device_count()
    try:
        device = f"cuda:{number % n_gpus}" if n_gpus else "auto"
        end = run(**options, alone=lambda: os.getppid() != parent, device=device)
    except _Stopped:
        end = WorkerEnd(worker=options["worker"], reason="stopped")
    print(json.dumps(dataclasses.asdict(end)), flush=True)


def _stop(_number: int, _frame: types.FrameType | None) -> NoReturn:
    raise _Stopped


if __name__ == "__main__":
    main()
    os._exit(0)  # everything is closed; shutting down torch would take another second
