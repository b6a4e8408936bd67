"""The entries of one document during refinement, and those of several documents side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress.refine.batching import Entries
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER


class TrainableCache:
    """Kept keys, values and biases of one document, and their offsets from the start.

    Keys are moved on their positions, rotated: probes then use them unchanged, no step pays for a rotation, and the
    rotation is removed once, at the end. Rotation preserves lengths, so the same steps would have the same size in the
    position-free frame.

    Args:
        backbone: The model.
        cache: Cache at the start.
        n_positions: Length of the sequence for which keys are rotated.
        fixed: Bool `(n_tokens,)`; tokens with entries that do not change. None for no such tokens.

    Attributes:
        counts: Number of entries of each head, `(num_layers, num_kv_heads)`, on the CPU.
        positions: Positions in the sequence, `(n_entries,)`; layer by layer and head by head.
        moves: Offsets of keys and values, in standard deviations of their layer's, `(n_entries, head_dim)` each, and
            of biases, in nats, `(n_entries, 1)`; float32, with `.grad`. All zero is exactly the start.
        next_position: Position of the first token behind the document.
    """

    def __init__(
        self, backbone: Backbone, cache: DistilledCache, *, n_positions: int, fixed: torch.Tensor | None = None
    ) -> None:
        self.cache = cache
        self._backbone = backbone
        self._n_positions = n_positions
        n_prefix, device = len(backbone.prefix_ids), backbone.device
        self.counts, inside = cache.head_counts, cache.flat_positions.to(device).long()
        self.per_layer: list[int] = self.counts.sum(1).tolist()
        self.positions = inside + n_prefix
        self.next_position = n_prefix + cache.n_tokens
        free, values = (tensor.reshape(-1, backbone.head_dim) for tensor in (cache.keys, cache.values))
        free = free.to(device, backbone.dtype)
        keys = backbone.rope.rotate_flat(free, self.positions, self.per_layer, n_positions=n_positions)
        bias = keys.new_zeros(len(keys), 1) if cache.bias is None else cache.bias.reshape(-1, 1).to(device)
        self._start = [keys, values.to(device, backbone.dtype), bias.float()]
        self._scales = [*(self._deviation(tensor) for tensor in self._start[:2]), torch.ones_like(self._start[2])]
        self._fixed = None if fixed is None or not bool(fixed.any()) else fixed.to(device)[inside][:, None]
        self.moves = [torch.zeros(tensor.shape, dtype=torch.float32, device=device) for tensor in self._start]

    def _deviation(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard deviation of each entry's layer, `(n_entries, 1)`, float32."""
        parts = tensor.float().split(self.per_layer)
        each = [part.std(correction=0).expand(len(part)) if len(part) else part.new_empty(0) for part in parts]
        return torch.cat(each)[:, None]

    def moved(self) -> list[torch.Tensor]:
        """Current keys (rotated) and values, `(n_entries, head_dim)` each, and biases `(n_entries, 1)`; float32."""
        return [
            start.float() + scale * move
            for start, scale, move in zip(self._start, self._scales, self.moves, strict=True)
        ]

    def add_gradient(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add gradients of keys, values and biases, in the shapes of `moved`, to the gradients of the moves."""
        for move, scale, gradient in zip(self.moves, self._scales, gradients, strict=True):
            change = gradient.float() * scale
            if self._fixed is not None:
                change = change.masked_fill(self._fixed, 0)
            move.grad = change if move.grad is None else move.grad + change

    def result(self) -> DistilledCache:
        """Current cache, on the device and in the dtype of the cache at the start; biases are float16."""
        keys, values, bias = self.moved()
        free = self._backbone.rope.rotate_flat(
            keys, self.positions, self.per_layer, n_positions=self._n_positions, inverse=True
        )
        like = self.cache.keys
        return replace(
            self.cache,
            keys=free.to(like).view(like.shape),
            values=values.to(like).view(like.shape),
            bias=bias.to(like.device, torch.float16).view(like.shape[:-1]),
            fingerprint=replace(self.cache.fingerprint, format_version=2),
        )


@dataclass(frozen=True, eq=False)
class TrainableCaches:
    """Several trainables side by side."""

    entries: Entries  # their current entries behind the shared prefix, each layer padded to its fullest head
    masks: list[torch.Tensor]  # by layer: bool `(trainables, num_kv_heads, n)`; True where their entries lie

    @property
    def n_entries(self) -> float:
        """Entries of a row in a layer, prefix and padding included, on average over layers."""
        return sum(key.shape[2] for key in self.entries.keys) / len(self.entries.keys)

    def leaves(self) -> Entries:
        """Return the entries with keys, values and biases as leaves of a graph.

        The moves are not the leaves: assembling the layers is the same for every batch of probes, and needs no
        backward pass.
        """
        keys, values, bias = (
            [layer.detach().requires_grad_() for layer in layers]
            for layers in (self.entries.keys, self.entries.values, self.entries.bias or ())
        )
        return replace(self.entries, keys=keys, values=values, bias=bias)

    def entries_of(self, index: int, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Entries of one trainable in tensors shaped like `entries.keys` or `entries.bias`: `(n_entries, ... or 1)`."""
        found = torch.cat([layer[index][mask[index]] for layer, mask in zip(layers, self.masks, strict=True)])
        return found.view(len(found), -1)


def side_by_side(backbone: Backbone, trainables: Sequence[TrainableCache], *, n_positions: int) -> TrainableCaches:
    """Assemble the current trainables so that rows can follow them; keys are rotated for `n_positions` in all."""
    n_prefix, device = len(backbone.prefix_ids), backbone.device
    masks = []
    for counts in torch.stack([trainable.counts for trainable in trainables], 1):  # (trainables, num_kv_heads)
        slot = torch.arange(n_prefix + int(counts.max()))  # on the CPU, as `counts`
        masks.append(((slot >= n_prefix) & (slot < n_prefix + counts[..., None])).to(device))

    def laid(of_trainables: Sequence[torch.Tensor], fill: int = 0) -> list[torch.Tensor]:
        """Entries `(n_entries, ...)` of each trainable, layer by layer: `(trainables, num_kv_heads, n, ...)`."""
        split = [part.split(own.per_layer) for part, own in zip(of_trainables, trainables, strict=True)]
        rows = [torch.cat(own) for own in zip(*split, strict=True)]
        layers = [own.new_full((*mask.shape, *own.shape[1:]), fill) for own, mask in zip(rows, masks, strict=True)]
        for layer, mask, own in zip(layers, masks, rows, strict=True):
            layer[mask] = own
        return layers

    moved = [[part.to(backbone.dtype) for part in trainable.moved()] for trainable in trainables]
    keys, values, bias = (
        laid([k for k, _, _ in moved]),
        laid([v for _, v, _ in moved]),
        laid([b[:, 0] for *_, b in moved]),
    )
    positions = laid([trainable.positions.to(torch.int32) for trainable in trainables], NEVER)
    prefix = backbone.prefix_for(n_positions)
    for layer, (key, value, where) in enumerate(zip(keys, values, positions, strict=True)):
        key[:, :, :n_prefix], value[:, :, :n_prefix] = prefix.keys[layer], prefix.values[layer]
        where[:, :, :n_prefix] = torch.arange(n_prefix, device=device)
    ends = torch.tensor([trainable.next_position for trainable in trainables], device=device)
    return TrainableCaches(Entries(keys, values, positions, ends, n_positions, bias), masks)
