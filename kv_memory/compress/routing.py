"""The routed LoRA: PEFT's, with a delta that reaches only the tokens of a mask.

PEFT's activated LoRA does the same for the last tokens of a sequence; ours takes a mask. The mask comes with the
forward pass (`ForwardContext.routing`): a hook on each decoder layer fetches it, makes it visible to the projections
inside, and removes it when the layer is done. Without a mask a projection returns the frozen layer's own result
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.utils.hooks import RemovableHandle

from kv_memory.model.attention import ForwardContext

# Not an attribute of the modules: threads that decode while another thread compresses must not see its mask.
# It holds the mask of the running layer, as returned by `Routing.enter`.
MASK: ContextVar[torch.Tensor | None] = ContextVar("kv_memory_routing", default=None)


@contextmanager
def routed_with(mask: torch.Tensor | None) -> Iterator[None]:
    """Run with this mask, for code that runs part of a layer again without the hooks around it."""
    token = MASK.set(mask)
    try:
        yield
    finally:
        MASK.reset(token)


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer for `nn.Linear`, with a delta only for routed tokens, of the strength given by the mask.

    The result is the frozen layer's own without a mask, or where the delta was added in place (no gradients, bool mask
    or one strength per token).
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(batch, n, in_features)` to `(batch, n, out_features)`, in the frozen layer's dtype."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        mask = MASK.get()
        if mask is None:
            return result
        lora_a: Any = self.lora_A["default"]
        lora_b: Any = self.lora_B["default"]
        tokens, flat = x.flatten(0, -2), result.flatten(0, -2)
        rows = mask.flatten().nonzero()[:, 0] if mask.shape == x.shape[:-1] else None  # None: every token
        picked = self.lora_dropout["default"]((tokens if rows is None else tokens[rows]).to(lora_a.weight.dtype))
        delta: torch.Tensor = (lora_b(lora_a(picked)) * self.scaling["default"]).to(result.dtype)
        n_query: int | None = getattr(self, "routed_features", None)
        if mask.is_floating_point():
            strength = mask.expand(x.shape[:-1]).flatten().to(result.dtype)
            delta = delta * (strength if rows is None else strength[rows])[:, None]
        if n_query is not None:  # a fused projection (Phi-3): queries first, then keys and values, which stay unchanged
            delta = nn.functional.pad(delta[:, :n_query], (0, flat.shape[1] - n_query))
        if rows is None:
            return (flat + delta).view_as(result)
        if torch.is_grad_enabled() or not result.is_contiguous():
            return flat.index_add(0, rows, delta).view_as(result)
        flat.index_add_(0, rows, delta)  # in place: nothing else uses the frozen layer's result
        return result


def install_routing(layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Install hooks that pass the forward pass's mask to the projections inside each decoder layer."""
    handles = []
    for index, layer in enumerate(layers):

        def before(_module: nn.Module, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            context: ForwardContext | None = kwargs.get("kv_memory")
            if context is None or context.routing is None:
                MASK.set(None)
            else:
                MASK.set(context.routing.enter(index, args[0] if args else kwargs["hidden_states"]))

        def after(_module: nn.Module, args: Any, output: Any) -> None:
            MASK.set(None)

        # Hooks on the layers, not on the model: gradient checkpointing runs a layer again, possibly in another thread,
        # with its original arguments, and so finds its mask.
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, always_call=True))
    return handles
