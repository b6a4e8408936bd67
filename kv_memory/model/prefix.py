"""Prefix: the shared head of every prompt, prefilled once and kept between runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kv_memory.errors import CorruptCacheError

__all__ = ["Prefix"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """The shared prefix, prefilled.

    Unlike a distilled cache it keeps its positions, because it never moves, and so comes back bit by bit as it was.

    Attributes:
        ids: Its token ids.
        keys: `(num_layers, num_kv_heads, n_tokens, head_dim)`, with rotary embedding.
        values: The same shape.
        regime: Of the rotary frequencies, see `Rope.regime`.
    """

    ids: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    regime: tuple[Any, ...]

    def to_bytes(self, *, key: str) -> bytes:
        """Keys and values as one safetensors file, which says under which key it is kept."""
        return safetensors.torch.save({"keys": self.keys.cpu(), "values": self.values.cpu()}, metadata={"key": key})

    @classmethod
    def load(cls, path: Path, *, key: str, ids: tuple[int, ...], regime: tuple[Any, ...], like: torch.Tensor) -> Prefix:
        """Inverse of `to_bytes`.

        Args:
            path: The file.
            key: What it must be kept under. The oldest files do not say.
            ids: The token ids it must be of; their number is checked, the rest is in the key.
            regime: That of a sequence of this length.
            like: A tensor of the wanted dtype, device and shape, but for the third dimension.

        Raises:
            CorruptCacheError: The file is not a prefix of this key and shape.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(like.device)) as file:
                kept_under = (file.metadata() or {}).get("key", key)
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except (SafetensorError, KeyError, OSError) as error:
            raise CorruptCacheError(f"not a readable prefix: {error}", where=str(path)) from error
        if kept_under != key:
            raise CorruptCacheError(f"the prefix of {kept_under[:80]!r}, not of {key!r}", where=str(path))
        shape = (*like.shape[:2], len(ids), like.shape[3])
        if tuple(keys.shape) != shape or tuple(values.shape) != shape or keys.dtype != like.dtype:
            raise CorruptCacheError(f"prefix of shape {tuple(keys.shape)}, expected {shape}", where=str(path))
        return cls(ids, keys, values, regime)
