"""int8: how far entries move, and which tensors are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_memory.cache.quantize import dequantize, quantize
from kv_memory.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def there_and_back(
    keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    stored = quantize(keys, values, counts)
    return stored, *dequantize(stored, counts, keys.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(original: torch.Tensor, back: torch.Tensor, peaks: torch.Tensor) -> None:
    """Within half a step of the scale its peak asks for, and the rounding of the type."""
    info = torch.finfo(original.dtype)
    assert back.dtype == original.dtype and back.isfinite().all()
    step = peaks.double() / 127 * (1 + 2**-8)  # a scale is rounded to bfloat16
    at_the_top = peaks.double() > 127 / 128 * info.max  # where it may not be rounded up
    allowed = torch.where(at_the_top, peaks.double() / 128, step / 2)
    allowed = allowed + peaks.double() * info.eps + info.smallest_normal * info.eps + 127 * 1.2e-38
    assert ((original.double() - back.double()).abs() <= allowed).all()


def key_peaks(keys: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Head by head, in a loop."""
    if counts is None:
        return keys.abs().amax(2, keepdim=True).expand_as(keys)
    parts = keys.abs().split(counts.flatten().tolist())
    return torch.cat([p.amax(0, keepdim=True).expand_as(p) if len(p) else p for p in parts])


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    top = torch.finfo(dtype).max
    sizes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-7, 1e-3, 1.0, 300.0, top / 1e4, top * 0.995, top])
    return st.one_of(sizes, sizes.map(lambda size: -size), st.floats(-10, 10, width=32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dtype = draw(st.sampled_from(DTYPES))
    heads, width = (draw(st.integers(1, 2)), draw(st.integers(1, 3))), draw(st.integers(1, 4))
    counts, shape = None, (*heads, draw(st.integers(1, 5)), width)
    if draw(st.booleans()):
        n = heads[0] * heads[1]
        lengths = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
        counts, shape = torch.tensor(lengths).reshape(heads), (sum(lengths), width)  # type: ignore[assignment]
    size = torch.Size(shape).numel()
    keys, values = (
        torch.tensor(draw(st.lists(numbers(dtype), min_size=size, max_size=size)), dtype=torch.float64)
        .to(dtype)
        .reshape(shape)
        for _ in range(2)
    )
    return keys, values, counts


@settings(deadline=None, max_examples=100)
@given(cases())
def test_no_entry_changes_by_more_than_half_a_step(case: tuple[Any, Any, Any]) -> None:
    keys, values, counts = case
    stored, new_keys, new_values = there_and_back(keys, values, counts)
    assert_near(keys, new_keys, key_peaks(keys, counts))
    assert_near(values, new_values, values.abs().amax(-1, keepdim=True).expand_as(values))
    for name in ("keys", "values"):
        assert stored[name].dtype == torch.int8 and int(stored[name].min()) >= -127
    again = quantize(keys, values, counts)
    assert all(torch.equal(stored[name], again[name]) for name in stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_per_channel_for_keys_and_per_entry_for_values(dtype: torch.dtype) -> None:
    keys, values = randn(3, 2, 10, 8, dtype=dtype), randn(3, 2, 10, 8, dtype=dtype, seed=1)
    keys[..., 5] *= 100  # a channel that is large in every entry costs the others nothing
    values[:, :, 4] *= 100  # nor does an entry
    stored, new_keys, new_values = there_and_back(keys, values)
    assert stored["key_scales"].shape == (3, 2, 8) and stored["value_scales"].shape == (3, 2, 10)
    others = [channel for channel in range(8) if channel != 5]
    assert (new_keys - keys)[..., others].abs().max() < 0.02
    assert (new_values - values)[:, :, [i for i in range(10) if i != 4]].abs().max() < 0.02
    # Every channel and every entry uses the whole range.
    assert (stored["keys"].abs().amax(2) == 127).all() and (stored["values"].abs().amax(-1) == 127).all()


def test_heads_without_entries_have_no_scales() -> None:
    counts = torch.tensor([[3, 0], [1, 0]])
    keys, values = randn(4, 8), randn(4, 8, seed=1)
    stored, new_keys, _ = there_and_back(keys, values, counts)
    assert stored["key_scales"].shape == (2, 8)
    # Each head is as if it were alone.
    for rows in (slice(0, 3), slice(3, 4)):
        _, alone, _ = there_and_back(keys[rows][None, None], values[rows][None, None])
        assert torch.equal(new_keys[rows], alone[0, 0])


def test_ragged_and_rectangular_forms_quantise_equally() -> None:
    keys, values = randn(3, 2, 10, 8), randn(3, 2, 10, 8, seed=1)
    even, ragged = (
        quantize(keys, values, None),
        quantize(keys.flatten(0, 2), values.flatten(0, 2), torch.full((3, 2), 10)),
    )
    for name in even:
        assert torch.equal(even[name].flatten(), ragged[name].flatten())


def test_a_single_entry_is_restored_almost_exactly() -> None:
    keys = randn(1, 1, 1, 64)  # its channels are their own peaks
    _, back, _ = there_and_back(keys, keys)
    assert torch.allclose(back, keys, rtol=2**-8, atol=0)


def test_zeros_stay_zero() -> None:
    keys, values = randn(2, 2, 5, 4), torch.zeros(2, 2, 5, 4)
    keys[:, :, :, 2] = 0
    stored, new_keys, new_values = there_and_back(keys, values)
    assert not new_keys[..., 2].any() and not new_values.any()
    assert not stored["value_scales"].any() and new_keys[..., 0].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_non_finite_tensors_are_rejected(name: str, wrong: float) -> None:
    tensors = {"keys": randn(2, 2, 5, 4), "values": randn(2, 2, 5, 4)}
    tensors[name][1, 0, 3, 2] = wrong
    with pytest.raises(ConfigError, match="not finite") as caught:
        quantize(**tensors, counts=None)
    assert caught.value.where == name and "auto" in (caught.value.next_step or "")


EVEN, RAGGED = None, torch.tensor([[3, 0], [1, 2]])
DAMAGE: list[tuple[torch.Tensor | None, dict[str, Any], str]] = [
    (EVEN, {"keys": torch.zeros(2, 2, 5, 4)}, "keys"),
    (EVEN, {"values": torch.zeros(2, 2, 5, 4)}, "keys"),
    (EVEN, {"values": torch.zeros(2, 2, 4, 4, dtype=torch.int8)}, "keys"),
    (EVEN, {"keys": torch.zeros(6, 4, dtype=torch.int8), "values": torch.zeros(6, 4, dtype=torch.int8)}, "keys"),
    (EVEN, {"key_scales": torch.ones(2, 2, 3).bfloat16()}, "key_scales"),
    (EVEN, {"key_scales": torch.ones(2, 2, 1).bfloat16()}, "key_scales"),
    (EVEN, {"key_scales": torch.ones(2, 2, 4)}, "key_scales"),
    (EVEN, {"value_scales": torch.ones(2, 2, 1).bfloat16()}, "value_scales"),
    (EVEN, {"value_scales": torch.ones(2, 2, 5).half()}, "value_scales"),
    (RAGGED, {"key_scales": torch.ones(4, 4).bfloat16()}, "key_scales"),
    (RAGGED, {"value_scales": torch.ones(5).bfloat16()}, "value_scales"),
    (RAGGED, {"counts": torch.tensor([[3, 0], [1, 3]])}, "counts"),
    (RAGGED, {"counts": torch.tensor([[3, 0], [-1, 4]])}, "counts"),
    (RAGGED, {"counts": torch.tensor([[3.0, 0.0], [1.0, 2.0]])}, "counts"),
    (RAGGED, {"keys": torch.zeros(1, 6, 4, dtype=torch.int8)}, "keys"),
    *(
        (counts, {name: wrong}, name)
        for counts in (EVEN, RAGGED)
        for name in ("key_scales", "value_scales")
        for wrong in (float("nan"), float("inf"), -1.0, 1e4)
    ),
]


@pytest.mark.parametrize(("counts", "change", "where"), DAMAGE)
def test_inconsistent_tensors_are_rejected(counts: torch.Tensor | None, change: dict[str, Any], where: str) -> None:
    shape = (2, 2, 5, 4) if counts is None else (6, 4)
    stored = quantize(randn(*shape, dtype=torch.float16), randn(*shape, dtype=torch.float16), counts)
    dequantize(stored, counts, torch.float16)
    for name, wrong in change.items():
        if name == "counts":
            counts = wrong
        elif isinstance(wrong, float):
            stored[name].view(-1)[-1] = wrong
        else:
            stored[name] = wrong
    with pytest.raises(ConfigError) as caught:
        dequantize(stored, counts, torch.float16)
    assert caught.value.where == where
