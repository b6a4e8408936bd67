"""Rotary embedding: remove it from keys and apply it to keys.

The cosines and sines come from the model's own rotary module, called in float32. Every rope type of the model (linear,
llama3, yarn with its attention factor, longrope's short and long sets, Gemma 3's two thetas, Phi-3's partial rotation)
is thus supported without a second implementation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import nn

# Most numbers in one operation on a CPU. The operands of a chunk stay in the processor's cache: four times as fast as
# all keys at once. Larger operations are also split among threads, and waking those takes longer than so little work.
CHUNK = 32_768
TABLE_ROWS = 1024  # tables of cosines and sines grow in steps of this many positions


class Rope:
    """The rotary embedding of one model, applied to keys of any layer at any positions.

    Args:
        rotary: The model's rotary module (`model.rotary_emb`), of the "rotate half" convention.
        layer_types: Rope type name of each layer for modules that take one (Gemma 3), else None for each.
        lock: Lock held during calls of the module. Those of longrope and dynamic NTK change their own frequencies,
            which a forward pass of the model in another thread must not see.

    Attributes:
        varies: Whether `regime` depends on the length of the sequence.
    """

    def __init__(
        self, rotary: nn.Module, *, layer_types: Sequence[str | None], lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self._rotary = rotary
        self._lock = lock if lock is not None else threading.RLock()
        names = getattr(rotary, "rope_type", "default")
        self._kinds: set[str] = set(names.values()) if isinstance(names, dict) else {names}
        self.varies = any("dynamic" in kind or kind == "longrope" for kind in self._kinds)
        # Consecutive layers with the same tables are rotated together.
        self._groups: list[tuple[str | None, int, int]] = []  # type, first layer, end
        for layer, name in enumerate(layer_types):
            if self._groups and self._groups[-1][0] == name:
                self._groups[-1] = (name, self._groups[-1][1], layer + 1)
            else:
                self._groups.append((name, layer, layer + 1))
        self._kept_tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def regime(self, n_positions: int) -> tuple[Any, ...]:
        """Identifier of the frequencies in use for a sequence of `n_positions`.

        Keys rotated under one regime may be reused only under the same regime. Longrope changes its frequencies once,
        beyond the original context window; dynamic NTK changes them with every length beyond it.
        """
        if not self.varies:
            return ()
        config = getattr(self._rotary, "config", None)
        if "longrope" in self._kinds:
            parameters = getattr(config, "rope_parameters", None) or {}
            original: int = (
                parameters.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or 0
            )
            return ("longrope", n_positions > original)
        return ("dynamic", max(n_positions, getattr(config, "max_position_embeddings", 0)))

    def rotate(
        self,
        keys: torch.Tensor,
        positions: torch.Tensor,
        *,
        n_positions: int,
        inverse: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Rotate position-free keys to their positions, in float32.

        Args:
            keys: `(num_layers, num_kv_heads, seq_len, head_dim)`, without rotary embedding.
            positions: `(seq_len,)` or `(num_layers, num_kv_heads, seq_len)`, integer.
            n_positions: Length of the whole sequence that will contain the keys, the question included.
            inverse: True to undo the rotation of rotated keys.
            dtype: Dtype of the result; None means float32 with `inverse`, else that of the keys.

        Returns:
            Keys with rotary embedding, in the shape of `keys`.
        """
        flat, every = keys.flatten(0, 2), positions.expand(keys.shape[:3]).flatten()
        per_layer = [keys.shape[1] * keys.shape[2]] * keys.shape[0]
        turned = self.rotate_flat(flat, every, per_layer, n_positions=n_positions, inverse=inverse, dtype=dtype)
        return turned.view(keys.shape)

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor, *, n_positions: int) -> torch.Tensor:
        """Undo `rotate`, with the same shapes; the result is float32, to avoid another rounding."""
        return self.rotate(keys, positions, n_positions=n_positions, inverse=True)

    def rotate_flat(
        self,
        keys: torch.Tensor,
        positions: torch.Tensor,
        per_layer: Sequence[int],
        *,
        n_positions: int,
        inverse: bool = False,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`rotate` for heads that hold different numbers of entries.

        `keys` are `(entries, head_dim)`, layer by layer, with `per_layer` entries each; `positions` are `(entries,)`.
        """
        out = keys.new_empty(keys.shape, dtype=dtype or (torch.float32 if inverse else keys.dtype))
        positions = positions.to(torch.int32)
        ends = list(accumulate(per_layer, initial=0))
        for name, first, end in self._groups:
            cos, sin = self._tables(name, n_positions, keys.device, inverse=inverse)
            some = slice(ends[first], ends[end])
            _rotate_half(keys[some], cos, sin, positions[some], out[some])
        return out

    def _tables(
        self, layer_type: str | None, n_positions: int, device: torch.device, *, inverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, `(n_positions or more, rotary_dim / 2)` each, float32; of the inverse rotation if asked.

        All positions are requested at once, so that rope types that depend on the last position choose the
        frequencies of the whole sequence. Tables of other types are kept.
        """
        key = layer_type, device, inverse
        kept = self._kept_tables.get(key)
        if kept is not None and len(kept[0]) >= n_positions:
            return kept
        if not self.varies:
            n_positions = -(-n_positions // TABLE_ROWS) * TABLE_ROWS
        like = torch.empty(1, dtype=torch.float32, device=device)
        ids = torch.arange(n_positions, device=device)[None]
        extra = () if layer_type is None else (layer_type,)
        with self._lock:
            cos, sin = self._rotary(like, ids, *extra)
        half = cos.shape[-1] // 2  # the module repeats the frequencies for the second half of the head
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        if inverse:
            square = cos.square() + sin.square()  # s², with the attention factor s: the inverse of s·R is Rᵀ/s
            cos, sin = cos / square, -sin / square
        if not self.varies:
            self._kept_tables[key] = cos, sin
        return cos, sin


def _rotate_half(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, out: torch.Tensor
) -> None:
    """Rotate pairs (i, i + rotary_dim / 2), in float32; dimensions beyond rotary_dim are unchanged."""
    half = cos.shape[-1]
    in_chunks = keys.device.type == "cpu" and not keys.requires_grad
    step = CHUNK // half if in_chunks else max(1, len(keys))
    for start in range(0, len(keys), step):  # not `split`: autograd refuses to write to its results
        of, to, where = (part[start : start + step] for part in (keys, out, positions))
        c, s = cos.index_select(0, where), sin.index_select(0, where)  # ten times as fast as cos[where]
        first, second = of[:, :half].float(), of[:, half : 2 * half].float()
        to[:, :half] = (first * c).sub_(second * s)
        to[:, half : 2 * half] = (second * c).add_(first * s)
        to[:, 2 * half :] = of[:, 2 * half :]
