"""`kv-memory job run` and `resume`: compress many documents in worker processes; the catalog records the progress."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, Changes, EncodingOption, Place, command
from kv_memory.cli.output import FAILED, Output
from kv_memory.cli.progress import JobTracker, count_text, print_ended
from kv_memory.config import check_fields
from kv_memory.errors import JobError
from kv_memory.settings import MemorySettings

if TYPE_CHECKING:
    from kv_memory.jobs import Job
    from kv_memory.jobs.engines import Engine
    from kv_memory.store import Store


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Worker processes of a job.

    Attributes:
        workers (N): Worker processes, each with its own model: as many as there are GPUs; on CPUs they share the cores.
        engine (NAME): local: processes on this machine. ray: actors in a Ray cluster.
        gpus_per_worker (N): With --engine ray: GPUs per worker; 0.5 for two workers on one GPU.  [default: 1 if there
            are any]
    """

    workers: int = 1
    engine: str = "local"
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        gpus = self.gpus_per_worker
        check_fields(
            self,
            workers=(self.workers >= 1, "at least 1"),
            engine=(self.engine in {"local", "ray"}, "local or ray"),
            gpus_per_worker=(gpus is None or (gpus >= 0 and self.engine == "ray"), "0 or more, with --engine ray"),
        )

    def engine_for(self, store: Store) -> Engine:
        """The engine that runs them on the tasks of a store."""
        if self.engine == "ray":
            from kv_memory.jobs.engines.ray import RayEngine

            return RayEngine(store, n_workers=self.workers, n_gpus=self.gpus_per_worker)
        from kv_memory.jobs.engines.local import LocalEngine

        return LocalEngine(store.path, n_workers=self.workers)


_JSON_LINES = "every event; the last one is the summary"


@command(json_lines=_JSON_LINES)
def run(
    sources: list[str] | None = None,
    *,
    sync: str | None = None,
    force: bool = False,
    workers: Workers,
    name: str | None = None,
    glob: str | None = None,
    id_field: str = "id",
    text_field: str = "text",
    query: str | None = None,
    encoding: EncodingOption = "utf-8",
    max_attempts: int = 3,
    changes: Changes,
    place: Place,
    out: Output,
) -> None:
    """Compress the documents of files, folders, tables and data sets, in worker processes.

    Completed documents survive any crash: `kv-memory job resume` continues with the document that was in progress. A
    document that cannot be read fails alone, and the job ends with exit code 1. Unchanged documents cost only a hash.

    Options:
        sources (SOURCE): Files, folders, patterns in quotes ('notes/**/*.md'); .jsonl and .parquet files, one document
            per record; a docstore.json of LlamaIndex; hub:OWNER/NAME[:SPLIT]; sql:URL with --query.
        sync (DIR): Make the collection equal to this folder: new and changed documents are compressed, missing ones
            deleted.
        force: Sync even if that deletes documents that are not from the folder, or all documents.
        name (NAME): Name of the job.  [default: the time]
        glob (PATTERN): Files to take from folders, e.g. '*.md' or 'reports/**/*.txt'.  [default: those of known types]
        id_field (NAME): Field or column with a record's id; a record without one gets the id FILE#NUMBER.
        text_field (NAME): Field or column with a record's text.
        query (SQL): For sql: sources, e.g. "SELECT id, text FROM notes"; one row is one document.
        max_attempts (N): Number of workers that may die over one document before it counts as failed.
    """
    with out.working("Starting"):
        from kv_memory.documents.decoding import check_encoding
        from kv_memory.jobs import JobSettings
        from kv_memory.jobs.driver import JobRequest, create_job
        from kv_memory.store import Store

    check_encoding(encoding)
    request = JobRequest(sources=sources or [], sync=sync, force=force, glob=glob, query=query, name=name)
    settings = JobSettings(
        memory={}, encoding=encoding, id_field=id_field, text_field=text_field, max_attempts=max_attempts
    )
    request.specs()  # checked before a store is created, so that a typo does not leave one behind
    with Store.open(place.store, collection=place.collection) as opened:
        made = workers.engine_for(opened)
        memory = MemorySettings.resolve(opened.settings(), **changes)
        settings = dataclasses.replace(settings, memory=dataclasses.asdict(memory))
        _drive(out, opened, create_job(opened, request, settings), made)


@command(json_lines=_JSON_LINES)
def resume(name: str | None = None, *, retry_failed: bool = False, workers: Workers, place: Place, out: Output) -> None:
    """Resume a job after Ctrl-C, a crash or a failure.

    Completed documents are not compressed again.

    Options:
        name (NAME): Name of the job.  [default: the newest that is not done]
        retry_failed: Also retry the documents that have failed.
    """
    with out.working("Starting"):
        from kv_memory.jobs import Ledger
        from kv_memory.store import Store

    with Store.open(place.store, collection=place.collection, create=False) as opened:
        ledger = Ledger(opened)
        job = _newest(ledger.jobs(), place.store, retry_failed=retry_failed) if name is None else ledger.job(name)
        made = workers.engine_for(opened)
        _drive(out, opened, job, made, resumed=True, retry_failed=retry_failed)


def _newest(jobs: list[Job], store: Path, *, retry_failed: bool) -> Job:
    states = {"interrupted", "running"} | ({"done"} if retry_failed else set())
    for job in jobs:
        if job.state in states:
            return job
    raise JobError(
        "no job is left to resume",
        where=str(store),
        next_step="List them with `kv-memory job list`, or start one with `kv-memory job run`.",
    )


def _where(store: Store, job: Job) -> str:
    """The options that a command needs to find the job again; empty if the defaults suffice."""
    expected = Path(os.environ.get("KV_MEMORY_STORE") or DEFAULT_STORE).absolute()
    words = [] if store.path.absolute() == expected else ["--store", str(store.path)]
    words += [] if job.collection == DEFAULT_COLLECTION else ["--collection", job.collection]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _drive(
    out: Output, store: Store, job: Job, engine: Engine, *, resumed: bool = False, retry_failed: bool = False
) -> None:
    from kv_memory.jobs import Ledger
    from kv_memory.jobs.driver import drive

    where = _where(store, job)
    go_on = f"kv-memory job resume {job.name}{where}"
    out.stopped = f"Completed documents are stored; `{go_on}` resumes the job."
    if job.state == "done" and not retry_failed:
        out.note(f"Job {job.name} is done; nothing is left to do.")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # they would interfere with the tracker's bar
    with JobTracker(out) as tracker:
        try:
            ended = drive(store, job, engine, resumed=resumed, retry_failed=retry_failed, on_event=tracker)
        except KeyboardInterrupt:
            ledger = Ledger(store)
            counts = ledger.counts(job)
            more = "" if ledger.job(job.name).discovered else "+"
            done = f"{count_text(counts.done, 'document')} done and stored, {counts.open:,}{more} to do"
            out.stopped = f"{done}; `{go_on}` resumes the job."
            raise
    print_ended(out, ended)
    n_documents = ended.added + ended.replaced + ended.unchanged + ended.failed + ended.cancelled
    if not (job.sources["sync"] or n_documents):
        out.note("No document was found. Folders contribute only files of known types; --glob selects others.")
    if ended.noted:
        out.note(f"`kv-memory job show {job.name}{where}` lists the notes.")
    if ended.failed:
        out.note(f"`kv-memory job show {job.name}{where}` lists the failed documents and how to fix them.")
        out.note(f"`{go_on} --retry-failed` retries them.")
        out.code = FAILED
