"""Prefix: the shared beginning of every prompt, prefilled once and stored between runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kv_memory.errors import CorruptCacheError


@dataclass(frozen=True, eq=False)
class Prefix:
    """The shared prefix, prefilled.

    Unlike a distilled cache, it is stored with rotary embedding, because its positions never change. It is therefore
    restored bit by bit.

    Attributes:
        ids: Token ids of the prefix.
        keys: `(num_layers, num_kv_heads, n_tokens, head_dim)`, with rotary embedding.
        values: `(num_layers, num_kv_heads, n_tokens, head_dim)`.
        regime: Regime of the rotary frequencies, see `Rope.regime`.
    """

    ids: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    regime: tuple[Any, ...]

    def to_bytes(self, *, key: str) -> bytes:
        """Keys and values as one safetensors file, with its storage key in the metadata."""
        return safetensors.torch.save({"keys": self.keys.cpu(), "values": self.values.cpu()}, metadata={"key": key})

    @classmethod
    def load(cls, path: Path, *, key: str, ids: tuple[int, ...], regime: tuple[Any, ...], like: torch.Tensor) -> Prefix:
        """Inverse of `to_bytes`.

        The file must have this storage key (the oldest ones have none, and are accepted), as many entries as `ids`, and
        the dtype and other dimensions of `like`.

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
            raise CorruptCacheError(f"the file has the prefix of {kept_under[:80]!r}, not of {key!r}", where=str(path))
        shape = (*like.shape[:2], len(ids), like.shape[3])
        if tuple(keys.shape) != shape or tuple(values.shape) != shape or keys.dtype != like.dtype:
            raise CorruptCacheError(f"the prefix has shape {tuple(keys.shape)}, expected {shape}", where=str(path))
        return cls(ids, keys, values, regime)
