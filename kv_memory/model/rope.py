"""Rotary embedding: remove it from keys and apply it to keys.

The cosines and sines come from the model's own rotary module, called in float32. Every rope type of the model (linear,
llama3, yarn with its attention factor, longrope's short and long sets, Gemma 3's two thetas, Phi-3's partial rotation)
is thus supported without a second implementation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

__all__ = ["Rope"]

CHUNK_BYTES = 1 << 20  # size of the float32 keys rotated at once on a CPU


class Rope:
    """The rotary embedding of one model, applied to keys of any layer at any positions.

    Args:
        rotary: The model's rotary module (`model.rotary_emb`), of the "rotate half" convention.
        layer_types: Rope type name of each layer for modules that take one (Gemma 3), else None for each.
        lock: Lock held during calls of the module. Those of longrope and dynamic NTK change their own frequencies,
            which a forward pass of the model in another thread must not see.
    """

    def __init__(
        self,
        rotary: nn.Module,
        *,
        layer_types: Sequence[str | None],
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._rotary = rotary
        self._lock = lock if lock is not None else threading.RLock()
        # Layers with the same tables are rotated together.
        self._groups: dict[str | None, list[int]] = {}
        for layer, name in enumerate(layer_types):
            self._groups.setdefault(name, []).append(layer)

    @property
    def _kinds(self) -> set[str]:
        names = getattr(self._rotary, "rope_type", "default")
        return set(names.values()) if isinstance(names, dict) else {names}

    @property
    def varies(self) -> bool:
        """Whether `regime` depends on the length of the sequence."""
        return any("dynamic" in kind or kind == "longrope" for kind in self._kinds)

    def regime(self, n_positions: int) -> tuple[Any, ...]:
        """Identifier of the frequencies in use for a sequence of `n_positions`.

        Keys rotated under one regime may be reused only under the same regime. Longrope changes its frequencies once,
        beyond the original context window; dynamic NTK changes them with every length beyond it.
        """
        config = getattr(self._rotary, "config", None)
        kinds = self._kinds
        if "longrope" in kinds:
            parameters = getattr(config, "rope_parameters", None) or {}
            original: int = (
                parameters.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or 0
            )
            return ("longrope", n_positions > original)
        if any("dynamic" in kind for kind in kinds):
            return ("dynamic", max(n_positions, getattr(config, "max_position_embeddings", 0)))
        return ()

    def rotate(
        self, keys: torch.Tensor, positions: torch.Tensor, *, n_positions: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotate position-free keys to their positions, in float32.

        Args:
            keys: `(num_layers, num_kv_heads, seq_len, head_dim)`, without rotary embedding.
            positions: `(seq_len,)` or `(num_layers, num_kv_heads, seq_len)`, integer.
            n_positions: Length of the whole sequence that will contain the keys, the question included.
            out: Output tensor in the shape of `keys`; a new tensor of their dtype if None.

        Returns:
            Keys with rotary embedding, shape and dtype of `out`.
        """
        return self._rotate(keys, positions, n_positions=n_positions, inverse=False, out=out)

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor, *, n_positions: int) -> torch.Tensor:
        """Undo `rotate`, with the same shapes; the result is float32, to avoid another rounding."""
        out = torch.empty_like(keys, dtype=torch.float32)
        return self._rotate(keys, positions, n_positions=n_positions, inverse=True, out=out)

    def rotate_flat(
        self, keys: torch.Tensor, positions: torch.Tensor, per_layer: Sequence[int], *, n_positions: int
    ) -> torch.Tensor:
        """`rotate` for heads that hold different numbers of entries.

        Args:
            keys: `(entries, head_dim)`, layer by layer.
            positions: `(entries,)`.
            per_layer: Number of entries of each layer.
            n_positions: Length of the whole sequence, as in `rotate`.

        Returns:
            Keys with rotary embedding, in the shape and dtype of `keys`.
        """
        return self._rotate_flat(keys, positions, per_layer, n_positions=n_positions, inverse=False, dtype=keys.dtype)

    def unrotate_flat(
        self, keys: torch.Tensor, positions: torch.Tensor, per_layer: Sequence[int], *, n_positions: int
    ) -> torch.Tensor:
        """Undo `rotate_flat`; the result is float32."""
        return self._rotate_flat(keys, positions, per_layer, n_positions=n_positions, inverse=True, dtype=torch.float32)

    def _rotate_flat(
        self,
        keys: torch.Tensor,
        positions: torch.Tensor,
        per_layer: Sequence[int],
        *,
        n_positions: int,
        inverse: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        parts, where = keys.split(list(per_layer)), positions.long().split(list(per_layer))
        rotated: dict[int, torch.Tensor] = {}
        for name, layers in self._groups.items():
            cos, sin = self._tables(name, n_positions, keys.device)
            if inverse:
                cos, sin = _inverse(cos, sin)
            for layer in layers:
                # index_select copies whole rows: ten times as fast as cos[where[layer]]
                here = cos.index_select(0, where[layer]), sin.index_select(0, where[layer])
                rotated[layer] = _rotate_half(parts[layer].float(), *here).to(dtype)
        return torch.cat([rotated[layer] for layer in range(len(parts))])

    def _rotate(
        self, keys: torch.Tensor, positions: torch.Tensor, *, n_positions: int, inverse: bool, out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is None:
            out = torch.empty_like(keys)
        for name, layers in self._groups.items():
            cos, sin = self._tables(name, n_positions, keys.device)
            if inverse:
                cos, sin = _inverse(cos, sin)
            chunk = self._chunk(keys)
            for start in range(0, len(layers), chunk):
                some = layers[start : start + chunk]
                index = slice(some[0], some[-1] + 1) if some[-1] - some[0] == len(some) - 1 else torch.tensor(some)
                here = (positions if positions.ndim == 1 else positions[index]).long()
                out[index] = _rotate_half(keys[index].float(), cos[here], sin[here]).to(out.dtype)
        return out

    @staticmethod
    def _chunk(keys: torch.Tensor) -> int:
        """Number of layers to rotate at once: on a CPU as many as fit into its cache (twice as fast as all at once)."""
        if keys.device.type != "cpu":
            return keys.shape[0]
        return max(1, CHUNK_BYTES // max(1, keys[0].numel() * 4))

    def _tables(
        self, layer_type: str | None, n_positions: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, `(n_positions, rotary_dim / 2)` each, float32.

        All positions are requested at once, so that rope types that depend on the last position choose the
        frequencies of the whole sequence.
        """
        like = torch.empty(1, dtype=torch.float32, device=device)
        ids = torch.arange(n_positions, device=device)[None]
        extra = () if layer_type is None else (layer_type,)
        with self._lock:
            cos, sin = self._rotary(like, ids, *extra)
        half = cos.shape[-1] // 2  # the module repeats the frequencies for the second half of the head
        return cos[0, :, :half], sin[0, :, :half]


def _inverse(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of the inverse rotation; with the attention factor s, the inverse of s·R is Rᵀ/s, s² = cos² + sin²."""
    square = cos.square() + sin.square()
    return cos / square, -sin / square


def _rotate_half(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + rotary_dim / 2), in float32; dimensions beyond rotary_dim are unchanged."""
    half = cos.shape[-1]
    first, second = keys[..., :half], keys[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, keys[..., 2 * half :]], dim=-1)
