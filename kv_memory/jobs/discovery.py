"""Discovery: what the sources hold, into the ledger, while workers are at it already."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

from kv_memory.documents import read_file
from kv_memory.errors import DocumentError
from kv_memory.jobs.item import SourceItem
from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import Job
from kv_memory.jobs.sources import Sources
from kv_memory.jobs.sources.files import path_of
from kv_memory.jobs.sync import Seen, is_current, known_fingerprint, unseen
from kv_memory.store import Store

__all__ = ["Discovery"]

_BATCH = 500
_WAIT_S = 0.3
_BATCH_S = 0.5  # the first documents should not wait for the 500th


class Discovery(threading.Thread):
    """A thread that makes the tasks of a job; those that are there already stay as they are.

    Attributes:
        error: What ended it early; None while it runs and where it came to its end.
        listed: Whether every document has its task. A sync goes on behind that: it deletes what is gone when the rest
            is done, so that a file that was only moved finds its caches.
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
        """End it after the present batch, and wait for that."""
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
        """Make tasks; whether all items were reached."""
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
        """Tasks for what is new or has changed; what is gone is deleted, unless a folder could not be listed."""
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
                self._n_unlisted += os.path.isdir(path_of(item.uri))  # what lies in there was not seen
            elif self._is_current(item, fingerprint):
                self._n_unchanged += 1
                continue
            yield item

    def _is_current(self, item: SourceItem, fingerprint: str | None) -> bool:
        if fingerprint is None:
            return False  # only a worker, with its model, can tell
        try:
            document = read_file(path_of(item.uri), encoding=self._job.settings.encoding)
        except DocumentError:
            return False  # the worker will say so
        return is_current(self._store, document, self._job, fingerprint)
