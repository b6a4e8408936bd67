"""int8 quantisation of keys and values, which halves the size of a distilled cache on disk.

It is symmetric, with one scale per channel of a head's keys and one per entry's values, as in KIVI (Liu et al.,
arXiv 2402.02750): a few channels of the keys are far larger than the rest in every entry; values have no such channels.
"""

from __future__ import annotations

import torch

from kv_memory.errors import ConfigError

_TOP = 127  # -128 has no positive counterpart
# Scales are bfloat16. On caches of SQuAD paragraphs, the relative error of keys and values was 0.0047 and 0.0068 with
# float32, float16 and bfloat16 scales alike: entries are divided by the stored scale, so a rounded scale only makes the
# steps slightly wider or narrower. For every 100 bytes of a bfloat16 cache at 1/16 of the entries, where heads are
# short, int8 takes 53 with bfloat16 scales and 56 with float32 scales. Rejected: float16, which cannot represent all
# scales of a bfloat16 or float32 cache.
#
# A head of one or two entries would be smaller unquantised than with one scale per channel. Rejected: a second layout
# for such heads, which would save only another 0.4 of the 100 bytes. Heads without entries have no scales: at 1/16
# this is every second head, and saves 2.6 of the 100 bytes.
_SCALES = torch.bfloat16


def quantize(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Quantise keys and values to int8, with their scales; the same input always gives the same bits.

    The error of a number is at most half a step of its scale, or a whole step if the number is within a hundredth of
    the largest number of its dtype. Numbers below 1e-36 become 0.

    Args:
        keys: `(num_layers, num_kv_heads, n_kept, head_dim)`, or with `counts` `(n_entries, head_dim)`.
        values: Values, in the shape and dtype of `keys`.
        counts: `(num_layers, num_kv_heads)`, number of entries of each head; None if all heads have the same number.

    Returns:
        `keys` and `values`, int8; `key_scales`, bfloat16: `(num_layers, num_kv_heads, head_dim)`, or with `counts`
        `(n_nonempty_heads, head_dim)`; `value_scales`, bfloat16: the shape of `values` without its last dimension.

    Raises:
        ConfigError: A key or value is not finite.
    """
    for name, tensor in (("keys", keys), ("values", values)):
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{name} that are not finite cannot be stored as int8",
                where=name,
                next_step="Store the cache as it is (storage 'auto'), or check why the model computed them.",
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
    """Inverse of `quantize`, except for rounding; `dtype` must be the dtype before quantisation.

    Raises:
        ConfigError: Dtypes or shapes do not match, or a scale is negative, not finite, or larger than the dtype allows.
    """
    keys, values = tensors["keys"], tensors["values"]
    if keys.dtype != torch.int8 or values.dtype != torch.int8 or keys.shape != values.shape:
        raise ConfigError("keys and values must be int8 of the same shape", where="keys")
    if counts is None:
        if keys.ndim != 4:
            raise ConfigError(f"keys must have 4 dimensions, got shape {tuple(keys.shape)}", where="keys")
        expected = (*keys.shape[:2], keys.shape[3])
    else:
        if keys.ndim != 2 or counts.is_floating_point() or (counts < 0).any() or int(counts.sum()) != len(keys):
            raise ConfigError(f"counts do not match keys of shape {tuple(keys.shape)}", where="counts")
        expected = (int((counts > 0).sum()), keys.shape[1])
    key_scales = _checked(tensors, "key_scales", expected, dtype)
    value_scales = _checked(tensors, "value_scales", tuple(values.shape[:-1]), dtype)
    return (
        _multiply(keys, _over_entries(key_scales, counts), dtype),
        _multiply(values, value_scales[..., None], dtype),
    )


def _channel_peaks(keys: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Largest absolute value of each channel in each head that has entries: the shape of `key_scales`."""
    if counts is None:
        return keys.abs().amax(2)
    lengths = _lengths(counts, keys.device)
    head = torch.arange(len(lengths), device=keys.device).repeat_interleave(lengths)  # (n_entries,)
    # Rejected: `index_reduce`, which warns that it is in beta, and `segment_reduce`, which takes 14 times as long.
    peaks = keys.new_zeros(len(lengths), keys.shape[1])
    return peaks.scatter_reduce_(0, head[:, None].expand_as(keys), keys.abs(), "amax")


def _over_entries(key_scales: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Key scales in a shape that broadcasts with the keys."""
    if counts is None:
        return key_scales[:, :, None]
    return key_scales.repeat_interleave(_lengths(counts, key_scales.device), 0)


def _lengths(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Number of entries of each head that has entries, `(n_nonempty_heads,)`."""
    lengths = counts.flatten().to(device, torch.int64)
    return lengths[lengths > 0]


def _scales(peaks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # In float32, because not every dtype can represent 1/127 of its smallest number.
    scales = (peaks.float() / _TOP).clamp(max=_limit(dtype).float().item()).to(_SCALES)
    # Subnormal scales have few digits, and some processors flush them to 0.
    return torch.where(scales < torch.finfo(_SCALES).tiny, torch.zeros_like(scales), scales)


def _limit(dtype: torch.dtype) -> torch.Tensor:
    """Largest scale of a dtype: 127 times this scale, rounded to the dtype, is still finite."""
    return torch.tensor(torch.finfo(dtype).max / 128, dtype=_SCALES)


def _round(tensor: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    steps = tensor.float() / scales.float()
    # Where a scale is 0, the steps are NaN or infinite; any finite replacement will do, as it is multiplied by 0 again.
    return steps.nan_to_num(0.0, _TOP, -_TOP).round().clamp(-_TOP, _TOP).to(torch.int8)


def _multiply(steps: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Steps have 7 bits and scales 8, so their product is exact in float32. bfloat16 rounds it once, so a detour through
    # float32 would give the same result. float16 needs the detour, because it cannot represent all scales.
    through = torch.float32 if dtype == torch.float16 else dtype
    return steps.to(through).mul_(scales.to(through)).to(dtype)


def _checked(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    scales = tensors[name]
    if tuple(scales.shape) != shape or scales.dtype != _SCALES:
        raise ConfigError(
            f"{name} must be {shape} of bfloat16, got {tuple(scales.shape)} of {scales.dtype}", where=name
        )
    if not ((scales >= 0) & (scales <= _limit(dtype).to(scales.device))).all():
        raise ConfigError(f"{name} must be 0 or more, and within the range of {dtype}", where=name)
    return scales
