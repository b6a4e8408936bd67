"""Strings from outside: names, ids, paths and metadata that no database or file system takes are refused at once."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_memory import Conversation, Document, KVMemory, KVMemoryError, Reference, Turn
from kv_memory.conversation import _locks
from tests.memories import open_memory

HALF = "half \ud83d emoji"

CALLS: dict[str, Callable[[KVMemory, str], Any]] = {
    "collection": lambda memory, bad: memory.in_collection(bad),
    "new store": lambda memory, bad: KVMemory.open(memory.path / "new", collection=bad, load_model=False),
    "conversation": Conversation,
    "turn": lambda memory, bad: Conversation(memory, "c").add([Turn("user", bad)]),
    "document": lambda memory, bad: memory.document(bad),
    "remove": lambda memory, bad: memory.remove(bad),
    "remove path": lambda memory, bad: memory.remove(Path(bad)),
    "add id": lambda memory, bad: memory.add((bad, "text")),
    "add path": lambda memory, bad: memory.add(memory.path / bad),
    "metadata": lambda memory, bad: memory.add(("id", "text", {"key": bad} if "\0" not in bad else {"key": {1}})),
    "source": lambda memory, bad: memory.add(Document(id="id", text="text", source_uri=bad)),
    "passages": lambda memory, bad: memory.add_passages(bad, ["text"]),
    "passage": lambda memory, bad: memory.add_passages("id", [bad]),
    "ask_many": lambda memory, bad: memory.ask_many(["Why?"], document_id=bad),
    "reference": lambda memory, bad: Reference.parse(bad),
    "reference's collection": lambda memory, bad: memory.reader.reply(
        [Turn("user", "Why?")], [Reference(key="0" * 64, collection=bad)]
    ),
}


@pytest.mark.parametrize("bad", [HALF, "a\0b"], ids=["surrogate", "nul"])
@pytest.mark.parametrize("call", CALLS)
def test_names_that_cannot_be_stored_are_refused(memory: KVMemory, call: str, bad: str) -> None:
    with pytest.raises(KVMemoryError):
        CALLS[call](memory, bad)


def test_a_question_with_half_a_surrogate_pair_is_no_failure_of_retrieval(memory: KVMemory) -> None:
    assert memory.retrieve(HALF) == []
    assert not memory.reader.has(HALF)


@pytest.mark.parametrize("name", ["docs", "docs/", "./docs", "docs/../docs"])
def test_a_text_that_names_a_folder_is_refused(
    memory: KVMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    with pytest.raises(KVMemoryError, match="is the name of a folder") as caught:
        memory.add(name)
    assert f"Pass Path({name!r})" in str(caught.value.next_step)
    assert memory.add([("words", name)]).added == ["words"]
    assert len(memory.add([name, "Another text."], on_error="skip").errors) == 1


def test_a_text_that_names_a_file_is_added_with_a_remark(
    memory: KVMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("The ferry leaves at seven.")
    (note,) = memory.add("notes.md").notes
    assert "pass Path('notes.md')" in note


def test_a_file_whose_name_is_not_utf8_is_added_listed_refreshed_and_removed(tmp_path: Path, wide: Any) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 #1?.md"))
    try:
        path.write_text("The cafe on the quay opens at nine.")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open_memory(tmp_path / "store", wide, keep_text=False) as memory:
        (id_,) = memory.add(path).added
        assert id_.endswith("/caf\\xe9 #1?.md")
        assert [summary.id for summary in memory.documents()] == [id_]
        half = memory.in_collection(memory.collection, keep_ratio=0.5)
        assert half.refresh().replaced == [id_]
        memory.remove(path)
        assert memory.documents() == []


def test_sessions_that_come_and_go_are_forgotten(memory: KVMemory) -> None:
    held = memory.in_collection("held")
    gone = [weakref.ref(memory.in_collection(f"session {number}")) for number in range(200)]
    for number in range(200):
        Conversation(memory, f"session {number}").recall("Why?")
    gc.collect()
    assert sum(ref() is not None for ref in gone) <= 64
    assert len(_locks[memory]) <= 1
    assert memory.in_collection("held") is held
