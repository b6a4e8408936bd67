"""The driver: create a job, keep workers running on it, and report progress.

It claims no task and reads no document, so killing it loses nothing: its workers exit, and the next driver resumes.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kv_memory import errors
from kv_memory.errors import ConfigError, JobError, KVMemoryError, StoreError, WorkerDiedError
from kv_memory.jobs.discovery import Discovery, check_folder
from kv_memory.jobs.engines import Engine, WorkerEnd
from kv_memory.jobs.events import (
    DocumentFailed,
    DocumentNoted,
    Event,
    JobEnded,
    JobStarted,
    Progress,
    RateMeter,
    WorkerEnded,
)
from kv_memory.jobs.job_records import Counts, FailedTask, Job, JobSettings, NotedTask, Outcomes
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.sources import name_of, parse_sources
from kv_memory.jobs.sources.files import FileSource
from kv_memory.store import Store

_POLL_S = 0.2, 0.5  # at the start, and later: polling takes processor time from the workers
_BEGINNING_S = 5.0
_SHARE_OF_POLLING = 0.02  # upper bound, as a share of the time: counting a million tasks is slow
_SLOWEST_POLL_S = 5.0
_MOST_STRIKES = 10  # consecutive workers that die without having held a document
_MOST_TOLD = 1000  # failures, and remarks, reported as events; the ledger holds all of them


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A user's request for a job.

    Attributes:
        sources: Files, folders, patterns, `hub:NAME`, `sql:URL`.
        sync: Folder that the collection is made equal to, instead of `sources`.
        force: True to sync even if that deletes documents from outside the folder, or all documents.
        name: Name of the job; derived from the current time if None.
    """

    sources: Sequence[str] = ()
    sync: str | None = None
    force: bool = False
    glob: str | None = None
    query: str | None = None
    name: str | None = None

    def specs(self) -> list[dict[str, Any]]:
        """The sources as specs, the form that the ledger stores.

        Raises:
            ConfigError: No source is given, a source is malformed, `sync` is combined with sources or is not a folder
                of files, or another option does not fit the sources.
            UnreadableDocumentError: A file or folder does not exist, or no file of records matches a pattern.
        """
        if (self.sync is None) == (not self.sources):
            raise ConfigError(
                "either sources or a folder to sync must be given",
                where="SOURCE",
                next_step="For example `kv-memory job run notes/`, or `kv-memory job run --sync notes/`.",
            )
        if self.sync is not None and not Path(self.sync).is_dir():
            raise ConfigError(
                "--sync needs a folder, and this is not a folder",
                where=self.sync,
                next_step=f"Check the path; relative ones start at {Path.cwd()}.",
            )
        if self.force and self.sync is None:
            raise ConfigError(
                "--force is only valid with --sync",
                where="force",
                next_step="Leave out --force, or pass the folder with --sync.",
            )
        named = self.sources if self.sync is None else [self.sync]
        specs = parse_sources(named, glob=self.glob, query=self.query)
        if self.sync is not None and any(spec["kind"] != "files" for spec in specs):
            raise ConfigError(
                "--sync works on whole files, not on the records in them",
                where="glob",
                next_step="Pass the files of records as sources instead: `kv-memory job run FILE...`.",
            )
        return specs


def create_job(store: Store, request: JobRequest, settings: JobSettings) -> Job:
    """Create a job in the ledger; errors of the request as in `JobRequest.specs`.

    Raises:
        JobError: The name is taken or invalid, or the sync would delete documents that `force` does not allow.
    """
    specs = request.specs()
    if request.sync is not None and not request.force:
        check_folder(store, FileSource(specs[0]["path"], glob=specs[0]["glob"]))
    sources = {"items": specs, "sync": request.sync is not None}
    # The default name sorts by time.
    name = request.name or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return Ledger(store).create(name, sources=sources, settings=settings)


def drive(
    store: Store,
    job: Job,
    engine: Engine,
    *,
    resumed: bool = False,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> JobEnded:
    """Run a job to its end. Events are passed to `on_event` from this thread.

    Raises:
        JobError: Another process drives the job, or it was cancelled before.
        WorkerDiedError: Too many workers in a row died before they held a document.
        KVMemoryError: No worker can process any document: the model cannot be loaded, or the store cannot be written.
            The job can be resumed. A new job that has processed nothing because of its model or settings is removed.
    """
    ledger = Ledger(store)
    with ledger.hold_driver_lock(job):
        job = ledger.reopen(job, retry_failed=retry_failed)
        if resumed:
            ledger.free_dead(job)
        names = tuple(map(name_of, job.sources["items"]))
        on_event(JobStarted(job=job.name, sources=names, resumed=resumed))
        driver = _Driver(store, ledger, job, engine, on_event)
        try:
            return driver.run()
        except (errors.ModelError, errors.AdapterError, ConfigError):
            if not resumed and not ledger.counts(job).done:
                ledger.forget(job)
            raise


class _Driver:
    def __init__(
        self, store: Store, ledger: Ledger, job: Job, engine: Engine, on_event: Callable[[Event], None]
    ) -> None:
        self._ledger = ledger
        self._job = job
        self._engine = engine
        self._on_event = on_event
        self._discovery = Discovery(store, ledger, job)
        self._speed = RateMeter()
        self._freed_s = 0.0
        self._strikes = 0
        self._progress = 0  # documents done or failed at the last check
        self._failed = {failed.document_id for failed in ledger.failed(job, limit=_MOST_TOLD)}
        self._noted = {noted.document_id for noted in ledger.noted(job, limit=_MOST_TOLD)}

    def run(self) -> JobEnded:
        start_s = time.monotonic()
        if not self._job.discovered:
            self._discovery.start()
        try:
            self._watch(start_s)
        finally:
            self._discovery.stop()
            self._engine.stop()
            with suppress(StoreError):  # otherwise the next driver frees them
                self._ledger.free_dead(self._job, counted=False)
        self._ledger.finish(self._job)
        counts, job = self._ledger.counts(self._job), self._ledger.job(self._job.name)
        done = {field.name: getattr(counts, field.name) for field in dataclasses.fields(Outcomes)}
        done["unchanged"] += job.n_unchanged
        elapsed_s = time.monotonic() - start_s
        ended = JobEnded(job=job.name, state=job.state, deleted=job.n_deleted, elapsed_s=elapsed_s, **done)
        self._on_event(ended)
        if job.sources.get("sync") and not counts.total:
            self._ledger.forget(job)  # the sync found nothing to do, so no record is needed
        return ended

    def _watch(self, start_s: float) -> None:
        """Keep the job running until no document is left, or until it is cancelled."""
        pause_s = 0.0
        while True:
            # Before the counts, which then include all documents that are listed.
            discovered = self._is_discovered()
            listed = discovered or self._discovery.listed
            asked_s = time.monotonic()
            counts, state = self._ledger.counts(self._job), self._ledger.state(self._job)
            now_s = time.monotonic()
            least_s = _POLL_S[now_s - start_s > _BEGINNING_S]
            pause_s = min(max(least_s, (now_s - asked_s) / _SHARE_OF_POLLING), _SLOWEST_POLL_S)
            self._tell(counts, now_s, now_s - start_s, discovered=listed)
            is_cancelled = state != "running"
            if not counts.running if is_cancelled else discovered and not counts.open:
                return
            if listed and not is_cancelled and not counts.open:
                self._discovery.tasks_done.set()
            self._poll(counts, wanted=0 if is_cancelled else counts.open)
            time.sleep(pause_s)

    def _is_discovered(self) -> bool:
        if self._discovery.is_alive():
            return False
        if (error := self._discovery.error) is not None and self._ledger.state(self._job) == "running":
            raise error
        return True

    def _poll(self, counts: Counts, *, wanted: int) -> None:
        if counts.done + counts.failed > self._progress:
            self._progress, self._strikes = counts.done + counts.failed, 0
        for end in self._engine.poll(self._job, n_open=wanted):
            freed = self._ledger.free(self._job, end.worker, end.reason)
            if end.error is not None:
                raise _raised(end)
            self._strikes = 0 if freed else self._strikes + max(1, end.n_deaths)
            if end.n_deaths:
                self._on_event(WorkerEnded(job=self._job.name, worker=end.worker, reason=end.reason))
            if self._strikes >= _MOST_STRIKES:
                raise WorkerDiedError(
                    f"{self._strikes} workers in a row died before they claimed a document; the last one: {end.reason}",
                    where=self._job.name,
                    next_step="If the system killed them, there may be too little memory: use fewer --workers or "
                    f"a smaller model. Resume with `kv-memory job resume {self._job.name}`.",
                )
        if time.monotonic() - self._freed_s > _SLOWEST_POLL_S:
            self._freed_s = time.monotonic()
            self._ledger.free_dead(self._job)

    def _tell(self, counts: Counts, now_s: float, elapsed_s: float, *, discovered: bool) -> None:
        if len(self._failed) < min(counts.failed, _MOST_TOLD):
            self._tell_of(DocumentFailed, self._ledger.failed(self._job, limit=_MOST_TOLD), self._failed)
        if len(self._noted) < min(counts.noted, _MOST_TOLD):
            self._tell_of(DocumentNoted, self._ledger.noted(self._job, limit=_MOST_TOLD), self._noted)
        documents_per_s, tokens_per_s, left_s = self._speed.see(now_s, counts)
        self._on_event(
            Progress(
                job=self._job.name,
                discovered=discovered,
                total=counts.total,
                done=counts.done,
                failed=counts.failed,
                in_hand=counts.running,
                n_tokens=counts.n_tokens,
                n_workers=self._engine.n_workers(),
                elapsed_s=elapsed_s,
                documents_per_s=documents_per_s,
                tokens_per_s=tokens_per_s,
                left_s=left_s if discovered else None,
            )
        )

    def _tell_of(self, kind: type[Event], tasks: Sequence[FailedTask | NotedTask], told: set[str]) -> None:
        for task in tasks:
            if task.document_id not in told:
                told.add(task.document_id)
                self._on_event(kind(job=self._job.name, **vars(task)))


def _raised(end: WorkerEnd) -> KVMemoryError:
    """A worker's error, rebuilt as an exception of this process."""
    assert end.error is not None
    kind = getattr(errors, str(end.error.get("error")), JobError)
    what = str(end.error.get("what"))
    if kind is JobError:
        what = f"no worker can continue: {end.error.get('error')}: {what}"
    error: KVMemoryError = kind(what, where=end.error.get("where"), next_step=end.error.get("next_step"))
    return error
