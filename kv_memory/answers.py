"""Answering a question from given passages, and what that gives back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kv_memory.cache import DistilledCache
from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings, Layout
from kv_memory.errors import CorruptCacheError, StoreError
from kv_memory.generate import Generation, Generator
from kv_memory.retrieve import Hit
from kv_memory.store import Store

__all__ = ["Answer", "AnswerStream", "Asker", "ReadFrom"]

ReadFrom = Literal["caches", "text"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with where it came from and what it cost.

    Attributes:
        question: As asked.
        text: The answer; empty where no passage shares a word with the question.
        sources: The passages it was answered from, the best first.
        finish_reason: `stop`, `length` (cut at max_new_tokens), or `no_sources`.
        n_prompt_tokens: Tokens prefilled for this question.
        n_cached_tokens: Entries read from caches instead, the shared prefix included.
        ttft_s: From the retrieved passages to the first token: reading the store, composing, prefill.
        total_s: From the retrieved passages to the last token.
        read_from: Whether documents entered the model as distilled caches or as text.
        fallbacks: Documents whose cache was damaged: it was quarantined and their text was read instead.
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


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are decoded.

    Args:
        pieces: The text, piece by piece.
        finish: Makes the `Answer` once the pieces are exhausted.
        sources: The passages it is answered from.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Answer], *, sources: tuple[Hit, ...]) -> None:
        self._pieces = pieces
        self._finish = finish
        self.sources = sources

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer; decodes what has not been taken yet."""
        for _ in self._pieces:
            pass
        return self._finish()

    def close(self) -> None:
        """Stop decoding."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


class Asker:
    """Answers questions from passages whose caches lie in a store.

    Args:
        store: Where the caches lie.
        compressor: Whose caches are wanted; reads the text of a passage whose cache is damaged.
        keep_ratio: Of the caches.
        layout: How documents are placed, see `generate.compose`.
    """

    def __init__(self, store: Store, compressor: Compressor, *, keep_ratio: float, layout: Layout) -> None:
        self._store = store
        self._compressor = compressor
        self._keep_ratio = keep_ratio
        self._generator = Generator(compressor.backbone, layout=layout)

    def stream(
        self, question: str, hits: Sequence[Hit], *, settings: DecodeSettings | None, read_from: ReadFrom
    ) -> AnswerStream:
        """Answer one question from passages; without any there is nothing to answer from."""
        if not hits:
            return AnswerStream(iter(()), lambda: _no_sources(question, read_from), sources=())
        start_s = time.perf_counter()
        caches, fallbacks = self._caches(hits) if read_from == "caches" else ([], ())
        texts = [hit.text for hit in hits] if read_from == "text" else []
        before_s = time.perf_counter() - start_s
        run = self._generator.start([question], caches, texts=texts, settings=settings)

        def pieces() -> Iterator[str]:
            for step in run.steps():
                if step[0]:
                    yield step[0]

        def finish() -> Answer:
            generation = run.results()[0]
            return _answer(question, generation, hits, before_s=before_s, read_from=read_from, fallbacks=fallbacks)

        return AnswerStream(pieces(), finish, sources=tuple(hits))

    def ask_batch(
        self, questions: Sequence[str], hits: Sequence[Hit], *, settings: DecodeSettings | None
    ) -> list[Answer]:
        """Answer several questions from the same passages as one batch."""
        start_s = time.perf_counter()
        caches, fallbacks = self._caches(hits)
        before_s = time.perf_counter() - start_s
        generations = self._generator.generate_batch(questions, caches, settings=settings)
        return [
            _answer(question, generation, hits, before_s=before_s, read_from="caches", fallbacks=fallbacks)
            for question, generation in zip(questions, generations, strict=True)
        ]

    def _caches(self, hits: Sequence[Hit]) -> tuple[list[DistilledCache], tuple[str, ...]]:
        """The hits' caches; in the place of damaged ones, which are made again, the plain cache of their text."""
        fingerprint = self._compressor.fingerprint()
        caches: list[DistilledCache] = []
        fallbacks: list[str] = []
        for hit in hits:
            try:
                cache = self._store.get(hit.text_sha256, fingerprint, self._keep_ratio)
            except CorruptCacheError:
                cache = self._compressor.compress(hit.text, keep_ratio=1.0)
                fallbacks.append(hit.document_id)
                self._make_again(hit)
            caches.append(cache)
        return caches, tuple(fallbacks)

    def _make_again(self, hit: Hit) -> None:
        """Replace a damaged cache, so that the next question finds it; a store that cannot take it is no obstacle."""
        with contextlib.suppress(StoreError):
            cache = self._compressor.compress(hit.text, keep_ratio=self._keep_ratio)
            self._store.put(hit.text_sha256, cache)


def _answer(
    question: str,
    generation: Generation,
    hits: Sequence[Hit],
    *,
    before_s: float,
    read_from: ReadFrom,
    fallbacks: tuple[str, ...],
) -> Answer:
    return Answer(
        question=question,
        text=generation.text.strip(),
        sources=tuple(hits),
        finish_reason=generation.finish_reason,
        n_prompt_tokens=generation.n_prompt_tokens,
        n_cached_tokens=generation.n_cached_tokens,
        ttft_s=before_s + generation.ttft_s,
        total_s=before_s + generation.total_s,
        read_from=read_from,
        fallbacks=fallbacks,
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
    )
