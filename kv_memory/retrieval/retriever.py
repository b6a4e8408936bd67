"""Retriever: the passages of one collection that a question is about, best first."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from kv_memory.config import RetrieverName
from kv_memory.errors import DocumentNotFoundError
from kv_memory.retrieval.bm25 import CollectionIndex, Row
from kv_memory.retrieval.encoder import Encoder
from kv_memory.retrieval.filters import Filter, check_request, matching_documents
from kv_memory.retrieval.hashed_terms import terms_of, terms_of_question
from kv_memory.retrieval.near_duplicates import Distinct
from kv_memory.retrieval.vectors import VectorIndex
from kv_memory.store import Store


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage found for a question.

    Attributes:
        document_id: Id of the document that contains the passage.
        ordinal: Position of the passage in the document, from 0.
        score: Score, the higher the better: of `bm25` above 0, comparable within one question only; of `embedding` the
            cosine; of `hybrid` the mean of both as shares of the best, in (0, 1].
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


class RetrieveOptions(TypedDict, total=False):
    """Which passages to retrieve for a question.

    Attributes:
        top_k: Largest number of passages; None means 1 for `smollm2` and `qwen-0.5b`, and 3 for other models.
        document_ids: Ids of the documents to search; None for all.
        filter: Metadata of the documents to search, e.g. `{"year": [2025, 2026]}`: a value, or a list of values of
            which one is enough, by name.
        min_score: Least score (`Hit.score`) of a passage.
    """

    top_k: int | None
    document_ids: Collection[str] | None
    filter: Filter | None
    min_score: float | None


class Retriever:
    """Retrieves passages of the latest revision of one collection; thread-safe.

    Args:
        collection: Collection with the passages; other processes may add to it.
    """

    def __init__(self, collection: Store) -> None:
        self._collection = collection
        self._bm25 = CollectionIndex(collection)
        self._vectors = VectorIndex(collection)
        self._lock = threading.Lock()
        self._metadata: tuple[int, dict[str, dict[str, Any]]] = (-1, {})

    def retrieve(
        self,
        question: str,
        *,
        top_k: int,
        retriever: RetrieverName = "bm25",
        encoder: Encoder | None = None,
        document_ids: Collection[str] | None = None,
        filter: Filter | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Retrieve the passages that match the question, best first.

        A passage that was removed or changed meanwhile is skipped, and so is one that repeats a better one, see
        `Distinct`.

        Args:
            question: Any text.
            top_k: Maximum number of passages; it may exceed the number of passages in the collection.
            retriever: Way of finding: by words (`bm25`), by vectors (`embedding`), or by both (`hybrid`).
            encoder: Encoder of the question, for vectors.
            document_ids: Ids of the documents to search; None for all.
            filter: Metadata of the documents to search, see `matching_documents`.
            min_score: Least score of a passage.

        Returns:
            Hits; those with equal scores are in the order of document id and ordinal. With `bm25` only passages that
            share a word with the question.

        Raises:
            ConfigError: An argument is malformed, or no document has metadata of a name in the filter.
            DocumentNotFoundError: The collection has no document with one of the ids.
            EncoderError: A passage has no vector of the encoder, or the encoder fails.
        """
        check_request(top_k=top_k, document_ids=document_ids, filter=filter, min_score=min_score)
        rows, scored = self._scored(question, retriever, encoder)
        if document_ids is not None or filter:
            # Before passages are ranked: few of the best may be in the wanted documents.
            wanted = matching_documents(self._documents(), document_ids, filter)
            allowed = np.fromiter((row[0] in wanted for row in rows), dtype=bool, count=len(rows))
            scored = [np.where(allowed, scores, -np.inf) for scores in scored]
        scores = scored[0] if len(scored) == 1 else fused(scored)
        found = np.flatnonzero(np.isfinite(scores) if min_score is None else scores >= min_score)
        # Not the top-k of bm25s, which breaks ties at random. Rows are in the order for ties, and the sort is stable.
        hits: list[Hit] = []
        distinct = Distinct(terms_of_question(question, ()))
        for row in found[np.argsort(-scores[found], kind="stable")]:
            document_id, ordinal, text_sha256 = rows[row]
            try:
                passage = self._collection.passage(document_id, ordinal)
            except DocumentNotFoundError:
                continue
            text, terms = passage.text, passage.terms or {}
            if passage.text_sha256 != text_sha256:
                continue
            if not distinct.take(terms if text is None else terms_of(text, passage.language)):
                continue
            hits.append(
                Hit(
                    document_id=document_id,
                    ordinal=ordinal,
                    score=float(scores[row]),
                    text=text,
                    text_sha256=text_sha256,
                    metadata=passage.metadata,
                )
            )
            if len(hits) == top_k:
                break
        return hits

    def _scored(
        self, question: str, retriever: RetrieverName, encoder: Encoder | None
    ) -> tuple[list[Row], list[np.ndarray]]:
        """All passages, and their scores by each way of scoring: (n_passages,), -inf where a passage is not found."""
        rows, scored = list[Row](), list[np.ndarray]()
        if retriever != "embedding":
            rows, scores = self._bm25.scores(question)
            scored.append(np.where(scores > 0, scores, -np.inf))
        if retriever != "bm25":
            assert encoder is not None, "the settings name one"
            by_vector, cosines = self._vectors.scores(question, encoder)
            if retriever == "embedding":
                rows = by_vector
            elif by_vector != rows:  # a document was put between the two
                place = dict(zip(by_vector, cosines, strict=True))
                cosines = np.array([place.get(row, -np.inf) for row in rows], dtype=np.float32)
            scored.append(cosines)
        return rows, scored

    def _documents(self) -> dict[str, dict[str, Any]]:
        """The metadata of all documents by id, loaded once a revision."""
        revision = self._collection.revision
        with self._lock:
            if self._metadata[0] != revision:
                self._metadata = revision, self._collection.metadata()
            return self._metadata[1]


def fused(scored: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of several scores, each as a share of its best one; 1 is the best in all.

    Reciprocal rank fusion was rejected: it forgets by how much the first is ahead of the second, and then finds the
    right passage first less often than BM25 alone (docs/retrieval.md).

    Args:
        scored: Scores (n,) of the same passages; -inf, or 0 and below, where one does not match.

    Returns:
        Fused scores (n,) in (0, 1], and -inf for passages that match in none.
    """
    total = np.zeros(len(scored[0]))
    for scores in scored:
        positive = np.maximum(scores, 0)
        total += positive / max(positive.max(initial=0), np.finfo(np.float32).tiny) / len(scored)
    return np.where(total > 0, total, -np.inf)
