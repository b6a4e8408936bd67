from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kv_memory.cache.distilled import DistilledCache, dtype_from_name, dtype_name
from kv_memory.config import StorageName
from kv_memory.errors import ConfigError, CorruptCacheError
from tests.cache.samples import DTYPES, FINGERPRINT, biased, loaded, make_cache, make_ragged

# -- writing and reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_cache_loads_bit_for_bit(tmp_path: Path, dtype: str, per_head: bool) -> None:
    cache = make_cache(dtype=dtype, per_head=per_head)
    cache.keys[0, 0, 0, :3] = torch.tensor([float("inf"), -0.0, 1e-7])
    cache.save(tmp_path / "cache")
    back = DistilledCache.load(tmp_path / "cache")
    for name in ("keys", "values"):
        ours, theirs = getattr(cache, name), getattr(back, name)
        assert theirs.dtype == ours.dtype == dtype_from_name(dtype)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(back.positions.long(), cache.positions.long())
    assert (back.n_tokens, back.keep_ratio, back.fingerprint) == (40, 0.25, cache.fingerprint)
    assert back.per_head == per_head
    assert back.to_bytes() == cache.to_bytes()


def test_refinement_steps_and_fidelity_are_saved(tmp_path: Path) -> None:
    make_cache().save(tmp_path / "plain")
    replace(make_cache(), refined_steps=12, fidelity=0.25).save(tmp_path / "refined")
    plain, refined = (DistilledCache.load(tmp_path / name) for name in ("plain", "refined"))
    assert (plain.refined_steps, plain.fidelity) == (0, None)
    assert (refined.refined_steps, refined.fidelity) == (12, 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_may_keep_different_numbers_of_entries(tmp_path: Path, dtype: str) -> None:
    cache = make_ragged(dtype=dtype)
    cache.save(tmp_path / "cache")
    back = DistilledCache.load(tmp_path / "cache")
    assert back.counts is not None and back.counts.tolist() == [[3, 0], [17, 1], [2, 7]]
    assert torch.equal(back.keys, cache.keys) and torch.equal(back.values, cache.values)
    assert torch.equal(back.positions.long(), cache.positions)
    assert (back.n_kept, back.span, back.per_head) == (5, 17, True)
    assert back.to_bytes() == cache.to_bytes()
    assert back.theory_bytes == 2 * 30 * 8 * dtype_from_name(dtype).itemsize


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([[3, 0], [17, 1], [2, 8]])},
        {"counts": torch.tensor([[3, 0], [17, 1], [9, 0.0]])},
        {"counts": torch.tensor([[3, 0, 17], [1, 2, 7]])},
        {"counts": torch.tensor([[-3, 6], [17, 1], [2, 7]])},
        {"counts": torch.zeros(3, 2, dtype=torch.int64)},
        {"n_tokens": 16},
        {"keys": torch.zeros(29, 8)},
        {"values": torch.zeros(30, 8).half()},
        {"positions": torch.zeros(29, dtype=torch.int64)},
        {"positions": torch.zeros(30)},
        {"keep_ratio": 0.0},
    ],
)
def test_inconsistent_ragged_tensors_are_rejected(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        replace(make_ragged(), **change)
    if "keep_ratio" not in change and "n_tokens" not in change:  # as a file: damage, not a mistake of the caller
        make_ragged().save(tmp_path / "cache")
        tensors = load_file(tmp_path / "cache")
        with safe_open(tmp_path / "cache", framework="pt") as file:
            metadata = file.metadata()
        save_file({**tensors, **change}, tmp_path / "cache", metadata=metadata)
        with pytest.raises(CorruptCacheError):
            DistilledCache.load(tmp_path / "cache")


def test_the_same_cache_gives_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); from tests.cache.samples import make_cache;"
        "print(hashlib.sha256(make_cache().to_bytes()).hexdigest())"
    )
    here = hashlib.sha256(make_cache().to_bytes()).hexdigest()
    assert hashlib.sha256(make_cache().to_bytes()).hexdigest() == here
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[2])],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    make_cache().save(path)
    cache = DistilledCache.load(path)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in mapped]
    for tensor in (cache.keys, cache.values, cache.positions):
        assert any(first <= tensor.data_ptr() < last for first, last in ranges)


@pytest.mark.parametrize(("n_tokens", "dtype"), [(32_767, torch.int16), (32_768, torch.int32)])
def test_positions_use_four_bytes_only_if_needed(tmp_path: Path, n_tokens: int, dtype: torch.dtype) -> None:
    cache = make_cache(n_tokens=n_tokens)
    cache.positions[0, 0, -1] = n_tokens - 1
    cache.save(tmp_path / "cache")
    back = DistilledCache.load(tmp_path / "cache")
    assert back.positions.dtype == dtype
    assert torch.equal(back.positions.long(), cache.positions.long())


@pytest.mark.parametrize("per_head", [False, True])
def test_a_file_is_little_larger_than_its_keys_and_values(per_head: bool) -> None:
    cache = make_cache(n_tokens=4096, n_kept=512, per_head=per_head, head_dim=64, dtype="bfloat16", num_layers=30)
    assert cache.theory_bytes == 2 * 30 * 2 * 512 * 64 * 2
    assert cache.theory_bytes < len(cache.to_bytes()) <= 1.02 * cache.theory_bytes


def test_size_bytes_equals_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    make_cache().save(tmp_path / "cache")
    cache = DistilledCache.load(tmp_path / "cache")
    tensors = load_file(tmp_path / "cache").values()
    assert cache.size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- biases: format 2 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_cache, make_ragged])
@pytest.mark.parametrize("storage", ["auto", "float32", "bfloat16", "float16", "int8"])
def test_biases_are_saved_unchanged(tmp_path: Path, storage: StorageName, make: Callable[..., DistilledCache]) -> None:
    cache = biased(make())
    back = loaded(cache, tmp_path, storage)
    assert cache.bias is not None and back.bias is not None and torch.equal(back.bias, cache.bias)
    assert back.fingerprint == cache.fingerprint and back.fingerprint.format_version == 2
    assert cache.to_bytes(storage=storage) == cache.to_bytes(storage=storage)
    assert len(cache.to_bytes(storage=storage)) > len(make().to_bytes(storage=storage))
    assert cache.size_bytes == make().size_bytes + 2 * cache.bias.numel()


def test_a_cache_of_format_2_may_have_no_biases(tmp_path: Path) -> None:
    plain = replace(make_cache(), fingerprint=replace(FINGERPRINT, format_version=2))
    assert loaded(plain, tmp_path, "auto").bias is None


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(3, 2, 9).half(),
        torch.zeros(60).half(),
        torch.zeros(3, 2, 10),
        torch.zeros(3, 2, 10).int(),
        torch.full((3, 2, 10), torch.nan).half(),
        torch.full((3, 2, 10), -torch.inf).half(),
    ],
)
def test_invalid_biases_are_rejected(bias: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bias"):
        replace(biased(make_cache()), bias=bias)
    biased(make_cache()).save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(tmp_path / "cache"), "bias": bias}, tmp_path / "cache", metadata=metadata)
    with pytest.raises(CorruptCacheError):
        DistilledCache.load(tmp_path / "cache")


def test_biases_in_a_cache_of_format_1_are_rejected() -> None:
    with pytest.raises(ConfigError, match="format 1"):
        replace(make_cache(), bias=torch.zeros(3, 2, 10).half())


# -- stored in another type --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_cache, make_ragged])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_loads_in_the_dtype_of_the_model(tmp_path: Path, dtype: str, make: Callable[..., DistilledCache]) -> None:
    cache = make(dtype=dtype)
    back = loaded(cache, tmp_path, "int8")
    for name in ("keys", "values"):
        ours, theirs = getattr(cache, name), getattr(back, name)
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        error = (theirs.double() - ours.double()).norm() / ours.double().norm()
        assert 0 < error < 0.01
    assert torch.equal(back.positions.long(), cache.positions.long())
    assert (back.n_tokens, back.keep_ratio, back.fingerprint) == (40, cache.keep_ratio, cache.fingerprint)
    assert (back.counts is None) == (cache.counts is None) and back.span == cache.span
    assert cache.to_bytes(storage="int8") == cache.to_bytes(storage="int8") != cache.to_bytes()
    tensors = load_file(tmp_path / "int8")
    assert tensors["keys"].dtype == tensors["values"].dtype == torch.int8


@pytest.mark.parametrize("make", [make_cache, make_ragged])
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_in_another_float_type_is_a_cast(
    tmp_path: Path, dtype: str, storage: Any, make: Callable[..., DistilledCache]
) -> None:
    cache = make(dtype=dtype)
    back = loaded(cache, tmp_path, storage)
    stored = dtype_from_name(storage)
    assert torch.equal(back.keys, cache.keys.to(stored).to(cache.keys.dtype))
    assert torch.equal(back.values, cache.values.to(stored).to(cache.keys.dtype))
    assert back.fingerprint == cache.fingerprint
    assert load_file(tmp_path / storage)["keys"].dtype == stored
    assert (cache.to_bytes(storage=storage) == cache.to_bytes()) == (storage == dtype)


def test_default_storage_writes_the_same_bytes_as_before() -> None:
    cache = make_cache()
    numbers = torch.arange(cache.keys.numel()).reshape(cache.keys.shape) / 8
    rows = torch.arange(0, 40, 4).expand(3, 2, 10)
    data = replace(cache, keys=numbers, values=-numbers, positions=rows).to_bytes()
    assert hashlib.sha256(data).hexdigest() == "49057189a52ab639b36e4f9b19c606eb7e5a9763f25d36a1bc592a886d90c330"


@pytest.mark.parametrize("ragged", [False, True])
def test_int8_takes_about_half_of_bfloat16(ragged: bool) -> None:
    fields = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "dtype": "bfloat16"}
    if ragged:
        counts = [[64, 0, 128]] * 30
        cache = make_ragged(counts=counts, n_tokens=256, **fields)
    else:
        cache = make_cache(n_tokens=256, n_kept=64, **fields)
    assert len(cache.to_bytes(storage="int8")) <= 0.525 * len(cache.to_bytes())


def test_int8_is_smaller_than_bfloat16_from_three_entries_per_head() -> None:
    fields = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "dtype": "bfloat16"}
    three = make_cache(n_kept=3, **fields)
    assert len(three.to_bytes(storage="int8")) < len(three.to_bytes())


@pytest.mark.parametrize(
    ("dtype", "storage", "wrong"),
    [
        ("float32", "int8", float("inf")),
        ("bfloat16", "int8", float("nan")),
        ("bfloat16", "float16", 1e6),
        ("float32", "bfloat16", 3.4028e38),
        ("float16", "bfloat16", 65504.0),  # bfloat16 has it as 65,536, which float16 does not hold
    ],
)
def test_numbers_outside_the_range_of_the_storage_are_rejected(dtype: str, storage: Any, wrong: float) -> None:
    cache = make_cache(dtype=dtype)
    cache.values[0, 1, 2, 3] = wrong
    with pytest.raises(ConfigError) as caught:
        cache.to_bytes(storage=storage)
    assert caught.value.where == "values" and "'auto'" in (caught.value.next_step or "")


def test_an_unknown_storage_is_rejected() -> None:
    with pytest.raises(ConfigError, match="unknown storage 'int4'") as caught:
        make_cache().to_bytes(storage="int4")  # type: ignore[arg-type]
    assert "int8" in (caught.value.next_step or "")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        ("keys", {"keys": torch.zeros(3, 2, 10)}),
        ("keys", {"keys": torch.zeros(2, 3, 10, 8)}),
        ("keys", {"keys": torch.zeros(3, 2, 10, 8, dtype=torch.float16)}),
        ("values", {"values": torch.zeros(3, 2, 9, 8)}),
        ("values", {"values": torch.zeros(3, 2, 10, 8, dtype=torch.float64)}),
        ("positions", {"positions": torch.zeros(9, dtype=torch.int32)}),
        ("positions", {"positions": torch.zeros(2, 3, 10, dtype=torch.int32)}),
        ("positions", {"positions": torch.zeros(10)}),
        ("keys", {"n_tokens": 9}),
        ("keep_ratio", {"keep_ratio": 0.0}),
        ("keep_ratio", {"keep_ratio": 1.5}),
    ],
)
def test_tensors_of_a_wrong_shape_are_rejected(where: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(make_cache(), **fields)
    assert caught.value.where == where


def test_dtype_names() -> None:
    assert [dtype_name(dtype_from_name(name)) for name in DTYPES] == DTYPES
    with pytest.raises(ConfigError, match="float8") as caught:
        dtype_from_name("float8")
    assert caught.value.next_step is not None and "bfloat16" in caught.value.next_step
