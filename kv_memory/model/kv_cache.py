"""The model's key-value cache: keys and values with rotary embedding, and the position of every entry; the prefix.

In a composed cache, index and position differ, and in a distilled cache they differ from head to head. Every entry
therefore has an explicit position. Layers grow inside a buffer, and heads may hold different numbers of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from kv_memory.errors import CorruptCacheError
from kv_memory.model.rope import Rope

NEVER = torch.iinfo(torch.int32).max  # position of padding: later than every query, so never visible


class PreallocatedLayer(DynamicLayer):
    """A cache layer that grows inside a buffer instead of copying itself for every new token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show(length)

    def _show(self, length: int) -> None:
        keys, values = self._buffers
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def put_keys(self, keys: torch.Tensor) -> None:
        """Replace the keys: `(batch, num_kv_heads, length, head_dim)`."""
        assert self.keys is not None and self.values is not None
        if self.keys.requires_grad:  # training: tensors in the autograd graph cannot be overwritten
            self._buffers = keys, self.values
            self._show(keys.shape[2])
        else:
            self.keys.copy_(keys)

    def rewind(self, n_tokens: int) -> None:
        """Drop the last `n_tokens` entries; the next ones overwrite them."""
        assert self.keys is not None
        self._show(self.keys.shape[2] - n_tokens)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all other rows of the batch."""
        assert self.keys is not None
        keys, values = self._buffers
        self._buffers = keys[rows], values[rows]
        self._show(self.keys.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `(batch, num_kv_heads, new, head_dim)`; return all keys and values so far."""
        assert self.keys is not None and self.values is not None
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        keys, values = self._buffers
        if end > keys.shape[2] or key_states.requires_grad or keys.requires_grad:  # buffer full, or training: copy
            self._buffers = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        else:
            keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self._show(end)
        return self.keys, self.values


class PackedCache(Cache):
    """Stands for the cache in a packed forward pass, where attention appends to the cache of each request."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values, and nothing else."""
        return key_states, value_states


class PositionedCache(DynamicCache):
    """Keys and values with rotary embedding, and the position of every entry.

    Args:
        keys: `(batch, num_kv_heads, capacity, head_dim)` per layer; the first `length` entries are filled. Layers may
            differ in capacity and length.
        values: Values, in the shapes of `keys`.
        positions: Integer positions of the filled entries, `NEVER` for padding. `(length,)` if all layers and heads
            share them; `(num_layers, num_kv_heads, length)`; or `(batch or 1, num_kv_heads or 1, length)` per layer
            if heads or rows hold different numbers of entries.
        next_position: Position of the next token.
        n_positions: Length of the sequence for which the keys were rotated; `next_position` if None.
        starts: Index of the first entry of each layer and head, if padding precedes the entries and is nowhere else.
            None if padding may be anywhere, or if there is no padding.
        bias: `(batch or 1, num_kv_heads, n)` per layer, added to the attention logits of the first `n` entries; None
            for no bias.

    Attributes:
        next_positions: `(batch,)`, position of each row's next token.
        padded: True if there may be padding among the composed entries.
        n_rows: Number of rows in the batch.
        n_composed: Number of composed entries, padding included, of the longest layer.
        composed_positions: Positions of the composed entries, in one of the shapes of `positions`.
        appended_positions: `(batch, n_appended)`, positions of the tokens prefilled since.
        appended_padding: True if there may be padding among these.
    """

    layers: list[PreallocatedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        keys: torch.Tensor | Sequence[torch.Tensor],
        values: torch.Tensor | Sequence[torch.Tensor],
        *,
        positions: torch.Tensor | Sequence[torch.Tensor],
        next_position: int,
        n_positions: int | None = None,
        starts: Sequence[Sequence[int]] | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.starts = starts
        self.bias = bias
        self.padded = not isinstance(positions, torch.Tensor)
        lengths = [positions.shape[-1]] if isinstance(positions, torch.Tensor) else [p.shape[-1] for p in positions]
        if len(lengths) == 1:
            lengths = lengths * len(keys)
        self.n_composed = max(lengths)
        self.layers = [PreallocatedLayer(k, v, n) for k, v, n in zip(keys, values, lengths, strict=True)]
        self.composed_positions = positions
        self.n_rows = keys[0].shape[0]
        self.n_positions = next_position if n_positions is None else n_positions
        self.next_positions = torch.full((self.n_rows,), next_position, device=keys[0].device)
        self.appended_positions = torch.empty(self.n_rows, 0, dtype=torch.int32, device=keys[0].device)
        self.appended_padding = False

    @property
    def without_gaps(self) -> bool:
        """Whether the next token sees every entry in front of it, but for padding before a head's first entry."""
        return self.n_rows == 1 and not self.appended_padding and (self.starts is not None or not self.padded)

    def copy(self, *, room: int) -> PositionedCache:
        """The composed entries in buffers of their own, with room for `room` more; for a cache with one row."""
        assert self.n_rows == 1 and self.appended_positions.shape[1] == 0
        buffers = []
        for index in range(len(self.layers)):
            keys, values = self.layer(index)
            length = keys.shape[2]
            firsts = [0] if self.starts is None else self.starts[index]
            heads = [slice(None)] if self.starts is None else [slice(head, head + 1) for head in range(len(firsts))]
            both = [keys.new_empty(1, keys.shape[1], length + room, keys.shape[3]) for _ in range(2)]
            for old, new in zip((keys, values), both, strict=True):
                for head, first in zip(heads, firsts, strict=True):  # padding in front is not loaded
                    new[:, head, first:length] = old[:, head, first:]
            buffers.append(both)
        made = PositionedCache(
            [keys for keys, _ in buffers],
            [values for _, values in buffers],
            positions=self.composed_positions,
            next_position=0,
            n_positions=self.n_positions,
            starts=self.starts,
            bias=self.bias,
        )
        made.next_positions = self.next_positions.clone()
        return made

    def append_positions(self, positions: torch.Tensor) -> None:
        """Record the positions of tokens about to be prefilled: `(batch, new)`, `NEVER` for padding."""
        new = positions.to(self.appended_positions)
        self.appended_positions = torch.cat([self.appended_positions, new], dim=1)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: `(batch, num_kv_heads, length, head_dim)` each, views of its buffer."""
        layer = self.layers[index]
        assert layer.keys is not None and layer.values is not None
        return layer.keys, layer.values

    def rewind(self, n_tokens: int) -> None:
        """Undo the prefill of the last `n_tokens`."""
        if n_tokens == 0:
            return
        for layer in self.layers:
            layer.rewind(n_tokens)
        self.appended_positions = self.appended_positions[:, :-n_tokens]
        self.next_positions = self.next_positions - n_tokens

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows of the batch but these, in their new order.

        A finished row would cost as much as one that is still being decoded.
        """
        index = torch.tensor(rows, device=self.next_positions.device)

        def kept(layers: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [layer[index] if layer.shape[0] > 1 else layer for layer in layers]

        for layer in self.layers:
            layer.keep_rows(index)
        composed = self.composed_positions
        if not isinstance(composed, torch.Tensor):
            self.composed_positions = kept(composed)
        self.bias = None if self.bias is None else kept(self.bias)
        self.padded |= self.n_rows > 1  # questions of a batch differ in length
        self.n_rows = len(rows)
        self.next_positions, self.appended_positions = self.next_positions[index], self.appended_positions[index]

    def rerotate(self, rope: Rope, n_positions: int) -> None:
        """Rotate the keys to the frequencies of a sequence of `n_positions`, if the frequencies depend on the length.

        A longrope model changes its frequencies in the middle of a sequence. Transformers' `generate` then prefills
        everything again. A distilled cache has no tokens to prefill, so its keys are rotated.
        """
        if self.layer(0)[0].shape[2] and rope.regime(self.n_positions) != rope.regime(n_positions):
            # 1. All keys and their positions in one flat tensor: layers may differ in length.
            keys = [self.layer(index)[0] for index in range(len(self.layers))]
            where = [self.key_positions(index).expand(key.shape[:3]) for index, key in enumerate(keys)]
            per_layer = [key.shape[:3].numel() for key in keys]
            positions = torch.cat([p.flatten() for p in where])  # (entries,)
            positions = positions.masked_fill(positions == NEVER, 0)  # padding: any valid position will do
            old = torch.cat([key.flatten(0, 2) for key in keys])  # (entries, head_dim)
            # 2. Undo the old rotation, apply the new one.
            free = rope.rotate_flat(old, positions, per_layer, n_positions=self.n_positions, inverse=True)
            turned = rope.rotate_flat(free, positions, per_layer, n_positions=n_positions).to(old.dtype)
            for layer, key, new in zip(self.layers, keys, turned.split(per_layer), strict=True):
                layer.put_keys(new.view(key.shape))
        self.n_positions = n_positions

    def key_positions(self, layer: int) -> torch.Tensor:
        """Positions of all keys of one layer: `(batch, 1 or num_kv_heads, length)`."""
        composed = self.composed_positions
        if isinstance(composed, torch.Tensor) and composed.ndim == 1:
            composed = composed[None, None]
        elif isinstance(composed, torch.Tensor) and composed.ndim == 3:
            composed = composed[layer][None]
        else:
            composed = composed[layer if len(composed) > 1 else 0]
        composed = composed.to(torch.int32).expand(self.n_rows, -1, -1)
        return torch.cat([composed, self.appended_positions[:, None].expand(-1, composed.shape[1], -1)], dim=2)

    def differs_by_layer(self, window: int | None) -> bool:
        """Whether the visible keys depend on the layer, apart from its window and from padding in front."""
        if self.starts is not None:
            return window is not None
        if isinstance(self.composed_positions, torch.Tensor):
            return window is not None and self.composed_positions.ndim == 3
        return len(self.composed_positions) > 1


@dataclass(frozen=True, eq=False)
class Prefix:
    """The shared beginning of every prompt, prefilled once and stored between runs.

    Unlike a distilled cache, it is stored with rotary embedding, because its positions never change. It is therefore
    restored bit by bit. Keys and values are `(num_layers, num_kv_heads, n_tokens, head_dim)`; for `regime` see
    `Rope.regime`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    regime: tuple[Any, ...]

    def to_bytes(self, *, key: str) -> bytes:
        """Keys and values as one safetensors file, with its storage key in the metadata."""
        return safetensors.torch.save({"keys": self.keys.cpu(), "values": self.values.cpu()}, metadata={"key": key})

    @classmethod
    def load(cls, path: Path, *, key: str, regime: tuple[Any, ...], like: torch.Tensor) -> Prefix:
        """Inverse of `to_bytes`; the file must have this storage key (the oldest have none), and keys like `like`.

        Raises:
            CorruptCacheError: The file is not a prefix of this key, shape and dtype.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(like.device)) as file:
                kept_under = (file.metadata() or {}).get("key", key)
                keys, values = file.get_tensor("keys"), file.get_tensor("values")
        except (SafetensorError, KeyError, OSError) as error:
            raise CorruptCacheError(f"not a readable prefix: {error}", where=str(path)) from error
        if kept_under != key:
            raise CorruptCacheError(f"the file has the prefix of {kept_under[:80]!r}, not of {key!r}", where=str(path))
        shape = tuple(like.shape)
        if tuple(keys.shape) != shape or tuple(values.shape) != shape or keys.dtype != like.dtype:
            raise CorruptCacheError(f"the prefix has shape {tuple(keys.shape)}, expected {shape}", where=str(path))
        return cls(keys, values, regime)
