from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory import KVMemory
from kv_memory.compress import Adapter, Compressor
from kv_memory.errors import AdapterError, DocumentNotFoundError, FingerprintMismatchError, StoreError
from kv_memory.generate import Generator
from kv_memory.settings import MemorySettings
from tests.conftest import make_model, make_tokenizer
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    SETTINGS,
    answerable,
    blob_files,
    blob_of,
    cache_blobs,
    open_memory,
    wide_backbone,
)
from tests.reference import recorded_inputs

# -- opening again -----------------------------------------------------------------------------------------------------


def test_settings_are_remembered(tmp_path: Path, wide: Any) -> None:
    options: dict[str, Any] = {"keep_ratio": 0.5, "layout": "packed", "selector": "sink_recent", "passage_tokens": 40}
    with KVMemory.open(tmp_path / "store", model=wide, **options) as memory:
        memory.add(("ferry", FERRY))
        made = memory.settings
    with KVMemory.open(tmp_path / "store", model=wide) as memory:
        assert memory.settings == made
        assert (memory.settings.keep_ratio, memory.settings.layout) == (0.5, "packed")
        assert answerable(memory, FERRY_QUESTION) == ["ferry"]
        assert memory.ask(FERRY_QUESTION, settings=SETTINGS).n_cached_tokens > 11


def test_int8_is_remembered_and_answers(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "plain", wide, storage="auto") as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
        plain = memory.store.caches()
    with open_memory(tmp_path / "store", wide, storage="int8") as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
    with KVMemory.open(tmp_path / "store", model=wide) as memory:
        assert memory.settings.storage == "int8"
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        small = memory.store.caches()
        assert [info.dtype for info in small] == ["int8"] * 2
        assert [info.fingerprint for info in small] == [info.fingerprint for info in plain]
        assert sum(info.size_bytes for info in small) < sum(info.size_bytes for info in plain)
        assert memory.check().ok


def test_int8_is_the_default_only_for_smollm2() -> None:
    small = MemorySettings.resolve({}, model="smollm2")
    assert (small.model, small.storage) == ("smollm2", "int8")
    assert MemorySettings.resolve({}, model="smollm2", storage="auto").storage == "auto"
    assert MemorySettings.resolve({"storage": "bfloat16"}).storage == "bfloat16"
    assert MemorySettings.resolve({}, model="other").storage == "auto"
    # What was measured on one model says nothing about the next.
    assert MemorySettings.resolve(dataclasses.asdict(small), model="other").storage == "auto"
    assert MemorySettings.resolve(dataclasses.asdict(MemorySettings.resolve({}, model="other"))).storage == "auto"


def test_one_store_can_contain_several_storage_formats(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, storage="auto") as memory:
        memory.add(("ferry", FERRY))
    with open_memory(tmp_path / "store", wide, storage="int8") as memory:
        report = memory.add([("ferry", FERRY), ("lamp", LAMP)])
        assert (report.added, report.unchanged) == (["lamp"], ["ferry"])  # the setting is for what is added from now on
        assert [info.dtype for info in memory.store.caches()] == ["float32", "int8"]
        assert memory.refresh().n_passages == 0
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        both = memory.ask(f"{FERRY_QUESTION} {LAMP_QUESTION}", top_k=2, settings=SETTINGS)
        assert len(both.sources) == 2 and not both.fallbacks


def test_a_damaged_int8_cache_is_recreated_as_int8(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, storage="int8", keep_text=True) as memory:
        memory.add(("lamp", LAMP))
        path = blob_of(memory, "lamp")
        path.write_bytes(path.read_bytes()[:-1])
        assert memory.ask(LAMP_QUESTION, settings=SETTINGS).text
        assert [info.dtype for info in memory.store.caches()] == ["int8"]
        assert answerable(memory, LAMP_QUESTION) == ["lamp"]


def test_a_model_folder_is_remembered(tmp_path: Path) -> None:
    make_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"selector": "attention", "dtype": "float32", "device": "cpu"}
    with KVMemory.open(tmp_path / "store", model=tmp_path / "model", **options) as memory:
        assert memory.settings.passage_tokens == 1024
        memory.add(("ferry", FERRY))
        expected = memory.ask(FERRY_QUESTION, settings=SETTINGS)
    with KVMemory.open(tmp_path / "store", dtype="float32", device="cpu") as memory:
        assert memory.ask(FERRY_QUESTION, settings=SETTINGS).text == expected.text
    # A reader that needs no model loads none.
    with KVMemory.open(tmp_path / "store", load_model=False) as memory:
        assert [document.id for document in memory.documents()] == ["ferry"]
        assert memory.check().ok
        assert memory._model._backbone is None


def test_a_missing_store_is_an_error_without_create(tmp_path: Path, wide: Any) -> None:
    with pytest.raises(StoreError, match="no store"):
        open_memory(tmp_path / "store", wide, create=False)
    assert not (tmp_path / "store").exists()


def adapter_backbone(folder: Path) -> Any:
    backbone = wide_backbone()
    adapter = Adapter.create(backbone, rank=2, zero_init=False)
    adapter.save(folder)
    adapter.detach()
    return backbone


def other_weights() -> Any:
    backbone = wide_backbone()
    with torch.no_grad():
        backbone.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    return type(backbone)(backbone.model, backbone.tokenizer, prompt=backbone.prompt, name="finetuned")


CHANGES: dict[str, tuple[Callable[[Path], tuple[Any, dict[str, Any]]], type[Exception], str]] = {
    "model": (lambda _: (other_weights(), {}), FingerprintMismatchError, "weights"),
    "selector": (lambda _: (None, {"selector": "sink_recent"}), FingerprintMismatchError, "method"),
    "adapter": (lambda path: (adapter_backbone(path), {"adapter": path}), FingerprintMismatchError, "adapter"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_store_opened_with_other_settings_needs_refresh(
    memory: KVMemory, wide: Any, tmp_path: Path, kind: str
) -> None:
    make, error, named = CHANGES[kind]
    backbone, options = make(tmp_path / "adapter")
    with open_memory(memory.path, backbone or wide, **options) as other:
        for ask in (
            lambda: other.ask(FERRY_QUESTION),
            lambda: other.stream(FERRY_QUESTION),
            lambda: other.ask_many([FERRY_QUESTION], document_id="ferry"),
        ):
            with pytest.raises(error) as caught:
                ask()
            assert named in caught.value.what  # type: ignore[attr-defined]
            assert "ferry" in caught.value.where  # type: ignore[attr-defined]
            assert "kv-memory add --stale" in caught.value.next_step  # type: ignore[attr-defined]
        # What was there is still there for who opened it first.
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        report = other.refresh()
        assert sorted(report.replaced) == ["ferry", "lamp"] and report.n_passages == 2
        assert answerable(other, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        assert other.refresh().unchanged == ["ferry", "lamp"]
    # And both kinds of caches lie side by side.
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]


def test_an_adapter_is_remembered(memory: KVMemory, tmp_path: Path) -> None:
    backbone = adapter_backbone(tmp_path / "adapter")
    with open_memory(memory.path, backbone, adapter=tmp_path / "adapter") as other:
        other.refresh()
        made = other.compressor.fingerprint()
        assert other.compressor.adapter is not None
        other.compressor.adapter.detach()
    with KVMemory.open(memory.path, model=backbone) as again:
        assert again.settings.adapter == str(tmp_path / "adapter")
        assert again.compressor.fingerprint() == made
        assert answerable(again, FERRY_QUESTION) == ["ferry"]


def test_an_adapter_of_another_model_is_refused_at_opening(memory: KVMemory, tmp_path: Path) -> None:
    adapter_backbone(tmp_path / "adapter")
    with pytest.raises(AdapterError) as caught:
        open_memory(memory.path, other_weights(), adapter=tmp_path / "adapter")
    assert "finetuned" in caught.value.what and caught.value.where == str(tmp_path / "adapter")
    assert answerable(memory, FERRY_QUESTION) == ["ferry"]
    assert memory.store.settings()["adapter"] is None


# -- collections, and other writers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["other", "../../elsewhere", "a/b", "ö", ".."])
def test_collections_do_not_see_each_other(memory: KVMemory, wide: Any, name: str, tmp_path: Path) -> None:
    outside = {path for path in tmp_path.rglob("*") if memory.path not in path.parents}
    with open_memory(memory.path, wide, collection=name) as other:
        other.add(("secret", "The ferry is a secret."))
        assert [document.id for document in other.documents()] == ["secret"]
        assert answerable(other, FERRY_QUESTION) == ["secret"]
        assert answerable(memory, FERRY_QUESTION) == ["ferry"]
        with pytest.raises(DocumentNotFoundError):
            other.document("ferry")
        other.remove("secret")
    assert memory.stats().n_documents == 2
    assert {path for path in tmp_path.rglob("*") if memory.path not in path.parents} == outside


def test_changes_by_another_object_are_visible(memory: KVMemory, wide: Any) -> None:
    assert memory.retrieve("walrus") == []
    with open_memory(memory.path, wide) as other:
        other.add(("walrus", "The walrus sleeps."))
        assert answerable(memory, "What of the walrus?") == ["walrus"]
        other.add(("walrus", "The walrus swims."))
        assert memory.retrieve("walrus")[0].text == "The walrus swims."
        other.remove("walrus")
    assert memory.retrieve("walrus") == []


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_cache_is_answered_from_its_text(memory: KVMemory, wide: Any) -> None:
    path = blob_of(memory, "ferry")
    data = bytearray(path.read_bytes())
    data[-40] ^= 0xFF
    path.write_bytes(data)
    plain = Compressor(wide, selector="attention").compress(FERRY, keep_ratio=1.0)
    expected = Generator(wide).generate(FERRY_QUESTION, [plain], settings=SETTINGS)
    with open_memory(memory.path, wide) as other:
        answer = other.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
        assert answer.fallbacks == ("ferry",)
        assert answer.text == expected.text.strip()
        assert answer.n_cached_tokens == 11  # the prefix; the text was read
        assert answer.n_prompt_tokens == len(wide.encode_question(FERRY_QUESTION)) + plain.n_tokens
        assert other.stats().n_quarantined == 1
        # It was made again, so that the next question is answered from a distilled cache.
        again = other.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
        assert again.fallbacks == ()
        assert again.n_prompt_tokens == len(wide.encode_question(FERRY_QUESTION))
        assert 11 < again.n_cached_tokens < 11 + plain.n_kept
        assert answerable(other, LAMP_QUESTION) == ["lamp"]
        assert other.refresh().replaced == []
        assert answerable(other, FERRY_QUESTION) == ["ferry"]
        assert other.check().ok


def test_a_damaged_prefix_is_prefilled_again(memory: KVMemory) -> None:
    keys = {info.blob_key for info in memory.store.caches()}
    (path,) = (p for p in blob_files(memory) if hashlib.sha256(p.read_bytes()).hexdigest() not in keys)
    data = bytearray(path.read_bytes())
    data[-40] ^= 0xFF
    path.write_bytes(data)
    expected = memory.ask(FERRY_QUESTION, settings=SETTINGS)
    backbone = wide_backbone()
    for n_read in (1, 0):  # read anew, and found in order by the next who comes
        with recorded_inputs(backbone) as inputs, open_memory(memory.path, backbone) as other:
            assert [ids.shape[1] for ids in inputs] == [11] * n_read
            assert other.ask(FERRY_QUESTION, settings=SETTINGS).text == expected.text
        backbone = wide_backbone()


def test_check_finds_damage_and_adding_again_repairs_it(memory: KVMemory) -> None:
    path = blob_of(memory, "lamp")
    path.write_bytes(path.read_bytes()[:-1])
    report = memory.check()
    assert not report.ok and len(report.damaged) == 1
    assert memory.check().ok  # quarantined
    report = memory.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})])
    assert (report.replaced, report.unchanged) == (["lamp"], ["ferry"])
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]


def test_gc_removes_unreferenced_caches(memory: KVMemory, wide: Any) -> None:
    cache = Compressor(wide, selector="attention").compress("A text of no document.", keep_ratio=0.25)
    memory.store.put("0" * 64, cache)
    assert len(memory.check().unreferenced) == 1
    assert memory.gc().n_unreferenced_caches == 1
    assert cache_blobs(memory) == 2
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
