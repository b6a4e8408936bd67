"""Compose: put distilled caches on positions, one behind the other, behind the shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import Layout, check_choice
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER, PositionedCache

__all__ = ["check_compatible", "compose", "span_of"]


def span_of(cache: DistilledCache, layout: Layout) -> int:
    """How many positions a document takes: its original length (`source`), or its kept entries (`packed`)."""
    return cache.n_tokens if layout == "source" else cache.span


def check_compatible(backbone: Backbone, cache: DistilledCache) -> None:
    """Raise unless the model can decode from this cache.

    How the cache was distilled does not matter for that, so caches of several methods, adapters and dtypes may be
    composed; model, tokenizer, prompt and positions must be the same.

    Raises:
        FingerprintMismatchError: Names the differing fields.
    """
    made = cache.fingerprint
    mine = backbone.fingerprint(
        method=made.method,
        adapter=made.adapter,
        eta=made.eta,
        keep_spans=made.keep_spans,
        format_version=made.format_version,
    )
    made.check(replace(mine, dtype=made.dtype))


@torch.no_grad()
def compose(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    *,
    layout: Layout = "source",
    n_question: int = 0,
    n_new: int = 0,
    batch_size: int = 1,
) -> PositionedCache:
    """Build the cache a question is answered from. The stored caches are copied, never changed.

    Args:
        backbone: The model that will decode.
        caches: Distilled caches, in the order they shall be read; none at all is fine.
        layout: `source`: each document keeps the span of its original length, as in the paper. `packed`: kept
            entries stand side by side, so that more documents fit the context window.
        n_question: Tokens of the longest question.
        n_new: Tokens that will be decoded.
        batch_size: Questions answered side by side.

    Returns:
        Prefix and documents on their positions, with room for question and answer.

    Raises:
        ContextWindowError: The model cannot address that many positions. Raised before any work.
        FingerprintMismatchError: A cache belongs to another model or prompt.
    """
    check_choice(layout, Layout, where="layout")
    n_prefix = len(backbone.prefix_ids)
    start = n_prefix + sum(span_of(cache, layout) for cache in caches)
    backbone.check_positions(
        start + n_question + n_new,
        what=f"a prefix of {n_prefix:,}, {len(caches)} documents over {start - n_prefix:,} positions ({layout}), "
        f"a question of {n_question:,} and an answer of up to {n_new:,} tokens",
    )
    for cache in caches:
        check_compatible(backbone, cache)

    n_positions = start + n_question
    if any(cache.counts is not None for cache in caches):
        return _compose_ragged(
            backbone, caches, layout, start=start, n_positions=n_positions, room=n_question + n_new, rows=batch_size
        )
    n_entries = n_prefix + sum(cache.n_kept for cache in caches)
    shape = (
        backbone.num_layers,
        batch_size,
        backbone.num_kv_heads,
        n_entries + n_question + n_new,
        backbone.head_dim,
    )
    keys = torch.empty(shape, dtype=backbone.dtype, device=backbone.device)
    values = torch.empty_like(keys)
    prefix = backbone.prefix_for(n_positions)
    keys[:, 0, :, :n_prefix], values[:, 0, :, :n_prefix] = prefix.keys, prefix.values

    rows = [torch.arange(n_prefix, dtype=torch.int32)]
    entry, position = n_prefix, n_prefix
    for cache in caches:
        inside = cache.positions if layout == "source" else torch.arange(cache.n_kept)
        here = inside.to(torch.int32) + position
        entries = slice(entry, entry + cache.n_kept)
        backbone.rope.put_on(
            cache.keys.to(backbone.device),
            here.to(backbone.device),
            n_positions=n_positions,
            out=keys[:, 0, :, entries],
        )
        values[:, 0, :, entries] = cache.values.to(backbone.device)
        rows.append(here)
        entry += cache.n_kept
        position += span_of(cache, layout)
    if batch_size > 1:
        for tensor in (keys, values):
            tensor[:, 1:, :, :n_entries] = tensor[:, :1, :, :n_entries]

    bias = None
    if any(cache.bias is not None for cache in caches):  # zeros for the prefix and for what is appended
        bias = keys.new_zeros(backbone.num_layers, 1, *keys.shape[2:4])
        entry = n_prefix
        for cache in caches:
            if cache.bias is not None:
                bias[:, 0, :, entry : entry + cache.n_kept] = cache.bias.to(bias)
            entry += cache.n_kept
    if any(row.ndim == 3 for row in rows):
        rows = [row.cpu().expand(backbone.num_layers, backbone.num_kv_heads, -1) for row in rows]
    positions = torch.cat([row.cpu() for row in rows], dim=-1).to(backbone.device)
    return PositionedCache(keys, values, positions=positions, next_position=start, n_positions=n_positions, bias=bias)


def _compose_ragged(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    layout: Layout,
    *,
    start: int,
    n_positions: int,
    room: int,
    rows: int,
) -> PositionedCache:
    """Caches whose heads hold different numbers of entries: each layer as long as its fullest head.

    The others are padded in front, where attention begins behind it. It is neither written nor read: on a CPU it takes
    addresses, no memory.
    """
    n_heads, n_prefix = backbone.num_kv_heads, len(backbone.prefix_ids)
    counts = [_counts(backbone, cache) for cache in caches]
    total = n_prefix + torch.stack(counts).sum(0)  # (num_layers, num_kv_heads)
    longest = total.amax(1)
    starts: list[list[int]] = (longest[:, None] - total).tolist()
    prefix = backbone.prefix_for(n_positions)
    like = prefix.keys
    keys = [like.new_empty(rows, n_heads, length + room, like.shape[-1]) for length in longest.tolist()]
    values = [torch.empty_like(buffer) for buffer in keys]
    biased = any(cache.bias is not None for cache in caches)
    bias = [like.new_zeros(1, *buffer.shape[1:3]) for buffer in keys] if biased else None
    positions = [torch.full((1, n_heads, length), NEVER, dtype=torch.int32) for length in longest.tolist()]
    before = torch.arange(n_prefix, dtype=torch.int32)
    for layer, heads in enumerate(starts):
        for head, first in enumerate(heads):
            entries = slice(first, first + n_prefix)
            keys[layer][:, head, entries] = prefix.keys[layer, head]
            values[layer][:, head, entries] = prefix.values[layer, head]
            positions[layer][0, head, entries] = before

    filled = [[first + n_prefix for first in heads] for heads in starts]
    offset = n_prefix
    for cache, count in zip(caches, counts, strict=True):
        flat_keys, flat_values, inside = _flat(backbone, cache)
        if layout == "packed":  # side by side, the last of each head next to what follows
            inside = torch.cat([torch.arange(cache.span - n, cache.span) for n in count.flatten().tolist()])
        where = inside.to(torch.int32) + offset
        turned = backbone.rope.put_on_flat(
            flat_keys.to(backbone.device), where.to(backbone.device), count.sum(1).tolist(), n_positions=n_positions
        )
        flat_values = flat_values.to(backbone.device)
        flat_bias = None if cache.bias is None else cache.bias.flatten().to(like)
        entry = 0
        for layer, of_layer in enumerate(count.tolist()):
            for head, n in enumerate(of_layer):
                here, there = slice(entry, entry + n), slice(filled[layer][head], filled[layer][head] + n)
                keys[layer][:, head, there] = turned[here]
                values[layer][:, head, there] = flat_values[here]
                positions[layer][0, head, there] = where[here]
                if bias is not None and flat_bias is not None:
                    bias[layer][0, head, there] = flat_bias[here]
                filled[layer][head] += n
                entry += n
        offset += span_of(cache, layout)
    return PositionedCache(
        keys,
        values,
        positions=[p.to(backbone.device) for p in positions],
        next_position=start,
        n_positions=n_positions,
        starts=starts,
        bias=bias,
    )


def _counts(backbone: Backbone, cache: DistilledCache) -> torch.Tensor:
    """Entries in each layer and head, `(num_layers, num_kv_heads)`, on the CPU."""
    if cache.counts is not None:
        return cache.counts.long().cpu()
    return torch.full((backbone.num_layers, backbone.num_kv_heads), cache.n_kept)


def _flat(backbone: Backbone, cache: DistilledCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and positions one behind the other, layer by layer and head by head; positions on the CPU."""
    if cache.counts is not None:
        return cache.keys.to(backbone.dtype), cache.values.to(backbone.dtype), cache.positions.cpu()
    inside = cache.positions.cpu().expand(backbone.num_layers, backbone.num_kv_heads, -1).flatten()
    return cache.keys.to(backbone.dtype).flatten(0, 2), cache.values.to(backbone.dtype).flatten(0, 2), inside
