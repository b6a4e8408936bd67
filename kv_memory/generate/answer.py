"""Answer: the one result of decoding. AnswerStream: its pieces during decoding."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kv_memory.generate.request import Request
    from kv_memory.generate.scheduler import Scheduler
    from kv_memory.retrieval.retriever import Hit

ReadFrom = Literal["caches", "text"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with its sources and its cost.

    Attributes:
        question: The question, unchanged; empty for a reply to several turns and for a continued text.
        text: Decoded text, without the stop string; if there is a question, also without surrounding space. It is empty
            if no passage matches the question, and rarely otherwise: see `next_step`.
        sources: Passages it was answered from, best first.
        finish_reason: `stop` (end token, stop string or complete JSON), `length` (cut at max_new_tokens), or
            `no_sources`.
        n_prompt_tokens: Tokens prefilled for this answer, including texts that replace caches.
        n_cached_tokens: Cache entries used instead of prefill, including the shared prefix.
        ttft_s: Seconds from the call to the first token: loading from the store, composing, waiting for other requests,
            prefill. Retrieval is not included.
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
    """Pieces of an answer as they are decoded. Closing it, or losing it, stops decoding.

    Args:
        scheduler: Scheduler of the request.
        request: The request, which joins its queue; None if there is nothing to decode.
        so_far: The answer before decoding.

    Raises:
        QueueFullError: The queue is full.
    """

    def __init__(self, scheduler: Scheduler, request: Request | None, so_far: Answer) -> None:
        self.sources = so_far.sources
        self._scheduler = scheduler
        self._so_far = so_far
        self._request: Request | None = None
        if request is not None:
            scheduler.join(request)
            self._request = request

    def __next__(self) -> str:
        while self._request is not None and (piece := self._scheduler.next_piece(self._request)) is not None:
            if piece:
                return piece
        raise StopIteration

    def each_token(self) -> Iterator[str]:
        """The same pieces, plus an empty one for every token that yields no text yet."""
        while self._request is not None and (piece := self._scheduler.next_piece(self._request)) is not None:
            yield piece

    async def anext_piece(self) -> str | None:
        """The next piece in asyncio, which may be empty; None at the end. Nothing of it blocks the event loop."""
        return None if self._request is None else await self._scheduler.anext_piece(self._request)

    @property
    def answer(self) -> Answer:
        """The whole answer; decodes the remaining tokens first.

        For a closed stream, the answer holds the tokens decoded before it was closed.
        """
        return self._so_far if self._request is None else self._scheduler.finish(self._request)

    def close(self) -> None:
        """Stop decoding and free its memory."""
        if self._request is not None:
            self._scheduler.leave(self._request)

    def __del__(self) -> None:
        request: Request | None = getattr(self, "_request", None)
        if request is not None:
            request.end()  # not `leave`: this may run inside any other call, also one that holds the scheduler's lock


async def iterate_in_thread(stream: AnswerStream) -> AsyncGenerator[str, None]:
    """The pieces of an answer in asyncio: every step runs in a thread, and empty pieces are skipped.

    Cancelling stops within a token, even in the middle of a character or of a possible stop string.
    """
    try:
        while (piece := await stream.anext_piece()) is not None:
            if piece:
                yield piece
    finally:
        stream.close()
