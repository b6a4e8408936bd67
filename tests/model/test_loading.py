from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from kv_memory.errors import KVMemoryError, ModelNotFoundError, UnsupportedModelError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import SUPPORTED
from kv_memory.model.loading import best_dtype, hash_weight_files
from tests.conftest import ARCHITECTURES, make_model, make_tokenizer


def load(name: Path | str, **options: Any) -> Backbone:
    return Backbone.load(name, **{"dtype": "float32", "device": "cpu", **options})


def failure(name: Path | str, kind: type[KVMemoryError]) -> KVMemoryError:
    with pytest.raises(kind) as caught:
        load(name)
    assert type(caught.value) is kind
    assert caught.value.where == str(name)
    assert caught.value.next_step
    return caught.value


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_loads_from_a_folder(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    backbone = load(tmp_path)
    assert backbone.config.model_type in SUPPORTED
    assert (backbone.num_layers, backbone.num_heads, backbone.num_kv_heads) == (4, 6, 2)
    assert backbone.head_dim == backbone.prefix.keys.shape[-1]
    assert backbone.kv_bytes_per_token == 2 * 4 * 2 * backbone.head_dim * 4
    ids = torch.tensor([[70, 80, 90, 100]])
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    # What a loaded model is in memory and on disk must not differ by more than the hash of its weights.
    again = Backbone(make_model(name), backbone.tokenizer, weights_sha256=backbone.weights_sha256)
    assert again.fingerprint(method="m") == backbone.fingerprint(method="m")


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_unsupported_architectures_are_rejected_before_loading_weights(kind: str, tmp_path: Path) -> None:
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"read me and fail")
    error = failure(tmp_path, UnsupportedModelError)
    assert kind in error.what
    assert error.next_step is not None and all(name in error.next_step for name in SUPPORTED.values())
    with pytest.raises(UnsupportedModelError, match=kind) as caught:
        Backbone(model, make_tokenizer(), name="mine")
    assert caught.value.where == "mine"
    assert caught.value.next_step is not None and all(name in caught.value.next_step for name in SUPPORTED.values())


def test_an_unknown_model_type_is_unsupported(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    failure(folder, UnsupportedModelError)


@pytest.mark.parametrize("name", ["no/such/folder", "owner/no-such-model", "no-such-model", "not a name!", "../x"])
def test_unknown_names_are_not_found(name: str) -> None:
    failure(name, ModelNotFoundError)


@pytest.mark.parametrize("content", [None, "", "{not json", "[]", "{}"])
def test_a_missing_or_garbled_config_is_rejected(folder: Path, content: str | None) -> None:
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(content)
    with pytest.raises((ModelNotFoundError, UnsupportedModelError)) as caught:
        load(folder)
    assert caught.value.where == str(folder)
    assert caught.value.next_step


@pytest.mark.parametrize("spoil", ["missing", "empty", "tokenizer_config_only"])
def test_a_folder_without_a_usable_tokenizer_is_rejected(folder: Path, spoil: str) -> None:
    (folder / "tokenizer.json").unlink()
    if spoil == "missing":
        (folder / "tokenizer_config.json").unlink()
    elif spoil == "empty":
        (folder / "tokenizer.json").write_text("")
    error = failure(folder, UnsupportedModelError)
    assert error.next_step is not None and "tokenizer.json" in error.next_step


def test_a_folder_without_weights_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "safetensors" in str(failure(folder, ModelNotFoundError).next_step)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in str(failure(folder, ModelNotFoundError).next_step)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_weights_are_rejected(folder: Path, share: float) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    assert "could not be read" in failure(folder, ModelNotFoundError).what


def test_weights_with_a_missing_tensor_are_rejected(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layers.2.self_attn.k_proj" in failure(folder, ModelNotFoundError).what


def test_weights_of_other_shapes_are_rejected(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    failure(folder, ModelNotFoundError)


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_the_hash_covers_the_weights_rather_than_the_files(folder: Path, tmp_path: Path) -> None:
    whole = hash_weight_files(folder)
    make_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert hash_weight_files(tmp_path / "shards") == whole

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert hash_weight_files(folder) != whole


def test_hashes_are_remembered_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))
    first = hash_weight_files(folder)
    notes = list((tmp_path / "cache" / "hashes").iterdir())
    assert [note.suffix for note in notes] == [".json"]
    # The note is what is used: change it and see.
    note = json.loads(notes[0].read_text())
    note["tensors"]["lm_head.weight"] = "0" * 64
    notes[0].write_text(json.dumps(note))
    assert hash_weight_files(folder) != first
    notes[0].write_text("{damaged")
    assert hash_weight_files(folder) == first


def test_an_unwritable_cache_folder_is_not_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hash_weight_files(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "file" / "cache"))
    assert hash_weight_files(folder) == first


# -- dtype and device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(model_folder: Path, dtype: str) -> None:
    backbone = load(model_folder, dtype=dtype)
    assert str(backbone.dtype) == f"torch.{dtype}"
    assert backbone.fingerprint(method="m").dtype == dtype
    assert backbone.prefix.keys.dtype == backbone.dtype
    assert backbone.weights_sha256 == hash_weight_files(model_folder)  # of the files, whatever they are read as


def test_auto_dtype_depends_on_the_processor(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert best_dtype("cpu") == expected
        assert load(model_folder, dtype="auto").dtype == expected


def test_an_unknown_dtype_is_rejected(model_folder: Path) -> None:
    with pytest.raises(KVMemoryError, match="float8"):
        load(model_folder, dtype="float8")
