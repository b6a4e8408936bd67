"""Compose: join distilled caches after the shared prefix, each at its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import Layout, check_choice
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER, PositionedCache

_ANY = ("method", "adapter", "eta", "keep_spans", "format_version", "dtype")  # may differ between caches


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
    """Build the cache a question is answered from; the distilled caches are copied, never changed.

    Args:
        backbone: The model that decodes.
        caches: Distilled caches, in the order of their positions; may be empty.
        layout: `source` gives each document the span of its original length, as in the paper. `packed` places kept
            entries side by side, so that more documents fit the context window.
        n_question: Length of the longest question, in tokens.
        n_new: Largest number of tokens to decode.
        batch_size: Number of questions answered side by side.

    Returns:
        Prefix and documents at their positions, with room for question and answer.

    Raises:
        ContextWindowError: The model cannot address this many positions. Raised before any work.
        FingerprintMismatchError: A cache belongs to another model or prompt.
    """
    check_choice(layout, Layout, where="layout")
    n_prefix = len(backbone.prefix_ids)
    spans = [cache.n_tokens if layout == "source" else cache.span for cache in caches]  # positions of each document
    start = n_prefix + sum(spans)
    backbone.check_positions(
        start + n_question + n_new,
        what=f"a prefix of {n_prefix:,}, {len(caches)} documents over {start - n_prefix:,} positions ({layout}), "
        f"a question of {n_question:,} and an answer of up to {n_new:,} tokens",
    )
    mine = backbone.fingerprint(method="")
    for cache in caches:
        # Model, tokenizer, prompt and positions must match. The way the cache was compressed does not matter, so caches
        # of several methods, adapters and dtypes may be composed.
        made = cache.fingerprint
        made.check(replace(mine, **{name: getattr(made, name) for name in _ANY}))

    n_positions = start + n_question
    if any(cache.counts is not None for cache in caches):
        return _compose_ragged(
            backbone, caches, layout, spans, n_positions=n_positions, room=n_question + n_new, rows=batch_size
        )
    n_entries = n_prefix + sum(cache.n_kept for cache in caches)
    shape = (backbone.num_layers, batch_size, backbone.num_kv_heads, n_entries + n_question + n_new, backbone.head_dim)
    keys = torch.empty(shape, dtype=backbone.dtype, device=backbone.device)
    values = torch.empty_like(keys)
    prefix = backbone.prefix_for(n_positions)
    keys[:, 0, :, :n_prefix], values[:, 0, :, :n_prefix] = prefix.keys, prefix.values

    bias = None
    if any(cache.bias is not None for cache in caches):  # 0 for the prefix, the question and the answer
        bias = keys.new_zeros(backbone.num_layers, 1, *keys.shape[2:4])

    rows = [torch.arange(n_prefix, dtype=torch.int32)]
    entry, position = n_prefix, n_prefix
    for cache, span in zip(caches, spans, strict=True):
        inside = cache.positions if layout == "source" else torch.arange(cache.n_kept)
        here = inside.to(torch.int32) + position  # (n_kept,) or (num_layers, num_kv_heads, n_kept)
        entries = slice(entry, entry + cache.n_kept)
        backbone.rope.rotate(
            cache.keys.to(backbone.device),
            here.to(backbone.device),
            n_positions=n_positions,
            out=keys[:, 0, :, entries],
        )
        values[:, 0, :, entries] = cache.values.to(backbone.device)
        if bias is not None and cache.bias is not None:
            bias[:, 0, :, entries] = cache.bias.to(bias)
        rows.append(here)
        entry += cache.n_kept
        position += span
    if batch_size > 1:
        for tensor in (keys, values):
            tensor[:, 1:, :, :n_entries] = tensor[:, :1, :, :n_entries]

    if any(row.ndim == 3 for row in rows):
        rows = [row.cpu().expand(backbone.num_layers, backbone.num_kv_heads, -1) for row in rows]
    positions = torch.cat([row.cpu() for row in rows], dim=-1).to(backbone.device)
    return PositionedCache(keys, values, positions=positions, next_position=start, n_positions=n_positions, bias=bias)


def _compose_ragged(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    layout: Layout,
    spans: Sequence[int],
    *,
    n_positions: int,
    room: int,
    rows: int,
) -> PositionedCache:
    """`compose` for caches whose heads hold different numbers of entries: each layer is as long as its fullest head.

    Shorter heads are padded in front, and attention starts after the padding. Padding is neither written nor loaded:
    on a CPU it uses addresses, no memory.
    """
    # 1. Lengths: a layer is as long as its fullest head; `starts` is the amount of padding in front of each head.
    n_heads, n_prefix = backbone.num_kv_heads, len(backbone.prefix_ids)
    counts = [cache.head_counts for cache in caches]  # (num_layers, num_kv_heads) each
    total = n_prefix + torch.stack(counts).sum(0)  # (num_layers, num_kv_heads)
    longest = total.amax(1)  # (num_layers,)
    starts: list[list[int]] = (longest[:, None] - total).tolist()

    # 2. Buffers for each layer. Keys, values and biases have room for question and answer; positions follow later.
    #    Padding keeps this initial state: keys and values uninitialised, biases 0, positions `NEVER`.
    prefix = backbone.prefix_for(n_positions)
    like = prefix.keys  # (num_layers, num_kv_heads, n_prefix, head_dim)
    # keys, values: (rows, num_kv_heads, length + room, head_dim)
    keys = [like.new_empty(rows, n_heads, length + room, like.shape[-1]) for length in longest.tolist()]
    values = [torch.empty_like(buffer) for buffer in keys]
    biased = any(cache.bias is not None for cache in caches)
    # bias: (1, num_kv_heads, length + room); positions: (1, num_kv_heads, length)
    bias = [like.new_zeros(1, *buffer.shape[1:3]) for buffer in keys] if biased else None
    positions = [torch.full((1, n_heads, length), NEVER, dtype=torch.int32) for length in longest.tolist()]

    # 3. The prefix follows the padding of each head; its keys carry their rotary embedding already.
    before = torch.arange(n_prefix, dtype=torch.int32)  # (n_prefix,)
    for layer, heads in enumerate(starts):
        for head, first in enumerate(heads):
            entries = slice(first, first + n_prefix)
            keys[layer][:, head, entries] = prefix.keys[layer, head]
            values[layer][:, head, entries] = prefix.values[layer, head]
            positions[layer][0, head, entries] = before

    # 4. The documents, one after the other: `filled` is the next free index of each head, `offset` the position where
    #    the document begins.
    filled = [[first + n_prefix for first in heads] for heads in starts]
    offset = n_prefix
    for cache, count, span in zip(caches, counts, spans, strict=True):
        flat_keys, flat_values = (part.to(like).flatten(0, -2) for part in (cache.keys, cache.values))
        # 4a. Positions of the entries, and rotary embedding for all heads in one call.
        inside = cache.flat_positions.cpu()  # (n_entries,); keys and values are (n_entries, head_dim)
        if layout == "packed":  # side by side in each head, so that its last entry is next to the following document
            inside = torch.cat([torch.arange(cache.span - n, cache.span) for n in count.flatten().tolist()])
        where = inside.to(torch.int32) + offset  # (n_entries,)
        turned = backbone.rope.rotate_flat(
            flat_keys, where.to(backbone.device), count.sum(1).tolist(), n_positions=n_positions
        )
        # 4b. Copy the entries of each head into all rows of the batch; `entry` is the index of its first flat entry.
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
        offset += span
    return PositionedCache(
        keys,
        values,
        positions=[p.to(backbone.device) for p in positions],
        next_position=offset,
        n_positions=n_positions,
        starts=starts,
        bias=bias,
    )
