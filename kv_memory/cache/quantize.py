"""int8 for keys and values: how a distilled cache is made half as large on disk.

Symmetric, with one scale for each channel of a head's keys and one for each entry's values, as in KIVI (Liu et al.,
arXiv 2402.02750): a few channels of the keys are far larger than the rest in every entry, values have no such channels.
"""

from __future__ import annotations

import torch

from kv_memory.errors import ConfigError

__all__ = ["dequantize", "quantize"]

_TOP = 127  # -128 has no positive counterpart
# Scales are bfloat16. On caches of SQuAD paragraphs the relative error of keys and values was 0.0047 and 0.0068 with
# scales of float32, float16 and bfloat16 alike: entries are divided by the scale as it is stored, and one whose last
# bits were rounded only makes the steps a little wider or narrower. Of 100 bytes that bfloat16 takes at 1/16 of the
# entries, where heads are short, int8 takes 53 with such scales and 56 with float32; and float16 cannot hold what the
# scales of a bfloat16 or float32 cache may be.
#
# A head of one or two entries would be smaller as it is than with a scale for each channel. Keeping those apart would
# save another 0.4 of the 100, which is not worth a second layout. Heads that keep nothing have no scales at all: at
# 1/16 that is every second head, and 2.6 of the 100.
_SCALES = torch.bfloat16


def quantize(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Keys and values as int8, with their scales; the same input always gives the same bits.

    No entry moves by more than half a step of its scale, or where it lies within a hundredth of the largest number its
    type can hold, by a whole one. What is below 1e-36 becomes 0.

    Args:
        keys: `(num_layers, num_kv_heads, n_kept, head_dim)`, or with `counts` `(n_entries, head_dim)`.
        values: Of the same shape and type.
        counts: `(num_layers, num_kv_heads)`, entries of each head; None where all have the same number.

    Returns:
        `keys` and `values`, int8; `key_scales`, bfloat16: `(num_layers, num_kv_heads, head_dim)`, or with `counts`
        `(heads that keep any, head_dim)`; `value_scales`, bfloat16: the shape of `values` without its last dimension.

    Raises:
        ConfigError: A key or value is not finite.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{name} that are not finite cannot be stored as int8",
                where=name,
                next_step="Store the cache as it is (storage 'auto'), or look why the model made them.",
            )
    key_scales = _scales(_channel_peaks(keys, counts), keys.dtype)
    value_scales = _scales(values.abs().amax(-1), values.dtype)
    return {
        "keys": _round(keys, _over_entries(key_scales, counts)),
        "key_scales": key_scales,
        "values": _round(values, value_scales[..., None]),
        "value_scales": value_scales,
    }


def dequantize(
    tensors: dict[str, torch.Tensor], counts: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `quantize`, but for what was rounded.

    Args:
        tensors: As `quantize` returns them.
        counts: As for `quantize`.
        dtype: Of the result: the one that was quantised.

    Returns:
        Keys and values, in the shape they have as int8.

    Raises:
        ConfigError: Types or shapes do not belong together, or a scale is negative, not finite, or larger than the
            type allows.
    """
    keys, values = tensors["keys"], tensors["values"]
    if keys.dtype != torch.int8 or values.dtype != torch.int8 or keys.shape != values.shape:
        raise ConfigError("keys and values must be int8 of one shape", where="keys")
    if counts is None:
        if keys.ndim != 4:
            raise ConfigError(f"keys must have 4 dimensions, got shape {tuple(keys.shape)}", where="keys")
        expected = (*keys.shape[:2], keys.shape[3])
    else:
        if keys.ndim != 2 or counts.is_floating_point() or (counts < 0).any() or int(counts.sum()) != len(keys):
            raise ConfigError(f"counts do not belong to keys of shape {tuple(keys.shape)}", where="counts")
        expected = (int((counts > 0).sum()), keys.shape[1])
    key_scales = _checked(tensors, "key_scales", expected, dtype)
    value_scales = _checked(tensors, "value_scales", tuple(values.shape[:-1]), dtype)
    return (
        _multiply(keys, _over_entries(key_scales, counts), dtype),
        _multiply(values, value_scales[..., None], dtype),
    )


def _channel_peaks(keys: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The largest size of every channel in every head that keeps any: the shape of `key_scales`."""
    if counts is None:
        return keys.abs().amax(2)
    lengths = _lengths(counts, keys.device)
    head = torch.arange(len(lengths), device=keys.device).repeat_interleave(lengths)
    # Rather than `index_reduce`, which warns that it is in beta, or `segment_reduce`, which takes 14 times as long.
    peaks = keys.new_zeros(len(lengths), keys.shape[1])
    return peaks.scatter_reduce_(0, head[:, None].expand_as(keys), keys.abs(), "amax")


def _over_entries(key_scales: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Key scales in a shape that multiplies keys."""
    if counts is None:
        return key_scales[:, :, None]
    return key_scales.repeat_interleave(_lengths(counts, key_scales.device), 0)


def _lengths(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Entries of the heads that keep any, `(n_heads,)`."""
    lengths = counts.flatten().to(device, torch.int64)
    return lengths[lengths > 0]


def _scales(peaks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # In float32, because not every type has 1/127 of its smallest number.
    scales = (peaks.float() / _TOP).clamp(max=_limit(dtype).float().item()).to(_SCALES)
    # Subnormal scales have few digits, and some processors take them for 0.
    return torch.where(scales < torch.finfo(_SCALES).tiny, torch.zeros_like(scales), scales)


def _limit(dtype: torch.dtype) -> torch.Tensor:
    """The largest scale of a type: its 127-fold, rounded to that type, is still a number."""
    return torch.tensor(torch.finfo(dtype).max / 128, dtype=_SCALES)


def _round(tensor: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    steps = tensor.float() / scales.float()
    # Where a scale is 0, the steps are not numbers, or infinite; whatever they become, 0 times it is 0.
    return steps.nan_to_num(0.0, _TOP, -_TOP).round().clamp(-_TOP, _TOP).to(torch.int8)


def _multiply(steps: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # 7 bits times 8 are exact in float32, and bfloat16 rounds the product once: the same result without the detour. The
    # scales of float16 would not all fit it.
    through = torch.float32 if dtype == torch.float16 else dtype
    return steps.to(through).mul_(scales.to(through)).to(dtype)


def _checked(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    scales = tensors[name]
    if tuple(scales.shape) != shape or scales.dtype != _SCALES:
        raise ConfigError(
            f"{name} must be {shape} of bfloat16, got {tuple(scales.shape)} of {scales.dtype}", where=name
        )
    if not ((scales >= 0) & (scales <= _limit(dtype).to(scales.device))).all():
        raise ConfigError(f"{name} must be 0 or more, and no more than {dtype} can hold", where=name)
    return scales
