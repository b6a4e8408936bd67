"""Discovery: list the documents of a job's sources in the ledger while workers already process them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import select

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.documents import read_file
from kv_memory.documents.loaders import file_id, path_of
from kv_memory.errors import DocumentError, JobError
from kv_memory.jobs.job_records import Job, SourceItem
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.sources import Sources
from kv_memory.jobs.sources.files import FileSource
from kv_memory.settings import MemorySettings
from kv_memory.store import Store
from kv_memory.store.sql.schema import DocumentRow

_BATCH = 500
_BATCH_S = 0.5  # the first documents must not wait for the 500th


class Discovery(threading.Thread):
    """A thread that creates the tasks of a job; existing tasks stay unchanged.

    Attributes:
        error: Exception that ended the thread early; None while it runs and after it has completed.
        listed: True once every document has a task.
        tasks_done: Event that the driver sets once all tasks are finished. Only then, a sync deletes documents that are
            gone, so that a file that was merely moved finds its caches.
    """

    def __init__(self, store: Store, ledger: Ledger, job: Job) -> None:
        super().__init__(name=f"discovery of {job.name}", daemon=True)
        self.error: BaseException | None = None
        self.listed = False
        self.tasks_done = threading.Event()
        self._store = store
        self._ledger = ledger
        self._job = job
        self._sources = Sources(job.sources["items"], job.settings)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop the thread after the current batch, and wait for it to end."""
        self._stopped.set()
        self.tasks_done.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            if self._job.sources.get("sync"):
                self._sync()
            elif self._add(self._sources.items()):
                self.listed = True
                self._ledger.update(self._job, discovered=True)
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
        seen: set[str] = set()  # about 100 MB for a million files
        self._n_unchanged, self._n_unlisted = 0, 0
        if not self._add(self._differing(seen)):
            return
        self.listed = True
        self.tasks_done.wait()
        if self._stopped.is_set():
            return
        gone = [] if self._n_unlisted else [id_ for id_ in _ids(self._store) if id_ not in seen]
        for n_deleted, id_ in enumerate(gone, self._job.n_deleted + 1):
            self._store.delete_document(id_)
            self._ledger.update(self._job, n_deleted=n_deleted)
        self._ledger.update(self._job, discovered=True, n_unchanged=self._n_unchanged)

    def _differing(self, seen: set[str]) -> Iterator[SourceItem]:
        # Without it, only a worker, which has the model, can tell whether all caches are there.
        fingerprint = self._ledger.known_fingerprint(self._job.settings.memory)
        for item in self._sources.items():
            seen.add(item.document_id)
            if item.error is not None:
                self._n_unlisted += os.path.isdir(path_of(item.uri))  # the content of this folder is unknown
            elif fingerprint is not None and self._is_current(item, fingerprint):
                self._n_unchanged += 1
                continue
            yield item

    def _is_current(self, item: SourceItem, fingerprint: Fingerprint) -> bool:
        """Whether a document is stored with the text and metadata of its file, the job's settings, and all caches."""
        memory = MemorySettings(**self._job.settings.memory)
        try:
            document = read_file(path_of(item.uri), encoding=self._job.settings.encoding)
        except DocumentError:
            return False  # the worker reports the error
        stored, cached = self._store.find_document(document.id, fingerprint, memory.keep) or (None, set[str]())
        if stored is None:
            return False
        found = (stored.content_sha256, stored.passage_tokens, stored.metadata)
        return found == (document.content_sha256, memory.passage_tokens, dict(document.metadata)) and all(
            (passage.text is not None) == memory.keep_text and passage.text_sha256 in cached
            for passage in stored.passages
        )


def check_folder(store: Store, source: FileSource) -> None:
    """Refuse to sync a collection with an unrelated folder, or with one that is unexpectedly empty.

    Raises:
        JobError: The collection holds documents from outside the folder, or the folder is empty and the collection is
            not.
    """
    ids, inside = _ids(store), file_id(Path(source.path).resolve()).rstrip("/") + "/"
    # Links are resolved only if a document lies outside: they are few, and a linked document has its target's id.
    if outside := [id_ for id_ in ids if not id_.startswith(inside)]:
        linked = {item.document_id for item in source.items() if os.path.islink(path_of(item.uri))}
        strangers = [id_ for id_ in outside if id_ not in linked]
        if strangers:
            raise JobError(
                f"the collection holds {len(strangers):,} documents from outside this folder, "
                f"e.g. {strangers[0]!r}; syncing it with the folder would delete them",
                where=source.path,
                next_step="Use a separate --collection for the folder, or pass --force to delete them.",
            )
    if ids and next(source.items(), None) is None:
        raise JobError(
            "the folder contains no documents, so syncing would empty the collection",
            where=source.path,
            next_step="Check that the folder is the right one and mounted, or pass --force.",
        )


def _ids(store: Store) -> Sequence[str]:
    """Ids of the collection's documents in ascending order; about 100 MB for a million."""
    ids = select(DocumentRow.document_id).where(DocumentRow.collection_id == store.collection_id)
    with store.catalog.read() as session:
        return session.scalars(ids.order_by(DocumentRow.document_id)).all()
