"""Stage (a): the scorer learns the attention that each token receives from the text after the document.

The labels are the highest attention that a token receives, in each layer and KV head, while the model repeats the
document (the reconstruction selector's scores, KVzip) and while it prefills questions and their answers. They are
dense, whereas the gradient of distillation covers only kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_memory.compress.prefill import pad
from kv_memory.compress.refine.batching import Entries
from kv_memory.compress.scorer import attention_scores
from kv_memory.config import Budget
from kv_memory.model.attention import AttentionKind, ForwardContext, attention_probabilities
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER

__all__ = ["LabelRows", "received_attention", "repetition", "scorer_loss"]

REQUEST = "\n\nRepeat the previous text exactly.\n"


@dataclass(frozen=True)
class LabelRows:
    """Rows of tokens that follow documents.

    Attributes:
        ids: `(rows, n)`, token ids, padded on the right.
        lengths: `(rows,)`, length of each row in tokens.
        documents: `(rows,)`, index of the document that each row follows.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    documents: torch.Tensor


class _Received:
    """An `AttentionObserver` that records the highest attention of each document's tokens from the rows after it."""

    def __init__(self, received: torch.Tensor, *, n_prefix: int, visible: torch.Tensor, asked: LabelRows) -> None:
        self._received = received
        self._n_prefix = n_prefix
        self._visible = visible
        self._asked = asked

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> None:
        """See `AttentionObserver`; sliding windows are ignored, so tokens outside a window count as visible."""
        # 1. Attention weights under a causal mask, without the padding of shorter documents.
        new, length = query.shape[2], key.shape[2]
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)  # (new, length)
        mask = mask & torch.nn.functional.pad(self._visible, (0, new), value=True)[:, None, None]
        weights = attention_probabilities(query, key, mask, kind)
        # 2. Maximum over the query heads of each KV head, and over the real tokens of each row.
        here = weights[..., self._n_prefix : length - new].unflatten(1, (key.shape[1], -1))
        real = torch.arange(new, device=query.device) < self._asked.lengths[:, None]  # (rows, new)
        highest = (here * real[:, None, None, :, None]).amax((2, 3))  # (rows, kv_heads, tokens)
        # 3. Maximum over the rows of each document.
        documents = self._asked.documents[:, None, None].expand_as(highest)
        self._received[layer].scatter_reduce_(0, documents, highest, "amax")


def repetition(backbone: Backbone, documents: Sequence[Sequence[int]]) -> LabelRows:
    """One row for each document: a request to repeat it, and the document."""
    request = backbone.encode(REQUEST)
    ids, lengths = pad([[*request, *document] for document in documents], device=backbone.device)
    return LabelRows(ids, lengths, torch.arange(len(documents), device=backbone.device))


@torch.no_grad()
def received_attention(backbone: Backbone, entries: Entries, askings: Sequence[LabelRows]) -> torch.Tensor:
    """The highest attention that each token of each document receives from the rows after it.

    Args:
        backbone: The model.
        entries: All entries of the documents.
        askings: Sets of rows that follow the documents; each set is prefilled separately.

    Returns:
        `(num_layers, documents, num_kv_heads, n_tokens)`, float32, in 0 to 1.
    """
    n_prefix = len(backbone.prefix_ids)
    documents, heads, n_entries, _ = entries.keys[0].shape
    received = torch.zeros(backbone.num_layers, documents, heads, n_entries - n_prefix, device=backbone.device)
    for asked in askings:
        visible = entries.positions[0][asked.documents, 0] != NEVER
        observer = _Received(received, n_prefix=n_prefix, visible=visible, asked=asked)
        cache = entries.cache(asked.documents)
        backbone.prefill(asked.ids, cache, lengths=asked.lengths, context=ForwardContext(observer=observer))
    return received


def scorer_loss(scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, *, budget: Budget) -> torch.Tensor:
    """Mean squared error of scores from the targets of `attention_scores`.

    Args:
        scores: `(num_layers, documents, num_kv_heads or 1, n_tokens)`.
        labels: `(num_layers, documents, num_kv_heads, n_tokens)`, from `received_attention`.
        lengths: `(documents,)`, length of each document in tokens.
        budget: Distribution of entries over the heads, see `Budget`.

    Returns:
        Scalar loss.
    """
    real = torch.arange(labels.shape[-1], device=labels.device) < lengths.to(labels.device)[:, None]
    real = real[None, :, None].expand_as(labels)
    target = attention_scores(labels, real, budget=budget)
    if scores.shape[2] == 1:  # one score per token: its best target is the mean over layers and heads
        target, real, scores = target.mean((0, 2), keepdim=True), real[:1, :, :1], scores[:1]
    return ((scores - target).square() * real).sum() / real.sum()
