"""Finder: the passages of a store that fit a question, by an index that follows the store's revisions."""

from __future__ import annotations

import threading

from kv_memory.retrieve import BM25Index, Hit
from kv_memory.store import Store

__all__ = ["Finder"]


class Finder:
    """BM25 over one collection. Thread-safe; what another process adds is found by the next question.

    Args:
        store: Whose passages are found.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._index: tuple[int, BM25Index] | None = None

    def retrieve(self, question: str, *, top_k: int) -> list[Hit]:
        """At most `top_k` passages, the best first. Errors as in `BM25Index.retrieve`."""
        store, revision = self._store, self._store.revision
        with self._lock:
            if self._index is None or self._index[0] != revision:
                index = BM25Index.open(
                    store.index_folder, revision=revision, passages=store.passages, lookup=store.passage
                )
                self._index = (revision, index)
            index = self._index[1]
        return index.retrieve(question, top_k=top_k)
