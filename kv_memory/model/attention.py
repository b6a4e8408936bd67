"""One attention function for every supported model.

Hugging Face's masks derive what a query may see from indices in the cache. In a composed cache index and position
are different things, and in a distilled one they differ from head to head; so masks are made here, from positions.
The function is registered under `ATTENTION` with Transformers' attention interface and selected per model; it hands
the arithmetic on to Transformers' own SDPA function, and does it itself only where SDPA cannot (logit soft-capping).

`ForwardContext` travels through the model as a keyword argument, the way Transformers passes flash-attention
arguments, so that recomputation under gradient checkpointing and several threads on one model need no global state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from kv_memory.model.kv_cache import PositionedCache

__all__ = [
    "ATTENTION",
    "AttentionObserver",
    "ForwardContext",
    "Routing",
    "attention_probabilities",
]

ATTENTION = "kv_memory"
QUERY_BLOCK = 512  # queries handled at once where a mask is needed
SHORT = 64  # queries up to which the heads of a group are packed instead of repeating their keys


class AttentionObserver(Protocol):
    """Looks at queries and keys while a model reads."""

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
        """Called once per layer, before attention.

        Args:
            layer: The layer's index.
            query: `(batch, num_heads, new, head_dim)`, rotated.
            key: `(batch, num_kv_heads, seq_len, head_dim)`, rotated; the last `new` belong to the queries.
            scaling: Of the attention logits.
            softcap: Of the attention logits, where the model has one.
            window: How far a query of this layer looks back; None where it sees all.
        """


class Routing(Protocol):
    """Decides, layer by layer while a model reads, which tokens go through the adapter."""

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Called before each decoder layer, and once more where gradient checkpointing runs it again.

        Args:
            layer: The layer's index.
            hidden: `(batch, new, hidden_size)`, what goes into it.

        Returns:
            Bool `(batch, new)`; or float, how strongly each token goes through it, 0 for not at all; `(batch, 1)` for
            all tokens of a row alike; None for no token.
        """


@dataclass
class ForwardContext:
    """What one forward pass of the model carries besides its tokens.

    Attributes:
        cache: Gives keys their positions; None where the tokens are alone in their sequence.
        observer: Sees every layer's queries and keys.
        routing: Decides which tokens go through the adapter; None for none.
        outputs: Where every layer's attention output, before W_O, is put: `(batch, new, num_heads, head_dim)` each;
            None for nowhere. Layers that gradient checkpointing runs again put theirs behind the others.
    """

    cache: PositionedCache | None = None
    observer: AttentionObserver | None = None
    routing: Routing | None = None
    outputs: list[torch.Tensor] | None = None
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
    """Attention with masks made from positions. The signature is Transformers' attention interface.

    Args:
        module: The attention layer.
        query: `(batch, num_heads, new, head_dim)`.
        key: `(batch, num_kv_heads, seq_len, head_dim)`.
        value: The same shape as `key`.
        attention_mask: Ignored: Transformers makes none for an attention function without a mask function.
        scaling: Of the logits.
        dropout: Refused in effect: these models are run with 0.
        softcap: Of the logits (Gemma 2).
        sliding_window: How far a query of this layer looks back.
        position_ids: Of the queries, `(1 or batch, new)`.
        kv_memory: The context; None when the model is called without a cache of ours.
        **kwargs: What Transformers passes to other attention functions.

    Returns:
        `(batch, new, num_heads, head_dim)`, and None for the weights.
    """
    context = kv_memory or ForwardContext()
    out = _attend(module, query, key, value, context, scaling, softcap, sliding_window, position_ids)
    if context.outputs is not None:
        context.outputs.append(out)
    return out, None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: ForwardContext,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if context.observer is not None:
        context.observer.observe(layer, query, key, scaling=scaling, softcap=softcap, window=sliding_window)

    new, length = query.shape[2], key.shape[2]
    window = sliding_window if sliding_window is not None and length > 1 else None
    cache = context.cache
    if cache is not None and cache.starts is not None:
        return _attend_by_head(module, query, key, value, context, scaling, softcap, window, position_ids)
    # Perhaps: of caches, batches are, and those whose heads hold different numbers of entries.
    padded = cache is not None and (cache.n_rows > 1 or cache.padded)
    biased = cache is not None and cache.bias is not None
    past = length - new
    if softcap is None and window is None and not padded and not biased and past <= new and new > 1:
        # SDPA skips the upper triangle only from the first key on. Queries of nothing in front of ours, thrown away
        # afterwards, are cheaper than a mask: a long document behind a short prefix takes two thirds of the time.
        query = nn.functional.pad(query, (0, 0, past, 0))
        out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return out[:, past:]

    mask = _mask(context, layer, position_ids, new, length, window)
    if cache is not None and cache.bias is not None:
        mask = _biased(mask, cache.bias[layer], length, dtype=query.dtype)
    return _attend_masked(module, query, key, value, mask, scaling=scaling, softcap=softcap)


def _attend_by_head(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: ForwardContext,
    scaling: float,
    softcap: float | None,
    window: int | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Attention where heads hold different numbers of entries, head by head, each over its own.

    The fullest head of a layer may hold three times what heads hold on average. All heads in one call, with a mask over
    the padding, took twice the time of caches that hold as much in every head.
    """
    assert context.cache is not None and context.cache.starts is not None
    layer, length = int(module.layer_idx), key.shape[2]  # type: ignore[arg-type]
    group = query.shape[1] // key.shape[1]
    mask = _mask(context, layer, position_ids, query.shape[2], length, window)
    outs = []
    for head, start in enumerate(context.cache.starts[layer]):
        part = mask
        if mask is not None:
            part = mask[:, head % mask.shape[1], None, :, start - length :]
        own = slice(head, head + 1)
        if context.cache.bias is not None:
            part = _biased(part, context.cache.bias[layer][:, own, start:], length - start, dtype=query.dtype)
        queries = query[:, head * group : (head + 1) * group]
        k, v = key[:, own, start:], value[:, own, start:]
        outs.append(_attend_masked(module, queries, k, v, part, scaling=scaling, softcap=softcap))
    return torch.cat(outs, dim=2)


def _attend_masked(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention under a mask; None where every query sees all."""
    new, length = query.shape[2], key.shape[2]
    if softcap is None and new <= SHORT:
        return _attend_packed(query, key, value, mask, scaling=scaling)

    # In blocks of queries, each against the keys up to its own end: a mask over all keys at once would double the work.
    blocks = []
    for start in range(0, new, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, new))
        end = length - new + rows.stop
        part = _for_query_heads(mask, query, rows, end)
        q, k, v = query[:, :, rows], key[:, :, :end], value[:, :, :end]
        if softcap is None:
            out, _ = sdpa_attention_forward(module, q, k, v, part, scaling=scaling, is_causal=False)
        else:
            weights = attention_probabilities(q, k, part, scaling=scaling, softcap=softcap).to(v.dtype)
            out = (weights @ repeat_kv(v, q.shape[1] // v.shape[1])).transpose(1, 2)
        blocks.append(out)
    return torch.cat(blocks, dim=1)


def _attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scaling: float
) -> torch.Tensor:
    """Attention of a short question over a long cache: query heads that share a KV head become rows of one head.

    Transformers repeats keys and values for every query head where there is a mask. Behind 600 cached entries that
    copying took as long as the attention itself.
    """
    batch, heads, new, dim = query.shape
    kv_heads = key.shape[1]
    rows = query.reshape(batch, kv_heads, heads // kv_heads * new, dim)
    mask = None if mask is None else mask.repeat(1, 1, heads // kv_heads, 1)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous()


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, *, scaling: float, softcap: float | None
) -> torch.Tensor:
    """Softmax of the attention logits in float32, written out.

    Args:
        query: `(batch, num_heads, new, head_dim)`.
        key: `(batch, num_kv_heads, seq_len, head_dim)`.
        mask: True where a query sees a key, or what is added to the logits; broadcast to
            `(batch, num_heads, new, seq_len)`.
        scaling: Of the logits.
        softcap: Of the logits, or None.

    Returns:
        `(batch, num_heads, new, seq_len)`, float32.
    """
    logits = (query @ repeat_kv(key, query.shape[1] // key.shape[1]).transpose(2, 3)).float() * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        logits = logits + mask
    return torch.softmax(logits, dim=-1)


def _biased(mask: torch.Tensor | None, bias: torch.Tensor, length: int, *, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the logits, and on the first entries of the cache the bias.

    Args:
        mask: True where a query sees a key; None where every query sees all.
        bias: `(batch or 1, num_kv_heads, n)`; keys beyond the first `n` have none.
        length: The number of keys.
        dtype: The queries' dtype.
    """
    bias = bias[..., :length].to(dtype)  # there may be room for more
    added = nn.functional.pad(bias, (0, length - bias.shape[-1]))[:, :, None]
    if mask is None:
        return added
    return added.masked_fill(~mask, torch.finfo(dtype).min)


def _mask(
    context: ForwardContext,
    layer: int,
    position_ids: torch.Tensor | None,
    new: int,
    length: int,
    window: int | None,
) -> torch.Tensor | None:
    """Which key each query sees: `(batch, 1 or num_kv_heads, new, at least seq_len)`; None where queries see all."""
    cache = context.cache
    # Without a window all that precedes the question is visible whatever its position, so layers share one mask; where
    # they differ in length it is that of the longest, whose end fits all.
    if cache is not None and cache.starts is not None and window is None:
        length = cache.n_composed + cache.appended_positions.shape[1]
    shared = (layer if cache is not None and cache.differs_by_layer(window) else -1, window)
    if shared not in context.masks:
        context.masks[shared] = _make_mask(cache, layer, position_ids, new, length, window)
    return context.masks[shared]


def _make_mask(
    cache: PositionedCache | None,
    layer: int,
    position_ids: torch.Tensor | None,
    new: int,
    length: int,
    window: int | None,
) -> torch.Tensor | None:
    assert position_ids is not None
    queries = position_ids.to(torch.int32)[:, None, :, None]
    if cache is None and length == new:
        keys = position_ids.to(torch.int32)[:, None]
    elif cache is None:  # a cache of Transformers' own, whose positions have no gaps
        keys = queries[:, :, -1] + torch.arange(1 - length, 1, device=queries.device, dtype=torch.int32)
        keys = keys[:, None] if keys.ndim == 2 else keys
    elif window is None and cache.padded and cache.starts is None:
        keys = cache.key_positions(layer)
    elif window is None:
        composed = length - cache.appended_positions.shape[1]
        keys = torch.nn.functional.pad(cache.appended_positions, (composed, 0), value=-1)[:, None]
    else:
        keys = cache.key_positions(layer)
    mask = keys[:, :, None, :] <= queries
    if window is not None:
        mask &= keys[:, :, None, :] > queries - window
    return None if new == 1 and bool(mask.all()) else mask


def _for_query_heads(mask: torch.Tensor | None, query: torch.Tensor, rows: slice, end: int) -> torch.Tensor | None:
    """The part of a mask for some queries and the keys up to `end`, one head of it per query head if it has heads."""
    if mask is None:
        return None
    part = mask[:, :, rows, :end]
    return part if part.shape[1] == 1 else part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)


AttentionInterface.register(ATTENTION, attention_forward)
