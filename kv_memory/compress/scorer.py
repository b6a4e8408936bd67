"""The scorer: a small feed-forward head that predicts which tokens of a document matter (KV-Distill, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from kv_memory.config import Budget

if TYPE_CHECKING:
    from kv_memory.compress.adapter import AdapterConfig

FLOOR = 1e-3  # attention far below this gets the same score as no attention

# `token`: one score per token for all heads, from the hidden state after layer eta (the paper's form). `head`: one per
# layer and KV head, from the same hidden state. `layer`: one per layer and KV head, from the input of each layer.
ScorerKind = Literal["token", "head", "layer"]


class Scorer(nn.Module):
    """Scores document tokens from hidden states, without ever seeing a question; of the kind and size in the config."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.kind = config.scorer
        self._num_layers = config.num_layers
        n_out = {"token": 1, "head": config.num_layers * config.num_kv_heads, "layer": config.num_kv_heads}[self.kind]
        n_heads = config.num_layers if self.kind == "layer" else 1
        self.heads = nn.ModuleList(
            nn.Sequential(
                # Hidden states of middle layers have a few huge dimensions, which without the norm drown all others.
                nn.LayerNorm(config.hidden_size),
                nn.Linear(config.hidden_size, config.scorer_size),
                nn.GELU(),
                nn.Linear(config.scorer_size, n_out),
            )
            for _ in range(n_heads)
        )

    def forward(self, hidden: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Score every token.

        Args:
            hidden: Hidden states `(batch, n_tokens, hidden_size)`, any dtype.
            layer: Index of the layer to score, for a scorer of the kind `layer`.

        Returns:
            Scores, float32: `(1, batch, 1, n_tokens)` for `token`, `(num_layers, batch, num_kv_heads, n_tokens)` for
            `head`, `(1, batch, num_kv_heads, n_tokens)` for `layer`.
        """
        head = self.heads[layer if self.kind == "layer" else 0]
        scores: torch.Tensor = head(hidden.float()).transpose(1, 2)  # (batch, n_out, n_tokens)
        rows: torch.Tensor = scores.unflatten(1, (self._num_layers if self.kind == "head" else 1, -1))
        return rows.transpose(0, 1)


def attention_scores(received: torch.Tensor, real: torch.Tensor, *, budget: Budget) -> torch.Tensor:
    """Convert received attention to the scores that a scorer is trained to predict, on the same scale.

    Scores are logarithms of the attention, `(..., n_tokens)`, 0 to 1; `real` is False for padding. Where heads share
    one budget the scale is the same for all, because scores are compared across heads. Where each head has its own
    budget, only the order within a head matters, and every row is scaled to mean 0 and standard deviation 1.
    """
    logs = (received + FLOOR).log()
    if budget == "model":
        return logs / 2 + 2  # attention 0 to 1 becomes about -1.5 to 2
    n = real.sum(-1, keepdim=True)
    mean = (logs * real).sum(-1, keepdim=True) / n
    spread = (((logs - mean) * real).square().sum(-1, keepdim=True) / n).sqrt() + 1e-3
    return (logs - mean) / spread
