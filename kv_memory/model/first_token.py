"""The opening of an answer: its first tokens must lead to a visible character. This rule lives only here.

After worked examples, the likeliest first token is often the line break that also ends the answer; after a chat
template, it is the end token. Until an answer has a visible character, tokens that leave it without one are skipped,
and stop strings are ignored (`generate.answer`). Masking a list of such tokens was rejected: every process would decode
its whole vocabulary before the first answer, and a list cannot handle a character that consists of several tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # control and format characters, white space


def first_visible(text: str) -> int:
    """Index of the first visible character; the length of the text if no character is visible."""
    return next((i for i, char in enumerate(text) if unicodedata.category(char) not in _INVISIBLE), len(text))


def is_visible(text: str) -> bool:
    """Whether a text has a visible character."""
    return first_visible(text) < len(text)


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Picks the first tokens of one answer, up to its first visible character.

    One space is accepted as the very first token if the prompt does not end in white space: many tokenizers split it
    from a digit, and the worked examples show `Answer: 3`. `behind` is the prompt's last token; None without a prompt.
    """

    tokenizer: Any
    end_ids: Collection[int]
    behind: int | None

    def pick(
        self, choose: Callable[[torch.Tensor], int], logits: torch.Tensor, ids: Sequence[int], *, is_last: bool = False
    ) -> int:
        """Pick the next token after `ids` among those allowed here; the first pick if no finite logit is of such one.

        `choose` picks a token from logits, `(vocab_size,)`. `is_last` says that the answer ends with this token.
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
        """The next token of a greedy answer without a visible character yet; arguments as in `pick`."""
        return self.pick(lambda left: int(left.argmax()), logits, ids)

    def has_begun(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these tokens has a visible character; an incomplete one at its end does not count."""
        return is_visible(self.tokenizer.decode(list(ids), skip_special_tokens=True).rstrip("\ufffd"))

    def greedy(self, log_probs: torch.Tensor, ids: Sequence[int]) -> list[int]:
        """The greedy choice at each position of an answer, given the answer's tokens before it.

        `log_probs` are `(len(ids), vocab_size)`, at the positions of the answer's tokens `ids`.
        """
        best: list[int] = log_probs.argmax(-1).tolist()
        for step, row in enumerate(log_probs):
            if self.has_begun(ids[:step]):
                break
            best[step] = self.likeliest(row, ids[:step])
        return best

    def _fits(self, token: int, ids: Sequence[int], is_last: bool) -> bool:
        if token in self.end_ids:
            return False
        if is_visible(self.tokenizer.decode([*ids, token], skip_special_tokens=True)):
            return True
        return not ids and not is_last and self._is_space(token)

    def _is_space(self, token: int) -> bool:
        if self.behind is None:
            return False
        # Decoded with the prompt's last token, because some tokenizers drop a leading space.
        before: str = self.tokenizer.decode([self.behind])
        return not before[-1:].isspace() and bool(self.tokenizer.decode([self.behind, token]) == f"{before} ")
