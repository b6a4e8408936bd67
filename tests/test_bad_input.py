"""What people hand in by mistake, and what happens to them: a typed error that says what, where and the next step, and
everything that was there before still there and answerable."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory, errors
from kv_memory.compress import Adapter
from kv_memory.query import key_of
from tests.conftest import make_model, make_tokenizer
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    answerable,
    assert_says,
    open_memory,
    untouched,
    wide_backbone,
)

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, limits and users")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, wide: Any) -> Iterator[KVMemory]:
    """Shared, because nothing may happen to it; `own_memory` is for the few tests that add something after all."""
    with open_memory(tmp_path_factory.mktemp("shared") / "store", wide) as opened:
        opened.add([("ferry", FERRY), ("lamp", LAMP)])
        yield opened


@pytest.fixture
def own_memory(memory: KVMemory, tmp_path: Path) -> Iterator[KVMemory]:
    with open_memory(tmp_path / "store", memory.backbone) as opened:
        opened.add([("ferry", FERRY), ("lamp", LAMP)])
        yield opened


# -- documents ---------------------------------------------------------------------------------------------------------

GOOD = ("good", "This one would be fine.")
Row = tuple[type[errors.KVMemoryError], Any, str, str, str]
FILES: dict[str, tuple[bytes, type[errors.KVMemoryError], str, str]] = {
    "empty.txt": (b"", errors.EmptyDocumentError, "empty|no text|white space", "."),
    "blank.txt": (b" \n\t\n ", errors.EmptyDocumentError, "empty|no text|white space", "."),
    "image.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), errors.UnreadableDocumentError, "PNG", "Convert"),
    "program": (b"\x7fELF" + bytes(500), errors.UnreadableDocumentError, "ELF", "Convert"),
    "nul.txt": (b"some text\0and more", errors.UnreadableDocumentError, "NUL byte at offset 9", "utf-16-le"),
    "latin.txt": ("Der Fährmann".encode("latin-1"), errors.UnreadableDocumentError, "utf-8", "encoding"),
    "line.txt": (b"x" * 5_000_000, errors.UnreadableDocumentError, "line", "."),
}


@pytest.mark.parametrize("name", FILES)
def test_invalid_files_are_refused(memory: KVMemory, tmp_path: Path, name: str) -> None:
    data, kind, what, step = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        memory.add([GOOD, path])
    assert_says(caught.value, kind, what=what, where=str(path), step=step)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", errors.EmptyDocumentError),
        (" \n\t ", errors.EmptyDocumentError),
        ("a\0b", errors.UnreadableDocumentError),
        ("x" * 5_000_000, errors.UnreadableDocumentError),
    ],
)
def test_invalid_texts_are_refused(memory: KVMemory, text: str, kind: type[errors.KVMemoryError]) -> None:
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        memory.add([GOOD, ("bad", text)])
    assert_says(caught.value, kind, what=".", where="bad", step=".")


def test_a_missing_path_is_refused(memory: KVMemory, tmp_path: Path) -> None:
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        memory.add([GOOD, tmp_path / "nothing.txt"])
    where = str(tmp_path / "nothing.txt")
    assert_says(caught.value, errors.UnreadableDocumentError, what="no such file", where=where, step="Check the path")


def test_another_encoding_can_be_passed(own_memory: KVMemory, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Der Fährmann schläft.".encode("latin-1"))
    assert own_memory.add(path, encoding="latin-1").added == [str(path)]
    assert own_memory.document(str(path)).passages[0].text_sha256 == key_of("Der Fährmann schläft.")
    with pytest.raises(errors.ConfigError, match="klingon") as caught:
        own_memory.add(path, encoding="klingon")
    assert caught.value.where == "encoding"


def test_one_id_with_two_texts_is_refused(own_memory: KVMemory) -> None:
    with untouched(own_memory), pytest.raises(errors.KVMemoryError) as caught:
        own_memory.add([GOOD, ("twice", "One text."), ("twice", "Another text.")])
    assert_says(caught.value, errors.DocumentError, what="twice", where="twice", step="its own id")
    assert own_memory.add([("twice", "One text."), ("twice", "One text.")]).added == ["twice"]


@pytest.mark.parametrize("source", [b"bytes", {"id": "text"}, 7, None, [7]])
def test_sources_of_the_wrong_type_are_refused(memory: KVMemory, source: Any) -> None:
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        memory.add(source)
    assert_says(caught.value, errors.ConfigError, what="cannot read documents", where="source", step="path")


# -- settings, models, adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0, -1, 1.5, float("nan"), float("inf"), "x", True])
def test_keep_ratio_out_of_range_is_refused(memory: KVMemory, wide: Any, tmp_path: Path, keep_ratio: Any) -> None:
    for path in (memory.path, tmp_path / "new"):
        with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
            open_memory(path, wide, keep_ratio=keep_ratio)
        assert_says(caught.value, errors.ConfigError, what=r"\(0, 1\]", where="keep_ratio", step="0.125")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("selector", "snapkv"),
        ("layout", "sideways"),
        ("prompt", "haiku"),
        ("passage_tokens", 3),
        ("collection", ""),
        ("collection", "x" * 300),
    ],
)
def test_other_settings_out_of_range_are_refused(memory: KVMemory, wide: Any, option: str, value: Any) -> None:
    with untouched(memory), pytest.raises(errors.ConfigError) as caught:
        open_memory(memory.path, wide, **{option: value})
    assert option in (caught.value.where or "")
    assert str(value) in caught.value.what


@pytest.mark.parametrize("name", ["no-such-model", "owner/no-such-model", "./no/such/folder"])
def test_an_unknown_model_is_refused(memory: KVMemory, tmp_path: Path, name: str) -> None:
    for path in (memory.path, tmp_path / "new"):
        with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
            KVMemory.open(path, model=name)
        assert_says(caught.value, errors.ModelNotFoundError, what="no such model", where=name, step="local folder")
    assert not (tmp_path / "new").exists()


def test_a_model_folder_without_a_tokenizer_is_refused(memory: KVMemory, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        KVMemory.open(memory.path, model=tmp_path / "model")
    where = str(tmp_path / "model")
    assert_says(
        caught.value, errors.UnsupportedModelError, what="no usable tokenizer", where=where, step="tokenizer.json"
    )


def test_a_context_window_too_small_for_the_prompt_is_refused(tmp_path: Path) -> None:
    make_model("llama", max_position_embeddings=100).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(errors.ConfigError, match="context window") as caught:
        KVMemory.open(tmp_path / "store", model=tmp_path / "model", prompt="passage", selector="attention")
    assert caught.value.where == "prompt" and caught.value.next_step


def test_an_adapter_of_another_model_is_refused(memory: KVMemory, tmp_path: Path) -> None:
    other = wide_backbone(num_hidden_layers=3)
    adapter = Adapter.create(other, rank=2)
    adapter.save(tmp_path / "adapter")
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        open_memory(memory.path, memory.backbone, adapter=tmp_path / "adapter")
    where = str(tmp_path / "adapter")
    assert_says(caught.value, errors.AdapterError, what="was made for", where=where, step="train an adapter")
    with untouched(memory), pytest.raises(errors.KVMemoryError) as caught:
        open_memory(memory.path, memory.backbone, adapter=tmp_path / "nothing")
    assert_says(caught.value, errors.AdapterError, what="missing", where=str(tmp_path / "nothing"), step="folder with")


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_store_of_a_newer_version_is_refused(own_memory: KVMemory, wide: Any) -> None:
    with closing(sqlite3.connect(own_memory.path / "catalog.sqlite")) as connection:
        (ours,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
        with pytest.raises(errors.KVMemoryError) as caught:
            open_memory(own_memory.path, wide)
        assert_says(caught.value, errors.StoreError, what="9999", where=str(own_memory.path), step="Upgrade")
        connection.execute("UPDATE alembic_version SET version_num = ?", (ours,))
        connection.commit()
    with open_memory(own_memory.path, wide) as again:
        assert answerable(again, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
