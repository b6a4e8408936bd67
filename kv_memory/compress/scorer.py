"""The scorer: a small feed-forward head that says which tokens of a document matter (KV-Distill, section 3)."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Scorer"]


class Scorer(nn.Module):
    """Scores document tokens from the hidden state after layer eta. It never sees a question.

    Args:
        hidden_size: Of the model.
        inner_size: Of the hidden layer.
        num_layers: Of the model; used with `per_head`.
        num_kv_heads: Of the model; used with `per_head`.
        per_head: One score per layer and KV head instead of one for all (the paper's form).
    """

    def __init__(
        self, *, hidden_size: int, inner_size: int, num_layers: int, num_kv_heads: int, per_head: bool
    ) -> None:
        super().__init__()
        self._shape = (num_layers, num_kv_heads) if per_head else ()
        # Hidden states of mid layers hold a few huge dimensions; without the norm they would be all the head sees.
        self.norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, num_layers * num_kv_heads if per_head else 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score every token.

        Args:
            hidden: `(n_tokens, hidden_size)`, any dtype.

        Returns:
            `(n_tokens,)`, or `(num_layers, num_kv_heads, n_tokens)`; float32.
        """
        scores: torch.Tensor = self.outer(nn.functional.gelu(self.inner(self.norm(hidden.float()))))
        return scores.T.unflatten(0, self._shape) if self._shape else scores[:, 0]
