"""Compose: join distilled caches after the shared prefix, each at its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import Layout, check_choice
from kv_memory.model.backbone import Backbone
from kv_memory.model.hot import Composed
from kv_memory.model.kv_cache import NEVER, PositionedCache

_ANY = ("method", "adapter", "eta", "keep_spans", "format_version", "dtype")  # may differ between caches
_ROOM_STEP = 128  # entries; the room in hot caches is a multiple of it


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

    n_positions, room = start + n_question, n_question + n_new
    hot = backbone.hot
    # Only caches from a store come back as the same objects, by which what is kept is found.
    if not hot.limit_bytes or batch_size > 1 or not caches or not all(cache.text_sha256 for cache in caches):
        return _assemble(backbone, caches, spans, layout, n_positions, room).cache(n_positions, batch_size=batch_size)
    key = (*caches, layout, backbone.rope.regime(n_positions))
    if (lent := hot.lend(key, room, n_positions)) is not None:
        return lent
    room = -(-room // _ROOM_STEP) * _ROOM_STEP  # a longer question or answer may follow
    composed = _assemble(backbone, caches, spans, layout, n_positions, room)
    return hot.keep(key, composed, n_positions, size_bytes=sum(cache.size_bytes for cache in caches))


def _assemble(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    spans: Sequence[int],
    layout: Layout,
    n_positions: int,
    room: int,
) -> Composed:
    """The buffers of a composed cache; `spans` are the positions that the documents take.

    Heads that hold fewer entries than the fullest one of their layer are padded in front, and attention starts after
    the padding. Padding is neither written nor loaded: on a CPU it uses addresses, no memory.
    """
    # 1. Lengths of the parts of each head, in their order: padding, the prefix, the documents, and the room.
    prefix = backbone.prefix_for(n_positions)
    like = prefix.keys  # (num_layers, num_kv_heads, n_prefix, head_dim)
    n_layers, n_heads, n_prefix, head_dim = like.shape
    counts = [cache.head_counts for cache in caches]  # (num_layers, num_kv_heads) each
    total = torch.stack([torch.full((n_layers, n_heads), n_prefix), *counts]).sum(0)
    starts = total.amax(1, keepdim=True) - total  # amount of padding in front of each head
    filled = torch.stack([starts, torch.full_like(starts, n_prefix), *counts], dim=-1)
    lengths = nn.functional.pad(filled, (0, 1), value=room)  # (num_layers, num_kv_heads, parts)

    # 2. One buffer for all layers and heads, and views of the places of each part. Padding keeps this initial state:
    #    keys and values uninitialised, biases 0, positions `NEVER`.
    keys = like.new_empty(int(lengths.sum()), head_dim)
    values = torch.empty_like(keys)
    bias = like.new_zeros(len(keys)) if any(cache.bias is not None for cache in caches) else None
    positions = torch.full((int(filled.sum()),), NEVER, dtype=torch.int32)  # no room: those of new tokens follow later
    key_places, value_places = _places(keys, lengths), _places(values, lengths)
    position_places = _places(positions, filled)
    bias_places = None if bias is None else _places(bias, lengths)

    # 3. The prefix follows the padding of each head; its keys carry their rotary embedding already.
    # One call for all heads here and below: as slices, one after the other, these copies took eight times as long.
    torch._foreach_copy_(key_places[1], prefix.keys.flatten(0, 1).unbind())
    torch._foreach_copy_(value_places[1], prefix.values.flatten(0, 1).unbind())
    torch._foreach_copy_(position_places[1], [torch.arange(n_prefix, dtype=torch.int32)] * (n_layers * n_heads))

    # 4. The documents, one after the other; `offset` is the position where the document begins.
    offset = n_prefix
    for part, (cache, count, span) in enumerate(zip(caches, counts, spans, strict=True), start=2):
        of_heads, sizes = count.flatten(), count.flatten().tolist()
        inside = cache.flat_positions.cpu()  # (n_entries,); keys and values are (n_entries, head_dim)
        if layout == "packed":  # side by side in each head, so that its last entry is next to the following document
            inside = torch.arange(len(inside)) + (span - of_heads.cumsum(0)).repeat_interleave(of_heads)
        where = inside.to(torch.int32) + offset  # (n_entries,)
        flat_keys, flat_values = (of.to(like.device).flatten(0, -2) for of in (cache.keys, cache.values))
        turned = backbone.rope.rotate_flat(
            flat_keys, where.to(like.device), count.sum(1).tolist(), n_positions=n_positions, dtype=like.dtype
        )
        torch._foreach_copy_(key_places[part], turned.split(sizes))
        torch._foreach_copy_(value_places[part], flat_values.split(sizes))
        torch._foreach_copy_(position_places[part], where.split(sizes))
        if bias_places is not None and cache.bias is not None:
            torch._foreach_copy_(bias_places[part], cache.bias.to(like.device).flatten().split(sizes))
        offset += span

    # 5. Positions by layer. Heads with equal numbers of entries need no padding, and if their positions are equal too,
    #    one row serves all.
    by_layer = [row.to(like.device) for row in _layers(positions, filled)]
    rows: torch.Tensor | list[torch.Tensor] = by_layer
    ragged = any(cache.counts is not None for cache in caches)
    if not ragged:
        per_head = layout == "source" and any(cache.per_head for cache in caches)
        rows = torch.cat(by_layer) if per_head else by_layer[0][0, 0]
    return Composed(
        keys=_layers(keys, lengths),
        values=_layers(values, lengths),
        positions=rows,
        next_position=offset,
        room=room,
        starts=starts.tolist() if ragged else None,
        bias=None if bias is None else _layers(bias, lengths),
    )


def _places(flat: torch.Tensor, lengths: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """By part, views of all heads; `lengths` are `(num_layers, num_kv_heads, parts)`, in the order of `flat`."""
    views, n_parts = flat.split(lengths.flatten().tolist()), lengths.shape[-1]
    return [views[part::n_parts] for part in range(n_parts)]


def _layers(flat: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """The layers of a buffer, `(1, num_kv_heads, length, ...)` each."""
    sizes = lengths.sum((1, 2)).tolist()
    return [layer.view(1, lengths.shape[1], -1, *flat.shape[1:]) for layer in flat.split(sizes)]
