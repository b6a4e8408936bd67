"""Asker: answers questions from given passages. Answer: the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kv_memory.config import DecodeSettings
from kv_memory.errors import TextNotKeptError
from kv_memory.generate import Turn
from kv_memory.query import Reader, Reference, Reply, ReplyStream
from kv_memory.retrieval.bm25 import Hit
from kv_memory.store import DocumentRecord

__all__ = ["Answer", "AnswerStream", "Asker", "ReadFrom"]

ReadFrom = Literal["caches", "text"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with its sources and its cost.

    Attributes:
        question: The question, unchanged.
        text: The answer. It is empty if no passage shares a word with the question, and rarely otherwise: see
            `next_step`.
        sources: Passages it was answered from, best first.
        finish_reason: `stop`, `length` (cut at max_new_tokens), or `no_sources`.
        n_prompt_tokens: Tokens prefilled for this question, including texts that replace damaged caches.
        n_cached_tokens: Cache entries used instead of prefill, including the shared prefix.
        ttft_s: Seconds from the retrieved passages to the first token: loading from the store, composing, prefill.
        total_s: Seconds from the retrieved passages to the last token.
        read_from: Form in which documents entered the model: distilled caches or text.
        fallbacks: Ids of documents with a damaged cache, which was quarantined; their text was prefilled instead.
        next_step: Advice if the text is empty; None otherwise.
    """

    question: str
    text: str
    sources: tuple[Hit, ...]
    finish_reason: Literal["stop", "length", "no_sources"]
    n_prompt_tokens: int
    n_cached_tokens: int
    ttft_s: float
    total_s: float
    read_from: ReadFrom
    fallbacks: tuple[str, ...] = ()
    next_step: str | None = None


class AnswerStream(Iterator[str]):
    """Pieces of an answer during decoding.

    Args:
        pieces: The text, piece by piece.
        finish: Function that returns the `Answer` once the pieces are exhausted.
        sources: Passages the answer comes from.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Answer], *, sources: tuple[Hit, ...]) -> None:
        self._pieces = pieces
        self._finish = finish
        self.sources = sources

    def __next__(self) -> str:
        return next(self._pieces)

    def each_token(self) -> Iterator[str]:
        """The same pieces, plus an empty one for every token that yields no text yet."""
        return self._pieces.each_token() if isinstance(self._pieces, ReplyStream) else self._pieces

    @property
    def answer(self) -> Answer:
        """The whole answer; decodes the remaining tokens first."""
        for _ in self._pieces:
            pass
        return self._finish()

    def close(self) -> None:
        """Stop decoding."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


class Asker:
    """Answers questions from retrieved passages.

    Args:
        reader: Reader of the passages' caches.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def stream(
        self, question: str, hits: Sequence[Hit], *, settings: DecodeSettings | None, read_from: ReadFrom
    ) -> AnswerStream:
        """Answer one question from passages; without any, the answer is empty."""
        if not hits:
            return AnswerStream(iter(()), lambda: _no_sources(question, read_from), sources=())
        from_caches = read_from == "caches"
        pieces = self._reader.reply(
            [Turn("user", question)],
            _references(hits) if from_caches else (),
            texts=() if from_caches else _texts(hits),
            settings=settings,
        )
        return AnswerStream(
            pieces, lambda: _answer(question, pieces.reply, hits, read_from=read_from), sources=tuple(hits)
        )

    def ask_batch(
        self, questions: Sequence[str], document: DocumentRecord, *, settings: DecodeSettings | None
    ) -> list[Answer]:
        """Answer several questions from all passages of a document as one batch."""
        hits = [
            Hit(document_id=document.id, ordinal=i, score=1.0, text=p.text, text_sha256=p.text_sha256, metadata={})
            for i, p in enumerate(document.passages)
        ]
        replies = self._reader.reply_batch(questions, _references(hits), settings=settings)
        return [_answer(q, reply, hits, read_from="caches") for q, reply in zip(questions, replies, strict=True)]


def _references(hits: Sequence[Hit]) -> list[Reference]:
    # No texts: a missing cache is an error here, and for a damaged one the reader takes the text from the store.
    return [Reference(key=hit.text_sha256) for hit in hits]


def _texts(hits: Sequence[Hit]) -> list[str]:
    lacking = next((hit for hit in hits if hit.text is None), None)
    if lacking is not None:
        raise TextNotKeptError(
            "the text of a passage is not kept, so it can only be answered from its cache",
            where=f"{lacking.document_id}, passage {lacking.ordinal}",
            next_step="Add the document again with `--keep-text` (keep_text=True); it is not compressed again.",
        )
    return [hit.text for hit in hits if hit.text is not None]


def _answer(question: str, reply: Reply, hits: Sequence[Hit], *, read_from: ReadFrom) -> Answer:
    return Answer(
        question=question,
        text=reply.text.strip(),
        sources=tuple(hits),
        finish_reason=reply.finish_reason,
        n_prompt_tokens=reply.n_prompt_tokens,
        n_cached_tokens=reply.n_cached_tokens,
        ttft_s=reply.ttft_s,
        total_s=reply.total_s,
        read_from=read_from,
        fallbacks=tuple(hit.document_id for hit in hits if hit.text_sha256 in reply.damaged),
        next_step=reply.next_step,
    )


def _no_sources(question: str, read_from: ReadFrom) -> Answer:
    return Answer(
        question=question,
        text="",
        sources=(),
        finish_reason="no_sources",
        n_prompt_tokens=0,
        n_cached_tokens=0,
        ttft_s=0.0,
        total_s=0.0,
        read_from=read_from,
        next_step="Use words that occur in the documents.",
    )
