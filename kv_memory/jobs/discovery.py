"""Discovery: list the documents of a job's sources in the ledger while workers already process them."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import exists, func, select

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.documents import Document, read_file
from kv_memory.documents.loaders import file_id
from kv_memory.errors import DocumentError, JobError
from kv_memory.jobs.item import SourceItem
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import Job
from kv_memory.jobs.sources import Sources
from kv_memory.jobs.sources.files import FileSource, path_of
from kv_memory.settings import MemorySettings
from kv_memory.store import Store
from kv_memory.store.documents import alive
from kv_memory.store.sql.schema import CacheRow, DocumentRow, FingerprintRow, PassageRow, utc_now

__all__ = ["Discovery", "Seen", "check_folder", "is_current", "known_fingerprint", "unseen"]

_BATCH = 500
_WAIT_S = 0.3
_BATCH_S = 0.5  # the first documents must not wait for the 500th


class Discovery(threading.Thread):
    """A thread that creates the tasks of a job; existing tasks stay unchanged.

    Attributes:
        error: Exception that ended the thread early; None while it runs and after it has completed.
        listed: True once every document has a task. A sync then continues: it deletes documents that are gone, but
            only when the other tasks are finished, so that a file that was merely moved finds its caches.
    """

    def __init__(self, store: Store, ledger: Ledger, job: Job) -> None:
        super().__init__(name=f"discovery of {job.name}", daemon=True)
        self.error: BaseException | None = None
        self.listed = False
        self._store = store
        self._ledger = ledger
        self._job = job
        self._sources = Sources(job.sources["items"], job.settings)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop the thread after the current batch, and wait for it to end."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            if self._job.sources.get("sync"):
                self._sync()
            elif self._add(self._sources.items()):
                self.listed = True
                self._ledger.set_discovered(self._job)
        except BaseException as error:
            self.error = error

    def _add(self, items: Iterator[SourceItem]) -> bool:
        """Create tasks for the items; return False if the thread was stopped."""
        batch: list[SourceItem] = []
        begun_s = time.monotonic()
        for item in items:
            batch.append(item)
            if len(batch) == _BATCH or time.monotonic() - begun_s > _BATCH_S:
                self._ledger.add(self._job, batch)
                batch, begun_s = [], time.monotonic()
                if self._stopped.is_set():
                    return False
        self._ledger.add(self._job, batch)
        return not self._stopped.is_set()

    def _sync(self) -> None:
        """Create tasks for new and changed documents, then delete those that are gone.

        Nothing is deleted if a folder could not be listed.
        """
        with Seen() as seen:
            self._n_unchanged, self._n_unlisted = 0, 0
            if not self._add(self._differing(seen)):
                return
            self.listed = True
            while self._ledger.is_open(self._job):
                if self._stopped.wait(_WAIT_S):
                    return
            if not self._n_unlisted:
                for ids in unseen(self._store, seen):
                    for id_ in ids:
                        self._store.delete_document(id_)
                    self._ledger.count_deleted(self._job, len(ids))
            self._ledger.set_discovered(self._job, n_unchanged=self._n_unchanged)

    def _differing(self, seen: Seen) -> Iterator[SourceItem]:
        fingerprint = known_fingerprint(self._ledger, self._job.settings.memory)
        for item in self._sources.items():
            seen.add(item.document_id)
            if item.error is not None:
                self._n_unlisted += os.path.isdir(path_of(item.uri))  # the content of this folder is unknown
            elif self._is_current(item, fingerprint):
                self._n_unchanged += 1
                continue
            yield item

    def _is_current(self, item: SourceItem, fingerprint: str | None) -> bool:
        if fingerprint is None:
            return False  # only a worker, which has the model, can compute it
        try:
            document = read_file(path_of(item.uri), encoding=self._job.settings.encoding)
        except DocumentError:
            return False  # the worker reports the error
        return is_current(self._store, document, self._job, fingerprint)


_PAGE = 1000


class Seen:
    """The document ids found by a walk, kept on disk: a million of them would take about 100 MB of memory."""

    def __init__(self) -> None:
        # An empty name opens a temporary database: in memory while it is small, then in a file deleted on close.
        self._ids = sqlite3.connect("")
        self._ids.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()

    def add(self, id_: str) -> None:
        """Record an id as seen."""
        self._ids.execute("INSERT OR IGNORE INTO seen VALUES (?)", (id_,))

    def without(self, ids: Sequence[str]) -> list[str]:
        """The ids of a short list that were not seen."""
        marks = ",".join("?" * len(ids))
        there = {id_ for (id_,) in self._ids.execute(f"SELECT id FROM seen WHERE id IN ({marks})", list(ids))}
        return [id_ for id_ in ids if id_ not in there]

    def __len__(self) -> int:
        (n,) = self._ids.execute("SELECT count(*) FROM seen").fetchone()
        return int(n)


def known_fingerprint(ledger: Ledger, memory: dict[str, object]) -> str | None:
    """Fingerprint digest of caches with these settings; None if no job of the collection has determined it yet."""
    found = (job.fingerprint for job in ledger.jobs() if job.fingerprint and job.settings.memory == memory)
    return next(found, None)


def is_current(store: Store, document: Document, job: Job, fingerprint: str | None) -> bool:
    """Whether a document is stored with this text, metadata and settings, and all its passages have their caches."""
    if fingerprint is None:
        return False
    memory = job.settings.memory
    keep = MemorySettings(**memory).keep
    caches = (
        CacheRow.collection_id == store.collection_id,
        CacheRow.text_sha256 == PassageRow.text_sha256,
        CacheRow.fingerprint == fingerprint,
        alive(utc_now()),
    )
    kept = PassageRow.text.is_not(None) if memory["keep_text"] else PassageRow.text.is_(None)
    with store.catalog.read() as session:
        row = session.scalar(
            select(DocumentRow).where(
                DocumentRow.collection_id == store.collection_id, DocumentRow.document_id == document.id
            )
        )
        if row is None or (row.content_sha256, row.passage_tokens) != (
            document.content_sha256,
            memory["passage_tokens"],
        ):
            return False
        if row.details != dict(document.metadata):
            return False
        passages = select(PassageRow.text_sha256).where(PassageRow.document_pk == row.id)
        if keep.keep_ratio is not None:
            cached = exists().where(*caches, CacheRow.keep_ratio == keep.keep_ratio)
            return session.scalar(passages.where(~(cached & kept)).limit(1)) is None
        if session.scalar(passages.where(~kept).limit(1)) is not None:
            return False
        json = session.scalar(select(FingerprintRow.json).where(FingerprintRow.digest == fingerprint))
        if json is None:
            return False
        known = Fingerprint.from_json(json)
        rows = session.execute(
            select(CacheRow.text_sha256, CacheRow.keep_ratio, CacheRow.n_tokens)
            .join(PassageRow, CacheRow.text_sha256 == PassageRow.text_sha256)
            .where(*caches, PassageRow.document_pk == row.id)
        )
        within = {text_sha256 for text_sha256, ratio, n_tokens in rows if keep.fits(ratio, n_tokens, known)}
        return set(session.scalars(passages)) <= within


def check_folder(store: Store, source: FileSource) -> None:
    """Refuse to sync a collection with an unrelated folder, or with one that is unexpectedly empty.

    Raises:
        JobError: The collection holds documents from outside the folder, or the folder is empty and the collection is
            not.
    """
    # Links are resolved only if a document lies outside: they are few, and a linked document has its target's id.
    outside = _outside(store, source.path)
    first = next(outside, None)
    if first is not None:
        linked = {item.document_id for item in source.items() if os.path.islink(path_of(item.uri))}
        strangers = [id_ for id_ in (first, *outside) if id_ not in linked]
        if strangers:
            raise JobError(
                f"the collection holds {len(strangers):,} documents from outside this folder, "
                f"e.g. {strangers[0]!r}; syncing it with the folder would delete them",
                where=source.path,
                next_step="Use a separate --collection for the folder, or pass --force to delete them.",
            )
    if next(source.items(), None) is None and next(_ids(store), None) is not None:
        raise JobError(
            "the folder contains no documents, so syncing would empty the collection",
            where=source.path,
            next_step="Check that the folder is the right one and mounted, or pass --force.",
        )


def unseen(store: Store, seen: Seen) -> Iterator[list[str]]:
    """Ids of the collection's documents that a walk did not find, one page at a time."""
    page: list[str] = []
    for id_ in _ids(store):
        page.append(id_)
        if len(page) == _PAGE // 2:  # SQLite limits the variables per statement
            yield seen.without(page)
            page = []
    if page:
        yield seen.without(page)


def _outside(store: Store, folder: str) -> Iterator[str]:
    prefix = file_id(Path(folder).resolve()).rstrip("/") + "/"
    return _ids(store, without=prefix)


def _ids(store: Store, *, without: str | None = None) -> Iterator[str]:
    """Ids of the collection's documents in ascending order, loaded in pages to keep memory and transactions small."""
    last = ""
    while True:
        wanted = (
            select(DocumentRow.document_id)
            .where(DocumentRow.collection_id == store.collection_id, DocumentRow.document_id > last)
            .order_by(DocumentRow.document_id)
            .limit(_PAGE)
        )
        if without is not None:
            # Not LIKE, which ignores case in SQLite.
            wanted = wanted.where(func.substr(DocumentRow.document_id, 1, len(without)) != without)
        with store.catalog.read() as session:
            page = session.scalars(wanted).all()
        if not page:
            return
        yield from page
        last = page[-1]
