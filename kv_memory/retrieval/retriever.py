"""Retriever: the passages of one collection that a question is about, best first."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_memory.errors import DocumentNotFoundError
from kv_memory.retrieval.bm25 import CollectionIndex
from kv_memory.retrieval.filters import Filter, check_request, matching_documents
from kv_memory.store import Store


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage found for a question.

    Attributes:
        document_id: Id of the document that contains the passage.
        ordinal: Position of the passage in the document, from 0.
        score: Score, the higher the better; comparable within one question only.
        text: Text of the passage; None if it is not kept.
        text_sha256: SHA-256 of the text, in hex: the key of its distilled cache.
        metadata: Metadata of the document.
    """

    document_id: str
    ordinal: int
    score: float
    text: str | None
    text_sha256: str
    metadata: Mapping[str, Any]


class Retriever:
    """Retrieves passages of the latest revision of one collection; thread-safe.

    Args:
        collection: Collection with the passages; other processes may add to it.
    """

    def __init__(self, collection: Store) -> None:
        self._collection = collection
        self._bm25 = CollectionIndex(collection)
        self._lock = threading.Lock()
        self._metadata: tuple[int, dict[str, dict[str, Any]]] = (-1, {})

    def retrieve(
        self,
        question: str,
        *,
        top_k: int,
        document_ids: Collection[str] | None = None,
        filter: Filter | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Retrieve the passages that match the question, best first.

        A passage that was removed or changed meanwhile is skipped.

        Args:
            question: Any text.
            top_k: Maximum number of passages; it may exceed the number of passages in the collection.
            document_ids: Ids of the documents to search; None for all.
            filter: Metadata of the documents to search, see `matching_documents`.
            min_score: Least score of a passage.

        Returns:
            Hits with a score above 0; hits with equal scores are in the order of document id and ordinal.

        Raises:
            ConfigError: An argument is malformed, or no document has metadata of a name in the filter.
            DocumentNotFoundError: The collection has no document with one of the ids.
        """
        check_request(top_k=top_k, document_ids=document_ids, filter=filter, min_score=min_score)
        rows, scores = self._bm25.scores(question)
        found = np.flatnonzero(scores > 0 if min_score is None else (scores > 0) & (scores >= min_score))
        if document_ids is not None or filter:
            # Before the best are taken: few of them may be among the wanted documents.
            wanted = matching_documents(self._documents(), document_ids, filter)
            found = np.array([row for row in found if rows[row][0] in wanted], dtype=np.intp)
        # Not the top-k of bm25s, which breaks ties at random. Rows are in the order for ties, and the sort is stable.
        hits: list[Hit] = []
        for row in found[np.argsort(-scores[found], kind="stable")]:
            document_id, ordinal, text_sha256 = rows[row]
            try:
                passage = self._collection.passage(document_id, ordinal)
            except DocumentNotFoundError:
                continue
            if passage.text_sha256 != text_sha256:
                continue
            hits.append(
                Hit(
                    document_id=document_id,
                    ordinal=ordinal,
                    score=float(scores[row]),
                    text=passage.text,
                    text_sha256=text_sha256,
                    metadata=passage.metadata,
                )
            )
            if len(hits) == top_k:
                break
        return hits

    def _documents(self) -> dict[str, dict[str, Any]]:
        """The metadata of all documents by id, loaded once a revision."""
        revision = self._collection.revision
        with self._lock:
            if self._metadata[0] != revision:
                self._metadata = revision, self._collection.metadata()
            return self._metadata[1]
