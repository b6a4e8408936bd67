"""Reading a document only up to a layer: what the scorer looks at costs that much and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kv_memory.errors import ModelError
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

__all__ = ["hidden_after"]


def hidden_after(
    backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, *, layer: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Run only the first `layer` decoder layers and return what comes out of the last of them.

    Args:
        backbone: The model that reads.
        ids: `(batch, n)` token ids, padded on the right.
        cache: Is used up to `layer`; must not be used afterwards.
        layer: How many layers to run, at least 1.
        lengths: `(batch,)` real tokens per row; all of them if None.

    Returns:
        `(batch, n, hidden_size)`, of the model's dtype.

    Raises:
        ModelError: The model has no such layer.
    """
    if not 1 <= layer <= backbone.num_layers:
        raise ModelError(f"layer must lie in 1 to {backbone.num_layers}, got {layer}", where=backbone.name)
    caught: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _EnoughRead

    # Leaving by an exception runs exactly the layers asked for on every architecture. Cutting `decoder.layers` short
    # was rejected: it changes the model under the feet of other threads. Under the lock, because the hook would stop a
    # forward pass of another thread as well.
    with backbone.lock:
        handle = backbone.layers[layer - 1].register_forward_hook(stop)
        try:
            backbone.read(ids, cache, lengths=lengths)
        except _EnoughRead:
            pass
        finally:
            handle.remove()
    return caught[0]


class _EnoughRead(Exception):  # noqa: N818 (no error)
    """Leaves a forward pass once the wanted layer has run."""
