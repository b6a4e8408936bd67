"""The entries of a window that are kept: selected by their scores (top-k), extracted as a cache, and joined."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

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


def extract(
    backbone: Backbone,
    cache: PositionedCache,
    selected: torch.Tensor,
    *,
    n_tokens: int,
    keep_ratio: float,
    fingerprint: Fingerprint,
    row: int = 0,
    fitted: FittedHeads | None = None,
) -> DistilledCache:
    """Extract the entries of the window in one row of a cache, with the rotary embedding removed from their keys.

    `selected` is their mask, bool `(num_layers or 1, num_kv_heads or 1, n)`; `fitted` replaces them. Entries from
    `n_tokens` on, those of restore tokens, have the position of the last token.
    """
    n_prefix, n = len(backbone.prefix_ids), selected.shape[-1]
    mask = selected.expand(backbone.num_layers, backbone.num_kv_heads, -1)
    layers = [cache.layer(index) for index in range(backbone.num_layers)]
    keys, values = (
        torch.cat([layer[part][row, :, n_prefix : n_prefix + n][own] for layer, own in zip(layers, mask, strict=True)])
        for part in (0, 1)
    )  # (n_entries, head_dim) each, head by head
    check_finite(backbone, keys, values)
    bias = None
    if fitted is not None:
        keys, values, bias = fitted.keys, fitted.values.to(values.dtype), fitted.bias.to(torch.float16)
    counts = mask.sum(-1)  # (num_layers, num_kv_heads)
    inside = torch.arange(n, device=mask.device).clamp(max=n_tokens - 1).expand_as(mask)[mask]  # (n_entries,)
    free = backbone.rope.rotate_flat(
        keys, inside + n_prefix, counts.sum(1).tolist(), n_positions=cache.n_positions, inverse=True
    ).to(backbone.dtype)
    flat = DistilledCache(free, values, inside.to(torch.int32), n_tokens, keep_ratio, fingerprint, counts, bias)
    return _dense(flat, shared=selected.shape[:2] == (1, 1))


def join(parts: Sequence[DistilledCache]) -> DistilledCache:
    """Join the caches of consecutive windows of one document: their entries one behind the other in every head."""
    counts = [part.head_counts for part in parts]
    starts = itertools.accumulate((part.n_tokens for part in parts), initial=0)

    def joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        of_parts = [tensor.split(own.flatten().tolist()) for tensor, own in zip(tensors, counts, strict=True)]
        return torch.cat([piece for of_head in zip(*of_parts, strict=True) for piece in of_head])

    bias = None
    if any(part.bias is not None for part in parts):  # a window kept in full has none
        none = [part.keys.new_zeros(part.keys.shape[:-1], dtype=torch.float16) for part in parts]
        bias = joined((one if p.bias is None else p.bias).flatten() for p, one in zip(parts, none, strict=True))
    flat = replace(
        parts[0],
        keys=joined(part.keys.flatten(0, -2) for part in parts),
        values=joined(part.values.flatten(0, -2) for part in parts),
        positions=joined(part.flat_positions + start for part, start in zip(parts, starts, strict=False)),
        n_tokens=sum(part.n_tokens for part in parts),
        counts=torch.stack(counts).sum(0).to(parts[0].keys.device),
        bias=bias,
    )
    return _dense(flat, shared=not any(part.per_head for part in parts))


def _dense(flat: DistilledCache, *, shared: bool) -> DistilledCache:
    """The dense form if all heads keep equally many entries; `shared` if all layers and heads keep the same tokens."""
    counts = flat.head_counts
    if int(counts.min()) != int(counts.max()):
        return flat
    shape = (*counts.shape, int(counts[0, 0]))
    positions = flat.positions.view(shape)
    return replace(
        flat,
        keys=flat.keys.view(*shape, -1),
        values=flat.values.view(*shape, -1),
        positions=positions[0, 0] if shared else positions,
        counts=None,
        bias=None if flat.bias is None else flat.bias.view(shape),
    )
