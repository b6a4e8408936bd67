"""Gradient checkpointing for models that prefill into a `PositionedCache`.

Transformers' own switch was rejected: it disables the cache, and prefill exists to produce the cache. Simply rerunning
a layer was rejected too: it would append its keys twice. Here a layer becomes a function of its input and the existing
entries that returns its output and its new entries. These are appended to the cache outside the function.

Only the layer itself is rerun, not the hooks around it: routing decides once, and its mask is passed to the second run.
The scores of a scorer with input from every layer are thus computed once, with one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kv_memory.compress.routing import MASK, routed_with
from kv_memory.model.backbone import Backbone
from kv_memory.model.forward import cache_argument
from kv_memory.model.kv_cache import PositionedCache


class _OneLayer:
    """A cache of one layer that records its new entries; attention calls only `update`."""

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
def checkpointing(backbone: Backbone) -> Iterator[None]:
    """Within the block, decoder layers store only their inputs for the backward pass and recompute the rest.

    This costs a second forward pass, and reduces the memory of a long document to that of one layer. Without gradients
    (the teacher, decoding), nothing changes. It is not thread-safe: the layers of the model are wrapped within the
    block. The backward pass may come after the block.
    """
    try:
        for index, layer in enumerate(backbone.layers):
            # An instance attribute hides the class's method; `del` restores it.
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
        mask = MASK.get()

        # Not an argument of `run`: checkpoint would refuse entries behind which others were since written in place.
        past = cache.layer(index)

        def run(hidden: torch.Tensor) -> tuple[Any, ...]:
            part = _OneLayer(*past)
            with routed_with(mask):
                out = plain(hidden, *args, **{**kwargs, name: part})
            assert part.new is not None
            return out, *part.new

        # These models draw no random numbers (dropout is 0), so the random state need not be preserved.
        out, keys, values = checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
        cache.update(keys, values, index)
        return out

    return forward
