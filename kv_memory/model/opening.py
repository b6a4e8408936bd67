"""What an answer begins with: something that can be seen. This is the one place of that rule.

Behind worked examples the likeliest first token is often the line break that also ends the answer, and behind a chat
template the end token. Until an answer has a visible character, tokens that leave it without one are passed over, and
stop strings do not count (`generate.text`). Masking a list of such tokens was rejected: every process would decode its
whole vocabulary before the first answer, and a list does not know what several tokens that are one character come to.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

__all__ = ["Opening", "first_visible", "is_visible"]

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # control and format characters, white space


def first_visible(text: str) -> int:
    """Index of the first visible character; the length of the text where there is none."""
    return next((i for i, char in enumerate(text) if unicodedata.category(char) not in _INVISIBLE), len(text))


def is_visible(text: str) -> bool:
    """Whether anything of a text can be seen."""
    return first_visible(text) < len(text)


class Opening:
    """Picks the first tokens of one answer, up to its first visible character.

    One space is let pass at the very beginning where the prompt does not end in white space: many tokenizers put it
    apart from a digit, and `Answer: 3` is what the worked examples show.

    Args:
        tokenizer: Of the model.
        end_ids: Tokens that end an answer.
        behind: The prompt's last token; None where there is no prompt.
    """

    def __init__(self, tokenizer: Any, *, end_ids: Collection[int], behind: int | None) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._behind = behind

    def pick(
        self,
        choose: Callable[[torch.Tensor], int],
        logits: torch.Tensor,
        ids: Sequence[int],
        *,
        is_last: bool = False,
    ) -> int:
        """The next token, by what `choose` picks of those that may stand here.

        Args:
            choose: Picks a token from logits.
            logits: `(vocab_size,)`.
            ids: The answer's tokens so far.
            is_last: No more tokens will follow.

        Returns:
            A token; where none that has a finite logit may stand here, the first one that was picked.
        """
        first = token = choose(logits)
        left = logits
        while not self._fits(token, ids, is_last):
            left = logits.clone() if left is logits else left
            left[token] = -torch.inf
            if not bool(left.isfinite().any()):
                return first
            token = choose(left)
        return token

    def likeliest(self, logits: torch.Tensor, ids: Sequence[int]) -> int:
        """The next token of a greedy answer that has not begun. Arguments as in `pick`."""
        return self.pick(lambda left: int(left.argmax()), logits, ids)

    def has_begun(self, ids: Sequence[int]) -> bool:
        """Whether anything of an answer of these tokens can be seen; half a character at its end is none yet."""
        return is_visible(self._decode(ids).rstrip("\ufffd"))

    def greedy(self, log_probs: torch.Tensor, ids: Sequence[int]) -> list[int]:
        """What greedy decoding takes in the place of each token of an answer.

        Args:
            log_probs: `(len(ids), vocab_size)`, each row behind the tokens before it.
            ids: The answer's tokens.
        """
        best: list[int] = log_probs.argmax(-1).tolist()
        for step, row in enumerate(log_probs):
            if self.has_begun(ids[:step]):
                break
            best[step] = self.likeliest(row, ids[:step])
        return best

    def _fits(self, token: int, ids: Sequence[int], is_last: bool) -> bool:
        if token in self._end_ids:
            return False
        return is_visible(self._decode([*ids, token])) or (not ids and not is_last and self._is_space(token))

    def _is_space(self, token: int) -> bool:
        if self._behind is None:
            return False
        # Behind the prompt, because some tokenizers drop a space that nothing precedes.
        before: str = self._tokenizer.decode([self._behind])
        return not before[-1:].isspace() and self._tokenizer.decode([self._behind, token]) == f"{before} "

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
