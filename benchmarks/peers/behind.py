"""A scoring press, after a prefix that is never pruned.

Scores are kvpress's own, over prefix and document as it would compute them for this text. The choice that
follows from them, and what a press does with evicted entries, is kvpress's own too, and sees only the document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress, ScorerPress

__all__ = ["Behind", "Whole"]


@dataclass
class Whole(ScorerPress):
    """Scores of a document that were computed over prefix and document.

    Attributes:
        scorer: Press of kvpress that computes the scores.
        n_prefix: Length of the prefix in tokens.
        kept: Keys and values of prefix and document; `Behind` puts them here.
    """

    scorer: ScorerPress | None = None
    n_prefix: int = 0
    kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def post_init_from_model(self, model: Any) -> None:
        """Passed on."""
        assert self.scorer is not None
        self.scorer.post_init_from_model(model)

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        """`(1, num_kv_heads, n_tokens)`; keys and values given are the document's, those scored are `kept`."""
        assert self.scorer is not None and self.kept is not None
        scores: torch.Tensor = self.scorer.score(module, hidden_states, *self.kept, attentions, kwargs)
        return scores[..., self.n_prefix :].clone()


@dataclass
class Behind(BasePress):
    """A press that compresses a document; the prefix before it is kept.

    Attributes:
        press: Wrapper of kvpress around `whole`, or `whole` itself.
        whole: Scorer of the document.
    """

    press: BasePress
    whole: Whole

    def post_init_from_model(self, model: Any) -> None:
        """Passed on."""
        self.press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, attentions: Any, kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix, and the document's entries that the press leaves; it may mark some as evicted."""
        n_prefix = self.whole.n_prefix
        self.whole.kept = keys, values
        module.masked_key_indices = None
        document = self.press.compress(
            module, hidden_states, keys[:, :, n_prefix:], values[:, :, n_prefix:], attentions, kwargs
        )
        if module.masked_key_indices is not None:
            batch, heads, tokens = module.masked_key_indices
            module.masked_key_indices = batch, heads, tokens + n_prefix
        return tuple(
            torch.cat([all_[:, :, :n_prefix], rest], 2) for all_, rest in zip((keys, values), document, strict=True)
        )
