"""Gradient checkpointing for models that read into a `PositionedCache`.

Transformers' own switch cannot be used: it takes the cache away, and keys and values are what our reading is for. Nor
can a layer simply be run again: it would append its keys twice. Here a layer becomes a function of its input and the
entries already there, which returns its output and its new entries; those are put into the cache outside.

Only the inside of a layer is run again, not the hooks around it: routing decides once, and the mask it gave is handed
to the second run. So the scores of a scorer that looks into every layer are made once too, with one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kv_memory.compress.routing import current_mask, routed_with
from kv_memory.model.backbone import Backbone, cache_argument
from kv_memory.model.kv_cache import PositionedCache

__all__ = ["checkpointing"]


class _OneLayer:
    """A cache of one layer that remembers what is new; `update` is all that attention calls."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._past = keys, values
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones last: `(batch, num_kv_heads, seq_len, head_dim)` each."""
        self.new = key_states, value_states
        return torch.cat([self._past[0], key_states], 2), torch.cat([self._past[1], value_states], 2)


@contextmanager
def checkpointing(backbone: Backbone, *, enabled: bool = True) -> Iterator[None]:
    """Inside, decoder layers keep their inputs for the backward pass and make the rest again.

    Costs a second forward pass, and makes the memory of a long document that of one layer. Without gradients (the
    teacher, decoding) nothing changes. One thread at a time: the layers of the model are wrapped meanwhile. The
    backward pass may come after the block has ended.

    Args:
        backbone: Whose layers are wrapped.
        enabled: False does nothing.
    """
    if not enabled:
        yield
        return
    try:
        for index, layer in enumerate(backbone.layers):
            # An attribute of the instance hides the method of the class, and `del` brings it back.
            layer.forward = _checkpointed(layer.forward, index)
        yield
    finally:
        for layer in backbone.layers:
            if "forward" in vars(layer):
                del layer.forward


def _checkpointed(plain: Callable[..., Any], index: int) -> Callable[..., Any]:
    name = cache_argument(plain)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(name)
        if not torch.is_grad_enabled() or not isinstance(cache, PositionedCache):
            return plain(hidden_states, *args, **kwargs)
        mask = current_mask()

        def run(hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
            part = _OneLayer(keys, values)
            with routed_with(mask):
                out = plain(hidden, *args, **{**kwargs, name: part})
            assert part.new is not None
            return out, *part.new

        past_keys, past_values = cache.layer(index)
        # No random numbers are drawn in these models (dropout is 0), so their state need not be kept.
        out, keys, values = checkpoint(
            run, hidden_states, past_keys, past_values, use_reentrant=False, preserve_rng_state=False
        )
        cache.update(keys, values, index)
        return out

    return forward
