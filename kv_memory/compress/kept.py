"""The entries of a window that are kept: selected by their scores (top-k), extracted from the cache, and joined."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.config import Budget
from kv_memory.errors import ModelError
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

if TYPE_CHECKING:
    from kv_memory.compress.fitting import FittedHeads  # made by a module that selects with `top_k_mask`


def pad(rows: Sequence[Sequence[int]], *, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids of several texts on the right with 0: `(batch, longest)`; also return their lengths `(batch,)`."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device), lengths


def check_finite(backbone: Backbone, *tensors: torch.Tensor) -> None:
    """Raise `ModelError` unless all of these tensors (keys, values or scores of a document) are finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ModelError(
            "the model's keys, values or scores of this document are not finite",
            where=backbone.name,
            next_step="Load the model in float32 or bfloat16 (dtype), and check its weights.",
        )


def top_k_mask(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    n_kept: torch.Tensor,
    *,
    budget: Budget,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select the entries with the highest scores (top-k); of equal scores the first wins, so the result never varies.

    Args:
        scores: Scores `(num_layers, batch, num_kv_heads, n_tokens)`, or with 1 in place of layers and heads.
        lengths: `(batch,)`, real tokens of each document.
        n_kept: `(batch,)`, number of entries to keep, in every head or on average over all of them.
        budget: Distribution of entries among the heads, see `Budget`.
        forced: Bool `(batch, n_tokens)`; tokens that are kept whatever their score.

    Returns:
        Mask of the kept entries, bool, in the shape of `scores`.
    """
    # 1. Rank forced tokens first and padding last.
    n_tokens, device = scores.shape[-1], scores.device
    real = torch.arange(n_tokens, device=device) < lengths.to(device)[:, None]  # (batch, n_tokens)
    ranked = scores.detach().masked_fill(~real[None, :, None], -torch.inf)  # the shape of scores
    if forced is not None:
        ranked = ranked.masked_fill(forced.to(device)[None, :, None], torch.inf)
    # 2. With the budget `model`, all heads of a document compete in one ranking, for the total of all heads.
    most = n_kept.to(device)  # (batch,)
    if budget == "model":
        layers, batch, heads = scores.shape[:3]
        ranked = ranked.transpose(0, 1).reshape(1, batch, 1, -1)  # (1, batch, 1, layers * heads * n_tokens)
        most = most * layers * heads
    # 3. Top-k, by a stable sort: k differs between documents, and `torch.topk` leaves the order of equal scores open.
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(ranked.shape[-1], device=device) < most[:, None, None]  # (batch, 1, n_ranked)
    mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
    # 4. Back to the shape of scores.
    if budget == "model":
        mask = mask.reshape(batch, layers, heads, n_tokens).transpose(0, 1)
    return mask


class Kept(NamedTuple):
    """Kept entries of a stretch of a document, layer by layer and head by head.

    Attributes:
        keys: `(n_entries, head_dim)`, without rotary embedding.
        values: `(n_entries, head_dim)`.
        positions: `(n_entries,)`, int32, positions inside the stretch.
        counts: `(num_layers, num_kv_heads)`, number of entries of each head.
        shared: True if all layers and heads keep the same tokens.
        bias: `(n_entries,)`, float16; None for no bias.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    shared: bool
    bias: torch.Tensor | None = None

    def to_cache(self, *, n_tokens: int, keep_ratio: float, fingerprint: Fingerprint) -> DistilledCache:
        """Build the cache of a document of `n_tokens`; it is dense if all heads keep the same number of entries."""
        make = partial(DistilledCache, n_tokens=n_tokens, keep_ratio=keep_ratio, fingerprint=fingerprint)
        if int(self.counts.min()) != int(self.counts.max()):
            return make(self.keys, self.values, self.positions, counts=self.counts, bias=self.bias)
        shape = (*self.counts.shape, int(self.counts[0, 0]))
        positions = self.positions.view(shape)
        return make(
            self.keys.view(*shape, -1),
            self.values.view(*shape, -1),
            positions[0, 0] if self.shared else positions,
            bias=None if self.bias is None else self.bias.view(shape),
        )

    def with_entries_of(self, cache: DistilledCache) -> Kept:
        """Replace keys, values and biases by those of a cache with the same entries."""
        bias = None if cache.bias is None else cache.bias.flatten()
        return self._replace(keys=cache.keys.flatten(0, -2), values=cache.values.flatten(0, -2), bias=bias)


def extract(
    backbone: Backbone,
    cache: PositionedCache,
    selected: torch.Tensor,
    *,
    row: int = 0,
    fitted: FittedHeads | None = None,
) -> Kept:
    """Extract the selected entries, with the rotary embedding removed from their keys.

    Args:
        backbone: Model that prefilled them.
        cache: Cache of prefix and window, as prefilled.
        selected: Mask of the selected entries, bool `(num_layers or 1, num_kv_heads or 1, n_tokens)`.
        row: Row in the cache's batch.
        fitted: Fitted entries that replace the selected ones; None for no fit.
    """
    n_prefix, n_tokens = len(backbone.prefix_ids), selected.shape[-1]
    mask = selected.expand(backbone.num_layers, backbone.num_kv_heads, -1)
    layers = [cache.layer(index) for index in range(backbone.num_layers)]
    keys, values = (
        torch.cat(
            [layer[part][row, :, n_prefix : n_prefix + n_tokens][own] for layer, own in zip(layers, mask, strict=True)]
        )
        for part in (0, 1)
    )  # (n_entries, head_dim) each, head by head
    check_finite(backbone, keys, values)
    bias = None
    if fitted is not None:
        keys, values, bias = fitted.keys, fitted.values.to(values.dtype), fitted.bias.to(torch.float16)
    counts = mask.sum(-1)  # (num_layers, num_kv_heads)
    inside = torch.arange(n_tokens, device=mask.device).expand_as(mask)[mask]  # (n_entries,)
    free = backbone.rope.rotate_flat(
        keys, inside + n_prefix, counts.sum(1).tolist(), n_positions=cache.n_positions, inverse=True
    ).to(backbone.dtype)
    return Kept(free, values, inside.to(torch.int32), counts, selected.shape[:2] == (1, 1), bias)


def join(parts: Sequence[Kept], starts: Sequence[int]) -> Kept:
    """Join stretches of one document, which begin at `starts`, one behind the other in every head."""
    sizes = [part.counts.flatten().tolist() for part in parts]

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        of_parts = [tensor.split(own) for tensor, own in zip(tensors, sizes, strict=True)]
        return torch.cat([piece for of_head in zip(*of_parts, strict=True) for piece in of_head])

    bias = None
    if any(part.bias is not None for part in parts):  # a window kept in full has none
        none = [part.keys.new_zeros(len(part.keys), dtype=torch.float16) for part in parts]
        bias = joined([own if part.bias is None else part.bias for part, own in zip(parts, none, strict=True)])
    return Kept(
        keys=joined([part.keys for part in parts]),
        values=joined([part.values for part in parts]),
        positions=joined([part.positions + start for part, start in zip(parts, starts, strict=True)]),
        counts=torch.stack([part.counts for part in parts]).sum(0),
        shared=all(part.shared for part in parts),
        bias=bias,
    )
