"""One attention function for every supported model.

Hugging Face's masks derive visibility from indices in the cache. In a composed cache, index and position differ, and
in a distilled cache they differ from head to head. Masks are therefore computed here, from positions. The function is
registered under `ATTENTION` with Transformers' attention interface and selected per model. It delegates the arithmetic
to SDPA, and computes attention itself only where SDPA cannot (logit soft-capping).

`ForwardContext` is passed through the model as a keyword argument, as Transformers passes flash-attention arguments.
Recomputation under gradient checkpointing and several threads on one model thus need no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from kv_memory.model.kv_cache import PositionedCache

ATTENTION = "kv_memory"
QUERY_BLOCK = 512  # queries per SDPA call where a mask is needed
SHORT = 64  # most queries for which the query heads of a KV head are packed into one, instead of repeating its keys


class AttentionKind(NamedTuple):
    """Rule by which a layer makes attention logits.

    Attributes:
        scaling: Factor on the logits.
        softcap: Soft cap of the logits (Gemma 2); None for no cap.
        window: Sliding window, in positions; None if queries see all earlier positions.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits held softly within `cap` of 0; unchanged if it is None."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class AttentionObserver(Protocol):
    """Receives the queries and keys of each layer during prefill."""

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> None:
        """Called once per layer, before attention.

        Both are rotated: `query` `(batch, num_heads, new, head_dim)`, and `key` `(batch, num_kv_heads, seq_len,
        head_dim)`, whose last `new` belong to the queries.
        """


class Routing(Protocol):
    """Decides, layer by layer during prefill, which tokens go through the adapter."""

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Called before each decoder layer, and again if gradient checkpointing reruns the layer with its hooks.

        Its input, `hidden`, is `(batch, new, hidden_size)`. The result is bool `(batch, new)`, or float: the strength
        of the adapter for each token, 0 for not at all. `(batch, 1)` applies to all tokens of a row; None routes none.
        """


class PackedRow(NamedTuple):
    """One request in a packed forward pass: the place of its tokens in the sequence, their positions, and its context.

    The positions are `(1, n)`; the context has a cache of its own, with one row.
    """

    tokens: slice
    positions: torch.Tensor
    context: ForwardContext


@dataclass
class ForwardContext:
    """Context of one forward pass of the model, besides its tokens.

    Attributes:
        cache: Cache with the positions of the keys; None if the tokens are alone in their sequence.
        packed: The requests whose tokens follow each other in the sequence; empty for an ordinary pass.
        masks: Masks of this pass, by layer (-1 if shared by all layers) and window; filled on demand.
    """

    cache: PositionedCache | None = None
    observer: AttentionObserver | None = None
    routing: Routing | None = None
    packed: Sequence[PackedRow] = ()
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict, repr=False)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    kv_memory: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with masks computed from positions; the signature is that of Transformers' attention interface.

    `attention_mask` (Transformers builds none for an attention function without a mask function), `dropout` (0 in these
    models) and `kwargs` are ignored. `scaling` is `head_dim ** -0.5` if None; `kv_memory` is None if the model is
    called without a `PositionedCache`. Shapes: `query` `(batch, num_heads, new, head_dim)`, `key` and `value`
    `(batch, num_kv_heads, seq_len, head_dim)`, `position_ids` of the queries `(1 or batch, new)`.

    In a packed pass, keys and values are those of the new tokens alone. Each request's are appended to its own cache,
    and its queries attend to that. One call for all requests was rejected: their caches differ in length, in every
    head, so it would need padding, and copies of all keys at every token.

    Returns:
        The output, `(batch, new, num_heads, head_dim)`, and None in place of the attention weights.
    """
    context = kv_memory or ForwardContext()
    kind = AttentionKind(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    if not context.packed:
        return _attend(module, query, key, value, position_ids, context, kind), None
    outs = []
    for tokens, positions, own in context.packed:
        assert own.cache is not None
        k, v = own.cache.layers[int(module.layer_idx)].update(key[:, :, tokens], value[:, :, tokens])  # type: ignore[arg-type]
        outs.append(_attend(module, query[:, :, tokens], k, v, positions, own, kind))
    return torch.cat(outs, dim=1), None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor | None,
    context: ForwardContext,
    kind: AttentionKind,
) -> torch.Tensor:
    """Attention of one pass, or of one request of a packed pass: `(batch, new, num_heads, head_dim)`."""
    # 1. Report queries and keys to the observer.
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if context.observer is not None:
        context.observer.observe(layer, query, key, kind)

    new, length, cache = query.shape[2], key.shape[2], context.cache
    if length == 1:
        kind = kind._replace(window=None)
    # Whether entries may be padding: rows of a batch differ in length, and heads may hold different numbers of entries.
    padded = cache is not None and (cache.n_rows > 1 or cache.padded)
    starts = None if cache is None or cache.starts is None else cache.starts[layer]
    bias = None if cache is None or cache.bias is None else cache.bias[layer]
    free = kind.softcap is None and kind.window is None and not padded and starts is None and bias is None
    past = length - new
    if free and past <= new and new > 1:
        # 2. No mask is needed, only causality. SDPA aligns its causal triangle with the first key, so zero queries are
        #    put in front for the past entries, and their outputs dropped. Rejected: a mask. Without one, a long
        #    document behind a short prefix takes two thirds of the time.
        query = nn.functional.pad(query, (0, 0, past, 0))  # (batch, num_heads, seq_len, head_dim)
        out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=kind.scaling, is_causal=True)
        return out[:, past:]

    mask = _mask(
        context, layer, position_ids, new, length, kind.window
    )  # (1 or batch, 1 or num_kv_heads, new, seq_len)
    if starts is not None:
        # 3. Heads hold different numbers of entries, with the padding in front: attend head by head.
        return _attend_by_head(module, query, key, value, mask, bias, starts, kind)
    # 4. Everything else: a mask from positions, with the cache's bias added.
    return _attend_masked(module, query, key, value, _biased(mask, bias, length, dtype=query.dtype), kind)


def _attend_by_head(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    starts: Sequence[int],
    kind: AttentionKind,
) -> torch.Tensor:
    """Attention head by head, each over its own entries, for heads that hold different numbers of entries.

    The fullest head of a layer may hold three times the average. A single call for all heads, with a mask over the
    padding, was rejected: it took twice the time of caches with equal numbers in every head.
    """
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    if mask is None and query.shape[2] == 1 and kind.softcap is None and (bias is None or bias.shape[2] >= length):
        return _decode_by_head(query, key, value, bias, starts, kind)
    outs = []
    for head, start in enumerate(starts):
        own = slice(head, head + 1)
        # 1. Mask of this head: one mask may serve all heads. Counting from the end drops the padding in front, and fits
        #    a mask longer than this layer (see `_mask`): masks of all lengths agree at the end.
        part = mask
        if mask is not None:
            part = mask[:, head % mask.shape[1], None, :, start - length :]  # (1 or batch, 1, new, n_own)
        part = _biased(part, None if bias is None else bias[:, own, start:], length - start, dtype=query.dtype)
        # 2. The query heads of this KV head, over its own entries.
        queries = query[:, head * group : (head + 1) * group]  # (batch, group, new, head_dim)
        k, v = key[:, own, start:], value[:, own, start:]  # (batch, 1, n_own, head_dim)
        outs.append(_attend_masked(module, queries, k, v, part, kind))
    return torch.cat(outs, dim=2)  # (batch, new, num_heads, head_dim)


def _decode_by_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    starts: Sequence[int],
    kind: AttentionKind,
) -> torch.Tensor:
    """`_attend_by_head` for one token that sees all entries: the same, with fewer steps.

    With several requests of a few hundred entries, the steps around SDPA took longer than SDPA.
    """
    batch, heads, _, dim = query.shape
    queries = query.reshape(batch, key.shape[1], heads // key.shape[1], dim)
    bias = None if bias is None else bias[:, :, None, : key.shape[2]].to(query.dtype)
    outs = []
    for head, start in enumerate(starts):
        own = slice(head, head + 1)
        added = None if bias is None else bias[:, own, :, start:]
        out = nn.functional.scaled_dot_product_attention(
            queries[:, own], key[:, own, start:], value[:, own, start:], attn_mask=added, scale=kind.scaling
        )
        outs.append(out)
    return torch.cat(outs, dim=1).view(batch, 1, heads, dim)


def _attend_masked(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kind: AttentionKind,
) -> torch.Tensor:
    """Attention under a mask; None if every query sees all keys."""
    new, length = query.shape[2], key.shape[2]
    if kind.softcap is None and new <= SHORT:
        # A short question over a long cache: query heads that share a KV head become rows of one head. Under a mask,
        # Transformers repeats keys and values for every query head; with 600 cached entries, that copy took as long as
        # the attention itself.
        batch, heads, _, dim = query.shape
        group = heads // key.shape[1]
        packed = query.reshape(batch, key.shape[1], group * new, dim)  # (batch, num_kv_heads, group * new, head_dim)
        mask = None if mask is None else mask.repeat(1, 1, group, 1)  # (..., group * new, seq_len)
        out = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=kind.scaling)
        return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous()

    # Blocks of queries, each against the keys up to its own end. A mask over all keys at once would double the work.
    blocks = []
    for start in range(0, new, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, new))
        end = length - new + rows.stop
        part = None if mask is None else mask[:, :, rows, :end]
        if part is not None and part.shape[1] > 1:  # masks per KV head are repeated per query head
            part = part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)  # (1 or batch, num_heads, block, end)
        q, k, v = query[:, :, rows], key[:, :, :end], value[:, :, :end]  # k, v: (batch, num_kv_heads, end, head_dim)
        if kind.softcap is None:
            out, _ = sdpa_attention_forward(module, q, k, v, part, scaling=kind.scaling, is_causal=False)
        else:
            weights = attention_probabilities(q, k, part, kind).to(v.dtype)
            out = (weights @ repeat_kv(v, q.shape[1] // v.shape[1])).transpose(1, 2)
        blocks.append(out)  # (batch, block, num_heads, head_dim)
    return torch.cat(blocks, dim=1)


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kind: AttentionKind
) -> torch.Tensor:
    """Softmax of the attention logits, `(batch, num_heads, new, seq_len)` in float32, computed without SDPA.

    `query` and `key` are as in `attention_forward`. The mask is bool, True where a query sees a key, or float, added to
    the logits; None if every query sees all keys. The window of `kind` is up to the mask.
    """
    logits = (query @ repeat_kv(key, query.shape[1] // key.shape[1]).transpose(2, 3)).float() * kind.scaling
    logits = soft_capped(logits, kind.softcap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        logits = logits + mask
    return torch.softmax(logits, dim=-1)


def _biased(
    mask: torch.Tensor | None, bias: torch.Tensor | None, length: int, *, dtype: torch.dtype
) -> torch.Tensor | None:
    """Additive mask of `length` keys: the bias on the first of them, and the smallest number where one is not visible.

    Without a bias, the mask itself. The bias is `(batch or 1, num_kv_heads, n)`; keys beyond the first `n` have none.
    """
    if bias is None:
        return mask
    bias = bias[..., :length].to(dtype)  # the bias may be longer than the keys
    added = nn.functional.pad(bias, (0, length - bias.shape[-1]))[:, :, None]  # (batch or 1, num_kv_heads, 1, length)
    return added if mask is None else added.masked_fill(~mask, torch.finfo(dtype).min)


def _mask(
    context: ForwardContext, layer: int, position_ids: torch.Tensor | None, new: int, length: int, window: int | None
) -> torch.Tensor | None:
    """Visibility of keys: `(1 or batch, 1 or num_kv_heads, new, at least seq_len)`; None if queries see all keys."""
    cache = context.cache
    if new == 1 and window is None and cache is not None and cache.without_gaps:
        return None  # known without looking at the positions, which would stall a GPU
    # Without a window, all entries before the question are visible at any position, so the layers share one mask. If
    # layers differ in length, it is the mask of the longest layer: its end fits all of them.
    if cache is not None and cache.starts is not None and window is None:
        length = cache.n_composed + cache.appended_positions.shape[1]
    shared = (layer if cache is not None and cache.differs_by_layer(window) else -1, window)
    if shared in context.masks:
        return context.masks[shared]
    assert position_ids is not None
    queries = position_ids.to(torch.int32)[:, None, :, None]  # (1 or batch, 1, new, 1)
    # 1. Positions of the keys: (1 or batch, 1 or num_kv_heads, length).
    if cache is None and length == new:
        keys = position_ids.to(torch.int32)[:, None]
    elif cache is None:  # Transformers' own cache: positions without gaps
        keys = queries[:, :, -1] + torch.arange(1 - length, 1, device=queries.device, dtype=torch.int32)
    elif window is not None or (cache.padded and cache.starts is None):
        keys = cache.key_positions(layer)
    else:  # composed entries precede every query: -1 stands for all their positions
        composed = length - cache.appended_positions.shape[1]
        keys = nn.functional.pad(cache.appended_positions, (composed, 0), value=-1)[:, None]
    # 2. A key is visible if it is not later than the query, and inside its window.
    mask = keys[:, :, None, :] <= queries  # (1 or batch, 1 or num_kv_heads, new, length)
    if window is not None:
        mask &= keys[:, :, None, :] > queries - window
    context.masks[shared] = None if new == 1 and bool(mask.all()) else mask
    return context.masks[shared]


AttentionInterface.register(ATTENTION, attention_forward)
