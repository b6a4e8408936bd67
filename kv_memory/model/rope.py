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

CHUNK_BYTES = 1 << 20  # size of the float32 keys rotated at once on a CPU


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
        # Layers with the same tables are rotated together.
        self._groups: dict[str | None, list[int]] = {}
        for layer, name in enumerate(layer_types):
            self._groups.setdefault(name, []).append(layer)

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
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate position-free keys to their positions, in float32.

        Args:
            keys: `(num_layers, num_kv_heads, seq_len, head_dim)`, without rotary embedding.
            positions: `(seq_len,)` or `(num_layers, num_kv_heads, seq_len)`, integer.
            n_positions: Length of the whole sequence that will contain the keys, the question included.
            inverse: True to undo the rotation of rotated keys.
            out: Output tensor in the shape of `keys`; a new tensor of their dtype if None.

        Returns:
            Keys with rotary embedding, shape and dtype of `out`.
        """
        out = torch.empty_like(keys) if out is None else out
        for name, layers in self._groups.items():
            cos, sin = self._tables(name, n_positions, keys.device, inverse=inverse)
            # On a CPU as many layers at once as fit into its cache: twice as fast as all at once.
            chunk = max(1, CHUNK_BYTES // max(1, keys[0].numel() * 4)) if keys.device.type == "cpu" else keys.shape[0]
            for start in range(0, len(layers), chunk):
                some = layers[start : start + chunk]
                index = slice(some[0], some[-1] + 1) if some[-1] - some[0] == len(some) - 1 else torch.tensor(some)
                here = (positions if positions.ndim == 1 else positions[index]).long()
                out[index] = _rotate_half(keys[index].float(), cos[here], sin[here]).to(out.dtype)
        return out

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor, *, n_positions: int) -> torch.Tensor:
        """Undo `rotate`, with the same shapes; the result is float32, to avoid another rounding."""
        out = torch.empty_like(keys, dtype=torch.float32)
        return self.rotate(keys, positions, n_positions=n_positions, inverse=True, out=out)

    def rotate_flat(
        self,
        keys: torch.Tensor,
        positions: torch.Tensor,
        per_layer: Sequence[int],
        *,
        n_positions: int,
        inverse: bool = False,
    ) -> torch.Tensor:
        """`rotate` for heads that hold different numbers of entries; with `inverse`, the result is float32.

        `keys` are `(entries, head_dim)`, layer by layer, with `per_layer` entries each; `positions` are `(entries,)`.
        """
        dtype = torch.float32 if inverse else keys.dtype
        parts, where = keys.split(list(per_layer)), positions.long().split(list(per_layer))
        rotated: dict[int, torch.Tensor] = {}
        for name, layers in self._groups.items():
            cos, sin = self._tables(name, n_positions, keys.device, inverse=inverse)
            for layer in layers:
                # index_select copies whole rows: ten times as fast as cos[where[layer]]
                here = cos.index_select(0, where[layer]), sin.index_select(0, where[layer])
                rotated[layer] = _rotate_half(parts[layer].float(), *here).to(dtype)
        return torch.cat([rotated[layer] for layer in range(len(parts))])

    def _tables(
        self, layer_type: str | None, n_positions: int, device: torch.device, *, inverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, `(n_positions, rotary_dim / 2)` each, float32; those of the inverse rotation if asked.

        All positions are requested at once, so that rope types that depend on the last position choose the
        frequencies of the whole sequence.
        """
        like = torch.empty(1, dtype=torch.float32, device=device)
        ids = torch.arange(n_positions, device=device)[None]
        extra = () if layer_type is None else (layer_type,)
        with self._lock:
            cos, sin = self._rotary(like, ids, *extra)
        half = cos.shape[-1] // 2  # the module repeats the frequencies for the second half of the head
        cos, sin = cos[0, :, :half], sin[0, :, :half]
        if not inverse:
            return cos, sin
        square = cos.square() + sin.square()  # s², with the attention factor s: the inverse of s·R is Rᵀ/s
        return cos / square, -sin / square


def _rotate_half(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + rotary_dim / 2), in float32; dimensions beyond rotary_dim are unchanged."""
    half = cos.shape[-1]
    first, second = keys[..., :half], keys[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, keys[..., 2 * half :]], dim=-1)
