"""Answer: the one result of decoding. AnswerStream: its pieces during decoding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kv_memory.generate.generator import Run
    from kv_memory.retrieval.bm25 import Hit

__all__ = ["Answer", "AnswerStream", "ReadFrom", "iterate_in_thread"]

ReadFrom = Literal["caches", "text"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with its sources and its cost.

    Attributes:
        question: The question, unchanged; empty for a reply to several turns and for a continued text.
        text: Decoded text, without the stop string; if there is a question, also without surrounding space. It is empty
            if no passage shares a word with the question, and rarely otherwise: see `next_step`.
        sources: Passages it was answered from, best first.
        finish_reason: `stop` (end token, stop string or complete JSON), `length` (cut at max_new_tokens), or
            `no_sources`.
        n_prompt_tokens: Tokens prefilled for this answer, including texts that replace caches.
        n_cached_tokens: Cache entries used instead of prefill, including the shared prefix.
        ttft_s: Seconds from the call to the first token: loading from the store, composing, prefill. Retrieval is not
            included.
        total_s: Seconds from the call to the last token, likewise.
        read_from: Form in which documents entered the model: distilled caches or text.
        keep_ratios: Keep ratios of the caches, in the order of their references; 1 for a text that replaces a cache.
        damaged: Keys of damaged caches. Each was quarantined and its text prefilled instead. The text was then
            compressed again, unless it does not match the key or the store cannot take the cache.
        token_ids: Decoded token ids, including the end token.
        next_step: Advice if the text is empty; None otherwise.
    """

    question: str = ""
    text: str = ""
    sources: tuple[Hit, ...] = ()
    finish_reason: Literal["stop", "length", "no_sources"] = "no_sources"
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    read_from: ReadFrom = "caches"
    keep_ratios: tuple[float, ...] = ()
    damaged: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    next_step: str | None = None

    @property
    def n_new_tokens(self) -> int:
        """Number of decoded tokens."""
        return len(self.token_ids)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Ids of the sources' documents with a damaged cache."""
        return tuple(hit.document_id for hit in self.sources if hit.text_sha256 in self.damaged)


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are decoded; closing it stops decoding.

    Args:
        run: Run that decodes the answer, the only one of its batch; None if there is nothing to decode.
        so_far: The answer before decoding.
    """

    def __init__(self, run: Run | None, so_far: Answer) -> None:
        self.sources = so_far.sources
        self._run = run
        self._so_far = so_far
        self._steps: Iterator[list[str]] = iter(()) if run is None else run.steps()

    def __next__(self) -> str:
        for (piece,) in self._steps:
            if piece:
                return piece
        raise StopIteration

    def each_token(self) -> Iterator[str]:
        """The same pieces, plus an empty one for every token that yields no text yet."""
        return (piece for (piece,) in self._steps)

    @property
    def answer(self) -> Answer:
        """The whole answer; decodes the remaining tokens first.

        For a closed stream, the answer holds the tokens decoded before it was closed.
        """
        for _ in self._steps:
            pass
        return self._so_far if self._run is None else self._run.results()[0]

    def close(self) -> None:
        """Stop decoding and free its memory."""
        if self._run is not None:
            self._steps.close()  # type: ignore[attr-defined]
            self._run.close()


async def iterate_in_thread(pieces: Iterator[str]) -> AsyncIterator[str]:
    """Iterate over a blocking iterator in asyncio: every step runs in a thread, and empty pieces are skipped.

    If the iterator has `each_token`, a step is one token, with an empty piece where no text is ready. Cancelling then
    stops within a token, even in the middle of a character or of a possible stop string.
    """
    steps = getattr(pieces, "each_token", lambda: pieces)()
    step: asyncio.Future[str | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
            piece = await asyncio.shield(step)
            if piece is None:
                return
            if piece:
                yield piece
    finally:
        if step is not None and not step.done():  # cancelled during a step, which cannot be interrupted
            await asyncio.wait([step])
        pieces.close()  # type: ignore[attr-defined]
