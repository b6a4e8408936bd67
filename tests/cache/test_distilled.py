from __future__ import annotations

import hashlib
import json
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
from kv_memory.cache.fingerprint import FORMATS, Fingerprint
from kv_memory.config import StorageName
from kv_memory.errors import ConfigError, CorruptCacheError, FingerprintMismatchError

FINGERPRINT = Fingerprint(
    format_version=1,
    architecture="llama",
    weights="a" * 64,
    tokenizer="b" * 64,
    prompt="c" * 64,
    prefix="d" * 64,
    method="attention|window:100",
    adapter="",
    eta=None,
    rope="e" * 64,
    dtype="float32",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
)
DTYPES = ["float32", "bfloat16", "float16"]


def make_cache(*, n_tokens: int = 40, n_kept: int = 10, per_head: bool = True, **fields: Any) -> DistilledCache:
    fingerprint = replace(FINGERPRINT, **fields)
    generator = torch.Generator().manual_seed(0)
    shape = (fingerprint.num_layers, fingerprint.num_kv_heads, n_kept)
    keys, values = (
        torch.randn(*shape, fingerprint.head_dim, generator=generator).to(dtype_from_name(fingerprint.dtype))
        for _ in range(2)
    )
    rows = torch.rand(*(shape[:2] if per_head else ()), n_tokens, generator=generator).argsort(-1)
    return DistilledCache(
        keys=keys,
        values=values,
        positions=rows[..., :n_kept].sort(-1).values,
        n_tokens=n_tokens,
        keep_ratio=n_kept / n_tokens,
        fingerprint=fingerprint,
    )


def make_ragged(*, counts: list[list[int]] | None = None, n_tokens: int = 40, **fields: Any) -> DistilledCache:
    """A cache whose heads keep different numbers of entries, one of them none."""
    fingerprint = replace(FINGERPRINT, **fields)
    of = torch.tensor(counts if counts is not None else [[3, 0], [17, 1], [2, 7]])
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(int(of.sum()), fingerprint.head_dim, generator=generator).to(dtype_from_name(fingerprint.dtype))
        for _ in range(2)
    )
    rows = [torch.randperm(n_tokens, generator=generator)[:n].sort().values for n in of.flatten().tolist()]
    return DistilledCache(
        keys=keys,
        values=values,
        positions=torch.cat(rows),
        counts=of,
        n_tokens=n_tokens,
        keep_ratio=0.125,
        fingerprint=fingerprint,
    )


def biased(cache: DistilledCache) -> DistilledCache:
    """The same with biases: format 2."""
    bias = torch.randn(cache.keys.shape[:-1], generator=torch.Generator().manual_seed(1)).half()
    return replace(cache, bias=bias, fingerprint=replace(cache.fingerprint, format_version=2))


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
    half = back.to(torch.bfloat16)
    assert half.counts is not None and half.fingerprint.dtype == "bfloat16"


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
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); from tests.cache.test_distilled import make_cache;"
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


def test_conversion_to_another_dtype() -> None:
    cache = make_cache()
    half = cache.to(torch.bfloat16)
    assert half.fingerprint == replace(cache.fingerprint, dtype="bfloat16")
    assert torch.equal(half.keys, cache.keys.bfloat16()) and torch.equal(half.values, cache.values.bfloat16())
    assert cache.to(torch.float32) is cache


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
    assert torch.equal(cache.to(torch.float16).bias, cache.bias)  # type: ignore[arg-type]


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


def loaded(cache: DistilledCache, folder: Path, storage: StorageName) -> DistilledCache:
    cache.save(folder / storage, storage=storage)
    return DistilledCache.load(folder / storage)


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


# -- damage ------------------------------------------------------------------------------------------------------------


def assert_corrupt(path: Path) -> None:
    with pytest.raises(CorruptCacheError) as caught:
        DistilledCache.load(path)
    assert caught.value.where == str(path)
    assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_corrupt(tmp_path: Path, share: float) -> None:
    data = make_cache().to_bytes()
    (tmp_path / "cache").write_bytes(data[: int(len(data) * share)])
    assert_corrupt(tmp_path / "cache")


def test_a_garbled_header_is_corrupt(tmp_path: Path) -> None:
    data = bytearray(make_cache().to_bytes())
    data[8:40] = b"\xff" * 32
    (tmp_path / "cache").write_bytes(data)
    assert_corrupt(tmp_path / "cache")


HEADERS: dict[str, Any] = {
    "none": None,
    "not_json": "{",
    "a_list": "[1]",
    "no_fingerprint": {"n_tokens": 40, "keep_ratio": 0.25},
    "fingerprint_is_a_list": {"n_tokens": 40, "keep_ratio": 0.25, "fingerprint": [1]},
    "n_tokens_is_text": {"n_tokens": "40"},
    "n_tokens_too_few": {"n_tokens": 5},
    "keep_ratio_zero": {"keep_ratio": 0},
    "fidelity_is_text": {"fidelity": "0.1"},
    "fidelity_is_no_number": {"fidelity": float("nan")},
    "steps_below_zero": {"refined_steps": -1},
    "other_shape": {"fingerprint": {"num_layers": 4}},
    "other_dtype": {"fingerprint": {"dtype": "float16"}},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_does_not_fit_the_tensors_is_corrupt(tmp_path: Path, kind: str) -> None:
    (tmp_path / "good").write_bytes(make_cache().to_bytes())
    header = {"n_tokens": 40, "keep_ratio": 0.25, "fingerprint": json.loads(FINGERPRINT.to_json())}
    change = HEADERS[kind]
    if isinstance(change, dict) and kind != "no_fingerprint" and isinstance(change.get("fingerprint", {}), dict):
        change = {**header, **change, "fingerprint": {**header["fingerprint"], **change.get("fingerprint", {})}}
    text = change if isinstance(change, str) or change is None else json.dumps(change)
    save_file(load_file(tmp_path / "good"), tmp_path / "cache", metadata=text and {"kv_memory": text})
    if kind == "fingerprint_is_a_list":
        with pytest.raises(CorruptCacheError):
            DistilledCache.load(tmp_path / "cache")
    else:
        assert_corrupt(tmp_path / "cache")


@pytest.mark.parametrize("missing", ["keys", "values", "positions"])
def test_a_file_without_one_of_the_tensors_is_corrupt(tmp_path: Path, missing: str) -> None:
    header = {"n_tokens": 40, "keep_ratio": 0.25, "fingerprint": json.loads(FINGERPRINT.to_json())}
    (tmp_path / "good").write_bytes(make_cache().to_bytes())
    tensors = {name: tensor for name, tensor in load_file(tmp_path / "good").items() if name != missing}
    save_file(tensors, tmp_path / "cache", metadata={"kv_memory": json.dumps(header)})
    assert_corrupt(tmp_path / "cache")


STORED_DAMAGE: dict[str, Any] = {
    "no_key_scales": lambda t, h: t.pop("key_scales"),
    "no_value_scales": lambda t, h: t.pop("value_scales"),
    "scale_is_no_number": lambda t, h: t["key_scales"].view(-1)[0:1].fill_(float("nan")),
    "scale_is_infinite": lambda t, h: t["value_scales"].view(-1)[0:1].fill_(float("inf")),
    "scale_is_negative": lambda t, h: t["key_scales"].neg_(),
    "scales_of_float32": lambda t, h: t.update(key_scales=t["key_scales"].float()),
    "too_few_scales": lambda t, h: t.update(key_scales=t["key_scales"][:-1].contiguous()),
    "one_scale_for_all": lambda t, h: t.update(value_scales=t["value_scales"].flatten()[:1]),
    "values_of_another_type": lambda t, h: t.update(values=t["values"].float()),
    "keys_of_another_shape": lambda t, h: t.update(keys=t["keys"][..., :-1].contiguous()),
    "both_of_another_shape": lambda t, h: t.update(
        {n: t[n][..., :-1].contiguous() for n in ("keys", "values", "key_scales")}
    ),
    "header_does_not_say_it": lambda t, h: h.pop("storage"),
    "header_says_float16": lambda t, h: h.update(storage="float16"),
    "header_says_nonsense": lambda t, h: h.update(storage="int4"),
    "header_says_a_list": lambda t, h: h.update(storage=["int8"]),
    "header_says_auto": lambda t, h: h.update(storage="auto"),
}


@pytest.mark.parametrize("make", [make_cache, make_ragged])
@pytest.mark.parametrize("kind", STORED_DAMAGE)
def test_int8_that_contradicts_its_scales_or_header_is_corrupt(
    tmp_path: Path, kind: str, make: Callable[..., DistilledCache]
) -> None:
    make().save(tmp_path / "good", storage="int8")
    DistilledCache.load(tmp_path / "good")
    tensors = load_file(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        header = json.loads(file.metadata()["kv_memory"])
    STORED_DAMAGE[kind](tensors, header)
    save_file(tensors, tmp_path / "cache", metadata={"kv_memory": json.dumps(header)})
    assert_corrupt(tmp_path / "cache")


def test_int8_with_wrong_counts_is_corrupt(tmp_path: Path) -> None:
    make_ragged().save(tmp_path / "good", storage="int8")
    tensors = load_file(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        metadata = file.metadata()
    for counts in ([[3, 0], [17, 1], [2, 8]], [[3, 0], [17, -1], [4, 7]], [[3, 0], [17, 1], [0, 9]]):
        wrong = {**tensors, "counts": torch.tensor(counts, dtype=torch.int32)}
        save_file(wrong, tmp_path / "cache", metadata=metadata)
        assert_corrupt(tmp_path / "cache")


def test_floats_of_an_unrecorded_dtype_are_corrupt(tmp_path: Path) -> None:
    make_cache().save(tmp_path / "good", storage="float16")
    tensors = load_file(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "keys": tensors["keys"].bfloat16()}, tmp_path / "cache", metadata=metadata)
    assert_corrupt(tmp_path / "cache")


def test_a_missing_file_is_not_reported_as_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DistilledCache.load(tmp_path / "nothing")


def before_torch_maps(monkeypatch: pytest.MonkeyPatch, happen: Callable[[Path], object]) -> None:
    """Something happens to the file after its header was read, and before its tensors are mapped."""
    from_file = torch.UntypedStorage.from_file

    def mapped(name: str, *args: Any, **options: Any) -> Any:
        happen(Path(name))
        return from_file(name, *args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", mapped)


def test_a_file_deleted_while_opened_is_not_reported_as_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache().save(tmp_path / "cache")
    before_torch_maps(monkeypatch, Path.unlink)
    with pytest.raises(FileNotFoundError) as caught:
        DistilledCache.load(tmp_path / "cache")
    assert caught.value.filename == str(tmp_path / "cache")


def test_torch_errors_other_than_system_errors_are_raised_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("out of memory")

    make_cache().save(tmp_path / "cache")
    before_torch_maps(monkeypatch, fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        DistilledCache.load(tmp_path / "cache")


@pytest.mark.parametrize("change", [{"format_version": FORMATS[-1] + 1}, {"new_field": 1}])
def test_another_format_version_is_a_mismatch(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "good").write_bytes(make_cache().to_bytes())
    fingerprint = {**json.loads(FINGERPRINT.to_json()), **change}
    header = {"n_tokens": 40, "keep_ratio": 0.25, "fingerprint": fingerprint}
    save_file(load_file(tmp_path / "good"), tmp_path / "cache", metadata={"kv_memory": json.dumps(header)})
    with pytest.raises(FingerprintMismatchError, match="format version") as caught:
        DistilledCache.load(tmp_path / "cache")
    assert caught.value.next_step is not None and "again" in caught.value.next_step


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


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_survives_a_round_trip_through_json() -> None:
    assert Fingerprint.from_json(FINGERPRINT.to_json()) == FINGERPRINT
    assert len(FINGERPRINT.digest) == 64
    assert replace(FINGERPRINT, eta=3).digest != FINGERPRINT.digest


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "null", "3"])
def test_an_unreadable_fingerprint_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptCacheError):
        Fingerprint.from_json(text)


def test_differences_name_both_sides() -> None:
    other = replace(FINGERPRINT, weights="f" * 64, eta=6)
    assert FINGERPRINT.differences(other) == {"weights": ("a" * 64, "f" * 64), "eta": (None, 6)}
    assert FINGERPRINT.differences(FINGERPRINT) == {}
    FINGERPRINT.check(FINGERPRINT)
    with pytest.raises(FingerprintMismatchError) as caught:
        FINGERPRINT.check(other, where="document x")
    assert "weights is aaaaaaaaaaaa in the cache, ffffffffffff loaded" in caught.value.what
    assert "eta is none in the cache, 6 loaded" in caught.value.what
    assert caught.value.where == "document x"
    assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step
