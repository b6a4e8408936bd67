"""Answer: the one result of decoding. AnswerStream: its pieces during decoding. TextStream: from tokens to its text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kv_memory.model.first_token import first_visible, is_visible

if TYPE_CHECKING:
    from kv_memory.generate.generator import Run
    from kv_memory.retrieval.retriever import Hit

FinishReason = Literal["stop", "length"]
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
        self._steps: Generator[list[str], None, None] = ([""] for _ in ()) if run is None else run.steps()

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
        self._steps.close()
        if self._run is not None:
            self._run.close()


class TextStream:
    """Turns the tokens of one answer into text piece by piece.

    A piece is held back while it ends in the middle of a character, or could be the beginning of a stop string. Stop
    strings are ignored before the first visible character.

    Args:
        tokenizer: Tokenizer of the model.
        stop: Strings that end the answer.
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(dict.fromkeys(stop))
        self.token_ids: list[int] = []
        self.finished = False
        self.finish_reason: FinishReason = "length"
        self.text = ""
        self._stopped_by = ""
        self._sent = 0
        # Decoding only the tokens from `_context` on keeps the cost of a long answer linear. Those before `_read` are
        # context for tokenizers that look at the previous token (sentencepiece drops a leading space).
        self._context = 0
        self._read = 0

    def push(self, token: int, *, is_end: bool, is_last: bool, is_complete: bool = False) -> str:
        """Take one token.

        Args:
            token: Token id.
            is_end: True for an end token; it is recorded but adds no text.
            is_last: True if no more tokens follow; all held-back text is released.
            is_complete: True if the answer is complete with this token, which adds text.

        Returns:
            The text that is now final; may be empty.
        """
        self.token_ids.append(token)
        if is_end or is_complete:
            self.finish_reason = "stop"
        flush = is_end or is_last or is_complete
        self.text += self._decode_new(self.token_ids[:-1] if is_end else self.token_ids, flush=flush)
        stopped_at, self._stopped_by = self._find_stop()
        if stopped_at >= 0:
            self.text, self.finish_reason = self.text[:stopped_at], "stop"
        self.finished = flush or stopped_at >= 0
        until = len(self.text) if self.finished else len(self.text) - self._held()
        piece, self._sent = self.text[self._sent : until], max(self._sent, until)
        return piece

    @property
    def begun(self) -> bool:
        """Whether the text has a visible character."""
        return is_visible(self.text)

    @property
    def next_step(self) -> str | None:
        """Advice if the finished answer is empty; None otherwise."""
        if self.begun or not self.finished:
            return None
        if self._stopped_by:
            return f"The answer begins with the stop string {self._stopped_by!r}: pass other strings (stop, --stop)."
        if self.finish_reason == "length":
            return "Allow more tokens: raise max_new_tokens (--max-new-tokens)."
        return "Rephrase the question, use more passages (top_k, --top-k), or use a larger model."

    def _find_stop(self) -> tuple[int, str]:
        """Index and text of the first stop string; index -1 if the text contains no stop string."""
        first = first_visible(self.text)
        # A stop string that ends before the first visible character would leave an empty answer.
        found = [(self.text.find(stop, max(0, first - len(stop) + 1)), stop) for stop in self._stop]
        return min((one for one in found if one[0] >= 0), default=(-1, ""))

    def _decode_new(self, ids: list[int], *, flush: bool) -> str:
        before = self._tokenizer.decode(ids[self._context : self._read], skip_special_tokens=True)
        now: str = self._tokenizer.decode(ids[self._context :], skip_special_tokens=True)
        if now.endswith("\ufffd") and not flush:  # the rest of the character is in the next token
            return ""
        self._context, self._read = self._read, len(ids)
        return now[len(before) :]

    def _held(self) -> int:
        """Length of the longest suffix of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0


async def iterate_in_thread(stream: AnswerStream) -> AsyncGenerator[str, None]:
    """The pieces of an answer in asyncio: every step runs in a thread, and empty pieces are skipped.

    A step of an answer is one token, with an empty piece where no text is ready. Cancelling then stops within a token,
    even in the middle of a character or of a possible stop string.
    """
    steps = stream.each_token()
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
        stream.close()
