"""What `embedded` stands for, and stores from the time when it stood for smollm2."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kv_memory import DecodeSettings, KVMemory
from kv_memory.cli import app
from kv_memory.compress import Adapter
from kv_memory.errors import AdapterError, TransferError
from kv_memory.jobs import JobSettings, Ledger
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN, _say_second_choice, adapter_folder, default_model
from kv_memory.settings import MemorySettings
from kv_memory.store import DocumentRecord, PassageRecord, Store, copy_collection

FERRY = "The captain of the ferry to Skarholm is Agnes Holm, who has sailed it since 2009."
QUESTION = "Who is the captain of the ferry?"
OLD = {"model": "embedded", "adapter": "shipped", "keep_ratio": 0.25, "passage_tokens": 256, "storage": "int8"}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Marks a built-in model as prepared, in a cache folder where none is yet."""
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))
    _say_second_choice.cache_clear()

    def mark(name: str) -> None:
        BUILT_IN[name].folder.mkdir(parents=True)
        (BUILT_IN[name].folder / "model.safetensors").touch()

    return mark


def test_a_new_store_uses_qwen_or_warns_that_it_uses_smollm2(
    prepared: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    # None is prepared: the first choice, whose error says how to get it.
    assert default_model() is BUILT_IN["qwen-0.5b"] and MemorySettings.resolve({}).model == "qwen-0.5b"
    assert caplog.messages == []
    prepared("smollm2")
    for given in ({}, {"model": "embedded"}):
        settings = MemorySettings.resolve({}, **given)
        assert (settings.model, settings.adapter, settings.passage_tokens) == ("smollm2", "shipped", 256)
        assert (settings.storage, settings.top_k) == ("int8", 1)
    (message,) = caplog.messages  # once
    assert message.startswith("using the model smollm2") and "kv-memory models --prepare qwen-0.5b" in message
    prepared("qwen-0.5b")
    for given in ({}, {"model": "embedded"}):
        settings = MemorySettings.resolve({}, **given)
        assert (settings.model, settings.adapter, settings.passage_tokens) == ("qwen-0.5b", None, 1024)
        assert (settings.storage, settings.top_k) == ("auto", 1)
    assert {MemorySettings(model=name).top_k for name in ("qwen-1.5b", "owner/name")} == {3}
    assert len(caplog.messages) == 1


def test_a_store_keeps_its_model_when_another_is_prepared_later(prepared: Callable[[str], None]) -> None:
    prepared("smollm2")
    first = MemorySettings.resolve({})
    prepared("qwen-0.5b")
    for given in ({}, {"model": "embedded"}, {"model": "smollm2"}):
        assert MemorySettings.resolve(dataclasses.asdict(first), **given) == first
    other = MemorySettings.resolve(dataclasses.asdict(first), model="qwen-0.5b")
    assert (other.model, other.adapter, other.storage) == ("qwen-0.5b", None, "auto")
    # `embedded`, where the store has another model: what a new store takes.
    assert MemorySettings.resolve({"model": "owner/name"}, model="embedded").model == "qwen-0.5b"


@pytest.mark.parametrize("stored", [OLD, {"keep_ratio": 0.25}, {**OLD, "model": "smollm2"}])
@pytest.mark.parametrize("given", [{}, {"model": "embedded"}, {"model": "smollm2"}])
def test_settings_of_the_old_default_resolve_to_smollm2(
    stored: dict[str, Any], given: dict[str, Any], prepared: Callable[[str], None]
) -> None:
    prepared("qwen-0.5b")
    settings = MemorySettings.resolve(stored, **given)
    expected = {**OLD, "model": "smollm2", "keep_text": True}
    assert settings == MemorySettings(**expected) and settings.top_k == 1


def test_settings_of_the_old_default_are_copied_as_smollm2(tmp_path: Path) -> None:
    def filled(place: Store, settings: dict[str, Any]) -> None:
        place.update_settings(settings)
        place.put_document(
            DocumentRecord(id="a", content_sha256="0" * 64, passages=(PassageRecord(text="a", n_tokens=1),))
        )

    with Store.open(tmp_path / "store", collection="old") as old:
        filled(old, OLD)
        new = old.in_collection("new")
        assert copy_collection(old, new).n_added == 1
        assert new.settings() == {**OLD, "model": "smollm2"}
        assert copy_collection(new, old).n_unchanged == 1  # not refused: the settings are the same
        other = old.in_collection("other")
        filled(other, {**OLD, "model": "qwen-0.5b"})
        with pytest.raises(TransferError, match=r'model is "smollm2" there, "qwen-0\.5b" here'):
            copy_collection(old, other)


def test_an_old_job_continues_with_smollm2(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        Ledger(store).create("old", sources={"items": []}, settings=JobSettings(memory=OLD))
        assert Ledger(store).job("old").settings.memory == {**OLD, "model": "smollm2"}


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A store with one document, as a package left it that called smollm2 `embedded`."""
    if not BUILT_IN["smollm2"].is_prepared:
        pytest.skip("smollm2 is not prepared (`make setup`)")
    path = tmp_path / "store"
    with KVMemory.open(path, model="smollm2", dtype="float32", device="cpu") as memory:
        memory.add(("ferry", FERRY))
    with closing(sqlite3.connect(path / "catalog.sqlite")) as catalog, catalog:
        (stored,) = catalog.execute("SELECT settings FROM collection").fetchone()
        settings = {**json.loads(stored), "model": "embedded"}
        catalog.execute("UPDATE collection SET settings = ?", [json.dumps(settings)])
    return path


@pytest.mark.slow
def test_a_store_of_the_old_default_continues_with_smollm2(old_store: Path) -> None:
    listed = json.loads(CliRunner().invoke(app, ["stats", "--store", str(old_store), "--json"]).stdout)
    assert (listed["settings"]["model"], listed["n_caches"]) == ("smollm2", 1)
    with KVMemory.open(old_store, dtype="float32", device="cpu") as memory:
        settings = memory.settings
        assert (settings.model, settings.adapter, settings.passage_tokens) == ("smollm2", "shipped", 256)
        assert (settings.storage, settings.top_k, memory.backbone.name) == ("int8", 1, "smollm2")
        answer = memory.ask(QUESTION, settings=DecodeSettings(max_new_tokens=8))
        assert "Agnes Holm" in answer.text and not answer.fallbacks
        assert answer.n_prompt_tokens < 30  # the text was not read
        report = memory.add([("ferry", FERRY), ("lamp", "The lamp burned whale oil until 1921.")])
        assert (report.unchanged, report.added, report.replaced) == (["ferry"], ["lamp"], [])
        assert memory.refresh().n_passages == 0 and memory.check().ok
        assert [document.id for document in memory.documents()] == ["ferry", "lamp"]
        assert len({info.fingerprint for info in memory.store.caches()}) == 1
    with closing(sqlite3.connect(old_store / "catalog.sqlite")) as catalog:
        (stored,) = catalog.execute("SELECT settings FROM collection").fetchone()
    assert json.loads(stored)["model"] == "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN["qwen-0.5b"].is_prepared, reason="qwen-0.5b is not prepared (`make setup`)")
def test_qwen_answers_in_a_few_words_from_a_store(tmp_path: Path) -> None:
    with KVMemory.open(tmp_path / "store", dtype="float32", device="cpu", keep_ratio=0.5) as memory:
        assert (memory.settings.model, memory.backbone.prompt.name) == ("qwen-0.5b", "brief")
        memory.add([("ferry", FERRY), ("lamp", "The lamp burned whale oil until 1921.")])
        assert "Agnes Holm" in memory.ask(QUESTION, settings=DecodeSettings(max_new_tokens=16)).text
        assert memory.store.settings()["model"] == "qwen-0.5b"
        with pytest.raises(AdapterError, match="made for smollm2") as caught:
            Adapter.load(adapter_folder("shipped"), memory.backbone)
    assert caught.value.next_step is not None and caught.value.next_step.startswith("Load smollm2")


@pytest.mark.slow
@pytest.mark.usefixtures("only_smollm2")
def test_the_default_model_is_loaded_under_its_name() -> None:
    assert Backbone.load(dtype="float32", device="cpu").name == "smollm2"
