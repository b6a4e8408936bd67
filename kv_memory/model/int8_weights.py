"""int8 weights for decoding on a CPU, where a token takes as long as the weights take to come from memory.

Weights have one scale per output; activations have one per token, computed as they come. The products are oneDNN's,
through the operators that torch's compiler emits for such layers (`torch.ops.onednn`). Rejected, with figures in
docs/performance.md: torchao's tensor subclasses, whose dispatch takes longer than the products unless the model is
compiled; int4 weights, which are slower for more than one row; and FBGEMM's quantised linear, which is as fast, but
which torch will remove.

The plain weights stay, mapped from their file. Documents are prefilled with them (`Backbone.prefill`), so a cache does
not depend on how its model was loaded. Questions and answers use the int8 weights (`Backbone.logits`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from kv_memory.errors import ConfigError

# Not attributes of the modules: one thread decodes while another compresses.
_int8: ContextVar[bool] = ContextVar("kv_memory_int8", default=False)
_plain: ContextVar[bool] = ContextVar("kv_memory_plain", default=False)
_BLOCK = 1 << 24  # weights that are quantised at once: a copy of a whole language model head would take 500 MB


@contextmanager
def int8_weights() -> Iterator[None]:
    """Use the int8 weights of a model that has them, unless `plain_weights` is in force."""
    token = _int8.set(not _plain.get())
    try:
        yield
    finally:
        _int8.reset(token)


@contextmanager
def plain_weights() -> Iterator[None]:
    """Use the original weights throughout."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


class _Rows:
    """Rows of the last input as int8, and their scales: projections of the same input share them."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(n, in_features)` uint8, and `(n, 1)` float32; `x` is `(..., in_features)`."""
        last = self._last
        if last is not None and last[0] is x:
            return last[1:]
        rows = x.flatten(0, -2)
        scales = rows.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(1e-12)
        codes = rows.div(scales).add_(_ZERO_POINT + 0.5).to(torch.uint8)  # rounded: all are positive
        self._last = x, codes, scales
        return codes, scales


class Int8Linear(nn.Linear):
    """A linear layer with an int8 copy of its weights, used inside `int8_weights`; else it is the layer it was made of.

    Args:
        linear: Layer whose weight and bias it shares.
        rows: Quantised rows of the model's current input.
    """

    def __init__(self, linear: nn.Linear, rows: _Rows) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._rows = rows
        self._scales = torch.empty(self.out_features)
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
        step = max(1, _BLOCK // self.in_features)
        for start in range(0, self.out_features, step):
            block = self.weight.detach()[start : start + step].to(torch.float32, copy=True)
            scales = block.abs().amax(1).div_(127).clamp_min_(1e-12)
            codes[start : start + step] = block.div_(scales[:, None]).round_().to(torch.int8)
            self._scales[start : start + step] = scales
        # Plain attributes: as buffers, they would be part of the model's hash.
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self._bias = None if self.bias is None else self.bias.detach().float()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in the input's dtype."""
        if not _int8.get():
            return super().forward(input)
        codes, scales = self._rows.of(input)
        if len(codes) == 1:  # a single token: its scale is that of all rows, and goes into the product
            out = self._product(codes, scales.view(1), self._bias, _out_dtype(input.dtype))
        else:
            out = self._product(codes, _ONE, None, torch.float32).mul_(scales)
            out = out if self._bias is None else out.add_(self._bias)
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _product(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        options: Any = (
            1.0,
            0,
            dtype,
            "none",
            [],
            "",
        )  # scale and zero of the output, its dtype, no operation behind it
        return torch.ops.onednn.qlinear_pointwise.tensor(  # type: ignore[no-any-return]
            codes, scale, _ZERO, self._packed, self._scales, self._zeros, bias, *options
        )


# oneDNN has fast kernels for unsigned rows only; for signed ones it takes 3,000 times as long.
_ZERO_POINT = 128
_ONE, _ZERO = torch.ones(1), torch.full((1,), _ZERO_POINT)


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def add_int8_weights(model: nn.Module) -> None:
    """Replace all linear layers of a model, its language model head included, by layers with int8 weights beside them.

    Raises:
        ConfigError: The model is not on a CPU; or this processor, or this build of torch, has no exact int8 products.
    """
    _check_int8({parameter.device.type for parameter in model.parameters()})
    rows = _Rows()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child, rows))


def _check_int8(devices: set[str]) -> None:
    if devices != {"cpu"}:
        raise ConfigError(
            f"int8 weights need a CPU, and the model is on {', '.join(sorted(devices))}",
            where="weights",
            next_step="Use weights='plain' there, or device='cpu'.",
        )
    # Without VNNI, pairs of products are added in 16 bits and overflow. A list of processor flags was rejected: it
    # would have to know every processor, and which kernels oneDNN takes there.
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    try:
        with torch.no_grad(), int8_weights():
            right = bool(((Int8Linear(layer, _Rows())(torch.ones(2, 64)) - 64).abs() < 0.5).all())
        reason = "this processor has no exact int8 products"
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        right, reason = False, f"this build of torch has no int8 products ({str(error).splitlines()[0]})"
    if not right:
        raise ConfigError(f"int8 weights cannot be used: {reason}", where="weights", next_step="Use weights='plain'.")
