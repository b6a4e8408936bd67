"""Kept entries of a window: extracted from the cache it was prefilled into, and joined with those of other windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kv_memory.compress.matching import Match
from kv_memory.compress.prefill import check_finite
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

__all__ = ["Kept", "extract", "join"]


class Kept(NamedTuple):
    """Kept entries of a window, in either form of `DistilledCache`."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor | None
    bias: torch.Tensor | None = None


def extract(
    backbone: Backbone,
    cache: PositionedCache,
    selected: torch.Tensor,
    *,
    row: int = 0,
    offset: int = 0,
    match: Match | None = None,
) -> Kept:
    """Extract the selected entries, with the rotary embedding removed from their keys.

    Args:
        backbone: Model that prefilled them.
        cache: Cache of prefix and window, as prefilled.
        selected: Mask of the selected entries, bool `(num_layers or 1, num_kv_heads or 1, n_tokens)`.
        row: Row in the cache's batch.
        offset: Offset of the window inside the document, in tokens.
        match: Fitted keys, values and biases that replace the selected entries; None for no fit.
    """
    n_prefix, n_tokens = len(backbone.prefix_ids), selected.shape[-1]
    mask = selected.expand(backbone.num_layers, backbone.num_kv_heads, -1)
    counts = mask.sum(-1)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for index in range(backbone.num_layers):
        for kept, tensor in zip((keys, values), cache.layer(index), strict=True):
            kept.append(tensor[row, :, n_prefix : n_prefix + n_tokens][mask[index]])  # head by head
    check_finite(backbone, *keys, *values)
    flat_keys, flat_values, bias = torch.cat(keys), torch.cat(values), None
    if match is not None:
        flat_keys, flat_values, bias = match.keys, match.values.to(flat_values.dtype), match.bias.to(torch.float16)
    inside = torch.arange(n_tokens, device=mask.device).expand_as(mask)[mask]
    per_layer = counts.sum(1).tolist()
    free = backbone.rope.unrotate_flat(flat_keys, inside + n_prefix, per_layer, n_positions=cache.n_positions)
    free = free.to(backbone.dtype)
    positions = (inside + offset).to(torch.int32)
    if int(counts.min()) != int(counts.max()):
        return Kept(free, flat_values, positions, counts, bias)
    shape = (backbone.num_layers, backbone.num_kv_heads, int(counts[0, 0]))
    shared = selected.shape[0] == selected.shape[1] == 1
    rows = positions.view(shape)[0, 0] if shared else positions.view(shape)
    bias = None if bias is None else bias.view(shape)
    return Kept(free.view(*shape, -1), flat_values.view(*shape, -1), rows, None, bias)


def join(parts: Sequence[Kept]) -> Kept:
    """Join windows one behind the other, in every head."""
    if len(parts) == 1:
        return parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        parts = [part if part.bias is not None else _unbiased(part) for part in parts]
        sizes = [_counts(part).flatten().tolist() for part in parts]
        of_heads = [part.bias.flatten().split(n) for part, n in zip(parts, sizes, strict=True) if part.bias is not None]
        bias = torch.cat([piece for of_head in zip(*of_heads, strict=True) for piece in of_head])
    if all(part.counts is None for part in parts):
        rows = [part.positions for part in parts]
        if any(row.ndim == 3 for row in rows):  # a window kept in full has one row of positions for all heads
            rows = [row.expand(*parts[0].keys.shape[:2], -1) for row in rows]
        keys, values = torch.cat([part.keys for part in parts], 2), torch.cat([part.values for part in parts], 2)
        return Kept(keys, values, torch.cat(rows, -1), None, None if bias is None else bias.view(keys.shape[:-1]))
    split = [_by_head(part) for part in parts]
    heads = [[torch.cat(pieces) for pieces in zip(*of_head, strict=True)] for of_head in zip(*split, strict=True)]
    flat = [torch.cat(column) for column in zip(*heads, strict=True)]
    counts = torch.stack([_counts(part) for part in parts]).sum(0)
    return Kept(flat[0], flat[1], flat[2], counts, bias)


def _unbiased(part: Kept) -> Kept:
    return part._replace(bias=part.keys.new_zeros(part.keys.shape[:-1], dtype=torch.float16))


def _counts(part: Kept) -> torch.Tensor:
    if part.counts is not None:
        return part.counts
    return torch.full(part.keys.shape[:2], part.keys.shape[2], device=part.keys.device)


def _by_head(part: Kept) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys, values and positions of each head, layer by layer."""
    sizes = _counts(part).flatten().tolist()
    if part.counts is not None:
        keys, values, positions = part.keys, part.values, part.positions
    else:
        keys, values = part.keys.flatten(0, 2), part.values.flatten(0, 2)
        positions = part.positions.expand(part.keys.shape[:3]).flatten()
    return list(zip(keys.split(sizes), values.split(sizes), positions.split(sizes), strict=True))
