"""Asking: many questions and continuations behind one reading, as branches of a tree.

All branches lie in one sequence and see what was read, their own ancestors and nothing else. So a question is prefilled
once for the full cache's answer, the reference and decoding, and the cache is never copied per question; on a CPU that
is several times faster than a padded batch.

What a press evicts by masking is masked here in the plain sense. kvpress itself overwrites such keys with ones that
point away from the queries, which comes to the same where it works and depends on the queries of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reader import Reader, Reading
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache

__all__ = ["ROOT", "Asking"]

ATTENTION = "tree"
ROOT = -1  # the parent of a first token


class Asking:
    """The tree behind one reading. The reading is not changed.

    Args:
        reader: Whose model answers.
        reading: What the questions are about.
    """

    def __init__(self, reader: Reader, reading: Reading) -> None:
        self._reader, self._reading = reader, reading
        self._cache = DynamicCache()
        for index, (keys, values) in enumerate(zip(reading.keys, reading.values, strict=True)):
            self._cache.update(keys, values, index)
        self._depths: list[int] = []
        self._paths: list[list[int]] = []  # of every token: its ancestors and itself

    @torch.no_grad()
    def extend(self, tokens: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Add tokens, parents first.

        Args:
            tokens: Parent and id of each. Tokens are numbered in the order they were added; `ROOT` has no token.

        Returns:
            `(n, hidden_size)`, what the language model head would see.
        """
        start = len(self._paths)
        for parent, _ in tokens:
            above = [] if parent == ROOT else self._paths[parent]
            self._depths.append(len(above))
            self._paths.append([*above, len(self._paths)])
        device = self._reader.device
        own = torch.zeros(len(tokens), len(self._paths), dtype=torch.bool)
        for row, path in enumerate(self._paths[start:]):
            own[row, path] = True
        model = self._reader.model
        model.set_attn_implementation(ATTENTION)
        out = model.model(
            input_ids=torch.tensor([[token for _, token in tokens]], device=device),
            position_ids=torch.tensor([self._depths[start:]], device=device) + self._reading.n_positions,
            past_key_values=self._cache,
            tree=(own.to(device), self._reading.visible),
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    @property
    def n_tokens(self) -> int:
        """How many tokens were added."""
        return len(self._paths)

    def chain(self, parent: int, ids: Sequence[int], *, offset: int = 0) -> list[tuple[int, int]]:
        """Tokens one below the other, for `extend`; `offset` counts those that come before them in the same call."""
        first = len(self._paths) + offset
        return [(parent if i == 0 else first + i - 1, token) for i, token in enumerate(ids)]

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, vocab_size)`, float32."""
        return self._reader.model.lm_head(hidden).float().log_softmax(-1)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: tuple[torch.Tensor, tuple[torch.Tensor, ...] | None],
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface. Query heads that share a KV head become rows of one head."""
    own, visible = tree
    n_rows, (_, n_heads, _, n_dims), n_kv_heads = own.shape[0], query.shape, key.shape[1]
    held = torch.ones(1, key.shape[2] - own.shape[1], dtype=torch.bool, device=key.device)
    if visible is not None:
        held = visible[module.layer_idx]
    mask = torch.cat(
        [held[:, None].expand(-1, n_rows, -1), own[None].expand(held.shape[0], -1, -1)], dim=-1
    )  # (1 or num_kv_heads, n_rows, n_held + n_own)
    group = n_heads // n_kv_heads
    rows = query.reshape(1, n_kv_heads, group * n_rows, n_dims)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat(1, group, 1)[None], scale=scaling)
    return out.reshape(1, n_heads, n_rows, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
