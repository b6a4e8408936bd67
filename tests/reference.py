"""What the untouched Transformers models compute, to hold ours against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kv_memory.model.first_token import is_visible
from tests.conftest import make_backbone, make_model

LAYER_TYPED = ("gemma2", "gemma3_text", "qwen2", "qwen3")  # take one mask per layer type


@cache
def plain_model(name: str, **changes: Any) -> Any:
    """The tiny model with Transformers' own eager attention; no part of this package has touched it."""
    return make_model(name, **changes)


@cache
def shared_backbone(name: str, **changes: Any) -> Any:
    """A backbone over the same weights. No test may change it."""
    return make_backbone(name, **changes)


class FixedRouting:
    """Routes tokens chosen beforehand through the adapter; a `Routing`.

    Args:
        mask: Bool or float mask, `(batch, new)` for all layers or `(num_layers, batch, new)`, see `Routing`.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the mask of this layer, see `Routing`."""
        return self._mask[layer] if self._mask.ndim == 3 else self._mask


@torch.no_grad()
def full_logits(name: str, ids: Sequence[int]) -> torch.Tensor:
    """Logits of one ordinary prefill, `(len(ids), vocab_size)`."""
    return plain_model(name)(torch.tensor([list(ids)]), use_cache=False).logits[0]


def may_open(tokenizer: Any, ids: Sequence[int], token: int, *, end: int = 2) -> bool:
    """Whether a token may stand in an answer that nothing can be seen of yet, behind a prompt that ends in a letter."""
    text = tokenizer.decode([*ids, token], skip_special_tokens=True)
    seen = any(char.isprintable() and not char.isspace() for char in text)
    return token != end and (seen or (text == " " and not ids))


@torch.no_grad()
def separate_logits(
    name: str, prefix: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> torch.Tensor:
    """Logits of the question in one prefill in which documents do not see each other, `(len(question), vocab_size)`.

    Every document stands behind a copy of the prefix of its own, which only it can see, as it did when it was read
    alone; the question sees the first copy and all documents. Rotary attention knows distances only, so this is what
    documents that were read apart and moved to their places must give.
    """
    parts: list[tuple[Sequence[int], int, set[int]]] = []  # token ids, position of the first, the parts they see
    start, seen_at_last = len(prefix), {0}
    for ids in documents:
        parts.append((prefix, start - len(prefix), set()))
        parts.append((ids, start, {len(parts) - 1}))
        seen_at_last.add(len(parts) - 1)
        start += len(ids)
    parts.append((question, start, seen_at_last))

    of = torch.tensor([index for index, (ids, _, _) in enumerate(parts) for _ in ids])
    positions = torch.tensor([first + i for ids, first, _ in parts for i in range(len(ids))])
    sees = torch.tensor([[i == j or j in seen for j in range(len(parts))] for i, (_, _, seen) in enumerate(parts)])
    mask = sees[of][:, of] & torch.ones(len(of), len(of), dtype=torch.bool).tril()
    model = plain_model(name)
    window = getattr(model.config, "sliding_window", None) or len(of)
    near = _additive(mask & (positions[:, None] - positions[None] < window))
    masks = {"full_attention": _additive(mask), "sliding_attention": near}
    tokens = torch.tensor([[token for ids, _, _ in parts for token in ids]])
    out = model(
        tokens,
        attention_mask=masks if model.config.model_type in LAYER_TYPED else near,
        position_ids=positions[None],
        use_cache=False,
    )
    return out.logits[0, -len(question) :]


def _additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums: to 1e-4 of the value, and of the spread for values near zero."""
    spread = float(expected.max() - expected.min())
    assert spread > 1, "logits this flat would hide a mistake"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * spread)


def padded(cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, positions and biases of a distilled cache, padded in every head to the size of the fullest.

    `(num_layers, num_kv_heads, span, head_dim)` twice, and without head_dim twice; -1 and 0 for padding.
    """
    flat = cache.keys.new_zeros(cache.keys.shape[:-1], dtype=torch.float16) if cache.bias is None else cache.bias
    if cache.counts is None:
        return cache.keys, cache.values, cache.positions.to(torch.int32).expand(cache.keys.shape[:3]), flat
    filled = torch.arange(cache.span) < cache.counts[..., None]
    keys = cache.keys.new_zeros(*filled.shape, cache.keys.shape[-1])
    values, positions = torch.zeros_like(keys), torch.full(filled.shape, -1, dtype=torch.int32)
    keys[filled], values[filled], positions[filled] = cache.keys, cache.values, cache.positions.to(torch.int32)
    bias = flat.new_zeros(filled.shape)
    bias[filled] = flat
    return keys, values, positions, bias


def by_head(cache: Any) -> list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Positions, keys and values of every layer and head of a distilled cache of either form."""
    keys, values, positions, _ = padded(cache)
    return [
        [
            (p[p >= 0].long(), k[p >= 0], v[p >= 0])
            for p, k, v in zip(positions[layer], keys[layer], values[layer], strict=True)
        ]
        for layer in range(keys.shape[0])
    ]


def blank_tokens(tokenizer: Any, vocab_size: int) -> list[int]:
    """Tokens that no answer begins with, because nothing of them can be seen; a space is let pass."""
    texts = {token: tokenizer.decode([token], skip_special_tokens=True) for token in range(vocab_size)}
    return [token for token, text in texts.items() if not is_visible(text) and text != " "]


def letters(n: int, *, seed: int = 0, alphabet: str = "abcdefghijklmnopqrstuvwxyz ") -> str:
    """`n` random characters: one token each."""
    generator = torch.Generator().manual_seed(seed)
    return "".join(alphabet[i] for i in torch.randint(len(alphabet), (n,), generator=generator).tolist())


@contextmanager
def recorded_inputs(backbone: Any) -> Iterator[list[torch.Tensor]]:
    """The token ids of every forward pass while the block runs, `(batch, n)` each."""
    seen: list[torch.Tensor] = []
    handle = backbone.decoder.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()
