"""Files that are damaged, or that contradict themselves, are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import FORMATS
from kv_memory.errors import CorruptCacheError, FingerprintMismatchError
from tests.cache.samples import FINGERPRINT, make_cache, make_ragged


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
