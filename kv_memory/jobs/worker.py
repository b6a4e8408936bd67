"""A worker: claim, read and compress documents of a job one by one, and record each result, until none is left.

It runs as a separate process, `python -m kv_memory.jobs.worker`, and loads its own model. It exits when the job ends;
on SIGTERM, after releasing its current document; and if its driver has died, after finishing its current document.
Errors that do not concern a document, such as a missing model or a full disk, are printed to standard output as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from kv_memory.errors import KVMemoryError, StoreConnectionError, StoreError, StoreLockedError
from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.jobs.item import SourceItem
from kv_memory.jobs.leases import LEASE_S, LiveWorkers, Renewer, TaskQueue
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import FailedResult, Job, Task, TaskResult
from kv_memory.jobs.sources import Sources
from kv_memory.memory import KVMemory
from kv_memory.settings import MemorySettings
from kv_memory.store import Store

__all__ = ["BROKEN", "BUSY", "FATAL", "Stopped", "do_one", "error_of", "main", "make_pipeline", "work"]

FATAL = 3  # exit code: the error on standard output does not concern a document
BUSY = 5  # exit code: the store does not respond, perhaps temporarily; a new worker takes over
BROKEN = 4  # exit code: the GPU no longer works in this process
_IDLE_S = 0.05, 0.5


class Stopped(BaseException):
    """The request to stop; raised wherever the worker is, like KeyboardInterrupt."""


def error_of(error: Exception) -> dict[str, str | None]:
    """An error in the form that the ledger stores."""
    if isinstance(error, KVMemoryError):
        return error.to_dict()
    text = str(error).strip()[:1000] or type(error).__name__
    return {"error": type(error).__name__, "what": text, "where": None, "next_step": None}


def make_pipeline(store: Store, job: Job, *, device: str = "auto") -> IngestPipeline:
    """Load the job's model and compressor; errors as in `KVMemory.open`."""
    memory = KVMemory(store, MemorySettings(**job.settings.memory), device=device)
    # Storing mostly waits for the disk or a server.
    return memory.pipeline(writer=ThreadPoolExecutor(1, thread_name_prefix="writer"))


def work(
    store: Store,
    job: Job,
    worker: str,
    pipeline: IngestPipeline,
    *,
    alone: Callable[[], bool],
    lease_s: float = LEASE_S,
) -> int:
    """Process documents of a job until it ends, or until nobody drives it any more.

    Args:
        store: Store of the job.
        job: Job with the documents.
        worker: Name of this worker.
        pipeline: Ingest pipeline with the job's settings.
        alone: Function that returns True once the worker should stop, e.g. because the driver has died.
        lease_s: Duration of a lease in seconds, see `TaskQueue`.

    Returns:
        Number of documents processed, including failed ones.

    Raises:
        StoreError: The store cannot be used; the current document was released.
    """
    task_queue = TaskQueue(store, job.id, worker, lease_s=lease_s)
    sources = Sources(job.sources["items"], job.settings)
    n_done, idle_s = 0, _IDLE_S[0]
    task: Task | None = None
    try:
        with Renewer(task_queue, lease_s=lease_s) as renewer:
            while task is not None or not alone():
                task = task or (task_queue.claim() if task_queue.pending() else None)
                if task is None:
                    if not task_queue.wanted():
                        break
                    time.sleep(idle_s)
                    idle_s = min(2 * idle_s, _IDLE_S[1])
                    continue
                idle_s, renewer.task = _IDLE_S[0], task
                result = do_one(task, sources, pipeline)
                renewer.task = None
                task = task_queue.finish(task, result, go_on=not alone())
                n_done += 1
    except BaseException:
        if task is not None:
            with suppress(StoreError):  # otherwise its lease expires
                task_queue.release(task)
        raise
    finally:
        sources.close()
    return n_done


def do_one(task: Task, sources: Sources, pipeline: IngestPipeline) -> TaskResult | FailedResult:
    """Read and compress one document.

    Raises:
        StoreError: The store cannot be used; the document is not at fault.
    """
    start_s = time.perf_counter()
    try:
        read = sources.read(SourceItem(document_id=task.document_id, uri=task.uri))
        if read.whole:  # stored under the exact text, which callers look up
            text, metadata = read.document.text, read.document.metadata
            report = pipeline.add_passages(read.document.id, [text], metadata=metadata, extend=False)
        else:
            report = pipeline.add([read.document])
    except StoreError:
        raise  # the document is not at fault
    except Exception as error:
        if "CUDA error" in str(error):
            os._exit(BROKEN)  # every further call in this process would fail too; a new worker takes over
        return FailedResult(error=error_of(error), elapsed_s=time.perf_counter() - start_s)
    return TaskResult(
        outcome="unchanged" if report.unchanged else "added" if report.added else "replaced",
        n_passages=report.n_passages,
        n_tokens=report.n_tokens,
        cache_bytes=report.cache_bytes,
        full_kv_bytes=report.full_kv_bytes,
        elapsed_s=time.perf_counter() - start_s,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a worker process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--worker", required=True, help="name of the worker")
    parser.add_argument("--parent", type=int, required=True, help="process id of the driver")
    parser.add_argument("--number", type=int, default=0, help="number of the worker, which selects its GPU")
    parser.add_argument("--threads", type=int, required=True, help="number of CPU threads of this worker")
    parser.add_argument("--lease", type=float, default=LEASE_S, help="duration of a lease in seconds")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C and stops its workers
    warnings.filterwarnings("ignore")  # standard error is kept for the last line of a crash
    try:
        _run(args)
    except Stopped:
        return 0
    except (StoreConnectionError, StoreLockedError) as error:
        print(error.what, file=sys.stderr)
        return BUSY
    except Exception as error:
        print(json.dumps(error_of(error)), flush=True)
        return FATAL
    return 0


def _run(args: argparse.Namespace) -> None:
    with Store.open(args.store, collection=args.collection, create=False) as store:
        ledger = Ledger(store)
        with LiveWorkers(store).hold_worker_lock(args.worker):
            job = ledger.job(args.job)
            pipeline = make_pipeline(store, job, device=_device(args.number, args.threads))
            if job.fingerprint != pipeline.fingerprint.digest:
                ledger.set_fingerprint(job, pipeline.fingerprint.digest)
            work(store, job, args.worker, pipeline, alone=lambda: os.getppid() != args.parent, lease_s=args.lease)


def _device(number: int, n_threads: int) -> str:
    import torch

    torch.set_num_threads(n_threads)
    if torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return "auto"


def _stop(_number: int, _frame: types.FrameType | None) -> NoReturn:
    raise Stopped


if __name__ == "__main__":
    _code = main()
    sys.stdout.flush()
    os._exit(_code)  # everything is closed; shutting down torch would take another second
