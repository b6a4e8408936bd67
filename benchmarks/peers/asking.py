"""Asking: many questions and continuations after one reading, as branches of a tree.

All branches are in one sequence and see the reading, their own ancestors and nothing else. So a question is prefilled
once for the full cache's answer, the reference and decoding, and the cache is never copied per question; on a CPU that
is several times faster than a padded batch. Trees after several readings can be extended in one pass of the model:
each sees its own reading. So all methods' answers about a document are decoded together.

What a press evicts by masking is masked here in the attention mask. kvpress itself overwrites such keys with ones that
point away from the queries, which has the same effect where it works, but depends on the queries of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reader import Reader, Reading
from torch.nn import functional as F
from transformers import AttentionInterface

__all__ = ["ROOT", "Asking", "extend"]

ATTENTION = "tree"
ROOT = -1  # the parent of a first token


class Asking:
    """The tree after one reading. The reading is not changed.

    Args:
        reader: Reader whose model answers.
        reading: Reading that the questions are about.
    """

    def __init__(self, reader: Reader, reading: Reading) -> None:
        self.reader, self.reading = reader, reading
        self.keys, self.values = list(reading.keys), list(reading.values)  # of what was read and of the tree, by layer
        self._depths: list[int] = []
        self._paths: list[list[int]] = []  # of every token: its ancestors and itself

    @property
    def n_tokens(self) -> int:
        """Number of tokens added."""
        return len(self._paths)

    def add(self, tokens: Sequence[tuple[int, int]]) -> tuple[list[int], torch.Tensor]:
        """Add tokens to the tree, before the model sees them; see `extend`.

        Returns:
            Their positions, and `(n, n_tokens)`: which tokens of the tree each of them sees.
        """
        start = len(self._paths)
        for parent, _ in tokens:
            above = [] if parent == ROOT else self._paths[parent]
            self._depths.append(len(above))
            self._paths.append([*above, len(self._paths)])
        own = torch.zeros(len(tokens), len(self._paths), dtype=torch.bool)
        for row, path in enumerate(self._paths[start:]):
            own[row, path] = True
        return [self.reading.n_positions + depth for depth in self._depths[start:]], own.to(self.reader.device)

    def chain(self, parent: int, ids: Sequence[int], *, offset: int = 0) -> list[tuple[int, int]]:
        """Tokens one below the other, for `extend`; `offset` counts those that come before them in the same call."""
        first = len(self._paths) + offset
        return [(parent if i == 0 else first + i - 1, token) for i, token in enumerate(ids)]

    def attend(
        self, layer: int, own: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of new tokens, whose keys and values are kept.

        Args:
            layer: Index of the layer.
            own: Mask of the tree's tokens that each new token sees.
            query: `(1, num_heads, n, head_dim)`.
            key: `(1, num_kv_heads, n, head_dim)`.
            value: The same.
            scaling: Scale of the logits.
        """
        key = self.keys[layer] = torch.cat([self.keys[layer], key], 2)
        value = self.values[layer] = torch.cat([self.values[layer], value], 2)
        n_rows, (_, n_heads, _, n_dims), n_kv_heads = own.shape[0], query.shape, key.shape[1]
        held = torch.ones(1, key.shape[2] - own.shape[1], dtype=torch.bool, device=key.device)
        if self.reading.visible is not None:
            held = self.reading.visible[layer]
        mask = torch.cat(
            [held[:, None].expand(-1, n_rows, -1), own[None].expand(held.shape[0], -1, -1)], dim=-1
        )  # (1 or num_kv_heads, n_rows, n_held + n_own)
        group = n_heads // n_kv_heads  # query heads that share a KV head become rows of one head
        rows = query.reshape(1, n_kv_heads, group * n_rows, n_dims)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat(1, group, 1)[None], scale=scaling)
        return out.reshape(1, n_heads, n_rows, -1)


@torch.no_grad()
def extend(parts: Sequence[tuple[Asking, Sequence[tuple[int, int]]]]) -> list[torch.Tensor]:
    """Add tokens to trees, parents first, in one pass of the model.

    Args:
        parts: Trees of one reader, and parent and id of each token. Tokens are numbered in the order they were added;
            `ROOT` has no token.

    Returns:
        For each part `(n, hidden_size)`, the input of the language model head.
    """
    reader = parts[0][0].reader
    added = [asking.add(tokens) for asking, tokens in parts]
    model = reader.model
    model.set_attn_implementation(ATTENTION)
    out = model.model(
        input_ids=torch.tensor([[token for _, tokens in parts for _, token in tokens]], device=reader.device),
        position_ids=torch.tensor([[at for positions, _ in added for at in positions]], device=reader.device),
        use_cache=False,
        trees=[(asking, own) for (asking, _), (_, own) in zip(parts, added, strict=True)],
    )
    return list(out.last_hidden_state[0].split([len(tokens) for _, tokens in parts]))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trees: Sequence[tuple[Asking, torch.Tensor]],
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface."""
    parts = zip(
        trees, *(rows.split([own.shape[0] for _, own in trees], dim=2) for rows in (query, key, value)), strict=True
    )
    out = [asking.attend(module.layer_idx, own, *rows, scaling) for (asking, own), *rows in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
