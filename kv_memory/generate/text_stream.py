"""TextStream: from the tokens of an answer to its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kv_memory.model.first_token import first_visible, is_visible

FinishReason = Literal["stop", "length"]


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
