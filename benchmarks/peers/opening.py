"""Answers begin with something visible: the rule of `kv_memory.model.first_token`, for greedy answers.

Until an answer has a visible character, tokens that leave it without one are skipped, and stop strings do not
count. One space may stand at the very beginning where the prompt does not end in white space.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import torch

__all__ = ["FirstToken", "first_visible"]

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # control and format characters, white space


def first_visible(text: str) -> int:
    """Index of the first visible character; the length of the text if there is no such character."""
    return next((i for i, char in enumerate(text) if unicodedata.category(char) not in _INVISIBLE), len(text))


class FirstToken:
    """Picks the first tokens of one answer.

    Args:
        tokenizer: Tokenizer of the model.
        end_ids: Tokens that end an answer.
        behind: Last token of the prompt.
    """

    def __init__(self, tokenizer: Any, *, end_ids: Collection[int], behind: int) -> None:
        self._tokenizer, self._end_ids = tokenizer, end_ids
        before = tokenizer.decode([behind])
        self._behind, self._spaced = behind, None if before[-1:].isspace() else f"{before} "

    def has_begun(self, ids: Sequence[int]) -> bool:
        """Whether the answer of these tokens has a visible character; an incomplete one at its end does not count."""
        text = self._decode(ids).rstrip("\ufffd")
        return first_visible(text) < len(text)

    def pick(self, log_probs: torch.Tensor, ids: Sequence[int], *, is_last: bool) -> int:
        """The likeliest next token, of `(vocab_size,)`, that may follow an answer's tokens so far."""
        best = int(log_probs.argmax())
        if self.has_begun(ids):
            return best
        ranked = (int(token) for n in (8, len(log_probs)) for token in log_probs.topk(n).indices)
        return next((token for token in ranked if self._fits(token, ids, is_last)), best)

    def _fits(self, token: int, ids: Sequence[int], is_last: bool) -> bool:
        if token in self._end_ids:
            return False
        text = self._decode([*ids, token])
        if first_visible(text) < len(text):
            return True
        return not ids and not is_last and self._tokenizer.decode([self._behind, token]) == self._spaced

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
