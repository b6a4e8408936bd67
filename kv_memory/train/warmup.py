"""Stage (a): the scorer learns how much attention each token will receive from what follows the document.

Labels are those of the reconstruction selector (KVzip): the highest attention a token receives, in each layer and KV
head, while the model repeats the document. They are dense, where the gradient of distillation says something about
kept tokens only, and they need no question.
"""

from __future__ import annotations

import torch

from kv_memory.attention import ForwardContext, attention_probabilities
from kv_memory.backbone import Backbone
from kv_memory.compress.entries import Entries
from kv_memory.compress.reading import pad

__all__ = ["received_attention", "scorer_loss"]

REQUEST = "\n\nRepeat the previous text exactly.\n"
FLOOR = 1e-3  # attention below this is all the same: nothing


class _Received:
    """Observer: the highest attention every entry receives from the rows that follow its document."""

    def __init__(self, n_prefix: int, n_tokens: int, visible: torch.Tensor, follows: torch.Tensor) -> None:
        self._columns = slice(n_prefix, n_prefix + n_tokens)
        self._visible = visible
        self._follows = follows
        self.layers: list[torch.Tensor] = []

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> None:
        """See `AttentionObserver`. Sliding windows are left out: what lies outside of them counts as seen."""
        new, length = query.shape[2], key.shape[2]
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
        mask = mask & torch.nn.functional.pad(self._visible, (0, new), value=True)[:, None, None]
        weights = attention_probabilities(query, key, mask, scaling=scaling, softcap=softcap)
        weights = weights * self._follows[:, None, :, None]
        here = weights[..., self._columns].unflatten(1, (key.shape[1], -1))  # (batch, kv_heads, group, new, tokens)
        self.layers.append(here.amax((2, 3)))


@torch.no_grad()
def received_attention(backbone: Backbone, ids: torch.Tensor, lengths: torch.Tensor, entries: Entries) -> torch.Tensor:
    """The highest attention each token of each document receives while the model is asked to repeat it.

    Args:
        backbone: The model.
        ids: `(documents, n_tokens)`, padded.
        lengths: `(documents,)`.
        entries: All entries of the documents.

    Returns:
        `(num_layers, documents, num_kv_heads, n_tokens)`, float32, in 0 to 1.
    """
    request = backbone.encode(REQUEST)
    rows = [[*request, *row[:length]] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    asked, asked_lengths = pad(rows, device=backbone.device)
    every = torch.arange(len(rows), device=backbone.device)
    cache = entries.cache(every)
    visible = entries.positions[0, :, 0] < backbone.context_window
    follows = torch.arange(asked.shape[1], device=backbone.device) < asked_lengths[:, None]
    received = _Received(len(backbone.prefix_ids), ids.shape[1], visible, follows)
    backbone.read(asked, cache, lengths=asked_lengths, context=ForwardContext(observer=received))
    return torch.stack(received.layers)


def scorer_loss(scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """How far scores are from the logarithm of the labels, each row of labels scaled to mean 0 and deviation 1.

    Only the order within a row decides what is kept, so nothing is lost by scaling, and rows weigh the same.

    Args:
        scores: `(num_layers, documents, num_kv_heads or 1, n_tokens)`.
        labels: `(num_layers, documents, num_kv_heads, n_tokens)`, from `received_attention`.
        lengths: `(documents,)`.

    Returns:
        Mean squared error, a scalar.
    """
    real = torch.arange(labels.shape[-1], device=labels.device) < lengths.to(labels.device)[:, None]
    real = real[None, :, None].expand_as(labels)
    n = real.sum(-1, keepdim=True)
    logs = (labels + FLOOR).log() * real
    mean = logs.sum(-1, keepdim=True) / n
    spread = (((logs - mean) * real).square().sum(-1, keepdim=True) / n).sqrt() + 1e-3
    target = (logs - mean) / spread
    if scores.shape[2] == 1:  # one score for all: the mean over layers and heads is what it can be
        target, real, scores = target.mean((0, 2), keepdim=True), real[:1, :, :1], scores[:1]
    return ((scores - target).square() * real).sum() / real.sum()
