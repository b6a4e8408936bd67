"""What `ask` and `stream` give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kv_memory.retrieve import Hit

__all__ = ["Answer", "AnswerStream", "ReadFrom"]

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
