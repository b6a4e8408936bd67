"""Texts are kept only where they are asked for; what can be done without them, and what cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kv_memory import Conversation, CorruptCacheError, KVMemory, TextNotKeptError, Turn, UnreadableDocumentError
from kv_memory.query import Reference, key_of
from kv_memory.settings import MemorySettings
from kv_memory.store import PassageRecord, export_collection, import_archive
from kv_memory.store.sql.schema import CollectionRow
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    LONG,
    SETTINGS,
    answerable,
    assert_says,
    blob_of,
    open_memory,
    wide_backbone,
)
from tests.reference import recorded_inputs

WALRUS = "The walrus sleeps."


def texts_of(memory: KVMemory, document_id: str) -> list[str | None]:
    return [passage.text for passage in memory.document(document_id).passages]


def words_in(text: str) -> set[bytes]:
    return {word.encode() for word in re.findall(r"\w{4,}", text)}


def held(folder: Path, words: set[bytes]) -> set[bytes]:
    """Those of the words that some file below the folder holds, in any case."""
    everything = [path.read_bytes().lower() for path in folder.rglob("*") if path.is_file()]
    assert everything
    return {word for word in words if any(word.lower() in data for data in everything)}


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_no_file_of_the_store_contains_a_word_of_the_documents(tmp_path: Path, wide: Any) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("Zebras trample quixotic marmalade beside Wolfsburg.")
    given = ("n1", "Nobody expects xylophones or juggling ombudsmen.", {"topic": "music"})
    with open_memory(tmp_path / "store", wide) as memory:
        memory.add([folder, given, LONG])
        memory.add_passages("n2", ["Vexing gherkins.", "Sphinxes of black quartz."])
        assert memory.retrieve("Who expects xylophones?")[0].document_id == "n1"  # the index is there too
        spoken = " ".join(
            [(folder / "a.txt").read_text(), given[1], LONG, "Vexing gherkins. Sphinxes of black quartz."]
        )
        named = " ".join([*(document.id for document in memory.documents()), "music topic file text name size"])
    words = {word for word in words_in(spoken) if word.lower() not in named.lower().encode()}
    assert len(words) > 25
    assert held(tmp_path / "store", words) == set()
    # A process that has never seen the texts answers from the caches.
    backbone = wide_backbone()
    with open_memory(tmp_path / "store", backbone) as memory, recorded_inputs(backbone) as inputs:
        answer = memory.ask("Who expects xylophones?", top_k=1, settings=SETTINGS)
        assert inputs[-SETTINGS.max_new_tokens].shape[1] == len(backbone.encode_question("Who expects xylophones?"))
    assert answer.finish_reason == "length" and answer.n_cached_tokens > 11
    (source,) = answer.sources
    assert (source.document_id, source.ordinal, source.text) == ("n1", 0, None)
    assert held(tmp_path / "store", words) == set()
    # The search would find them.
    with open_memory(tmp_path / "store", wide, keep_text=True) as memory:
        memory.add([folder, given, LONG])
    assert len(held(tmp_path / "store", words)) > 20


def test_answers_are_the_same_with_and_without_texts(bare: KVMemory, memory: KVMemory) -> None:
    for question in (FERRY_QUESTION, LAMP_QUESTION, "What burned until the ferry leaves?"):
        for top_k in (1, 2):
            ours, theirs = (m.ask(question, top_k=top_k, settings=SETTINGS) for m in (bare, memory))
            assert (ours.text, ours.n_cached_tokens) == (theirs.text, theirs.n_cached_tokens)
            assert [(s.document_id, s.score) for s in ours.sources] == [
                (s.document_id, s.score) for s in theirs.sources
            ]
    (many,) = bare.ask_many([FERRY_QUESTION], document_id="ferry", settings=SETTINGS)
    assert many.text == bare.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).text
    assert many.sources[0].text is None


# -- the setting -------------------------------------------------------------------------------------------------------


def test_keep_text_is_remembered_per_collection(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_text=True) as memory:
        memory.add(("ferry", FERRY))
    with open_memory(tmp_path / "store", wide) as memory:
        memory.add(("lamp", LAMP))
        assert memory.settings.keep_text and texts_of(memory, "lamp") == [LAMP]
    with open_memory(tmp_path / "store", wide, collection="tenant") as tenant:
        tenant.add(("lamp", LAMP))
        assert not tenant.settings.keep_text and texts_of(tenant, "lamp") == [None]
    with open_memory(tmp_path / "store", wide, keep_text=False) as memory:
        memory.add(("walrus", WALRUS))
        assert [texts_of(memory, id_) for id_ in ("ferry", "walrus")] == [[FERRY], [None]]


def test_an_older_store_keeps_storing_texts() -> None:
    assert MemorySettings.resolve({"keep_ratio": 0.5}).keep_text
    assert not MemorySettings.resolve({"keep_ratio": 0.5}, keep_text=False).keep_text
    assert not MemorySettings.resolve({}).keep_text


def test_adding_again_to_an_older_store_removes_no_text(memory: KVMemory, wide: Any) -> None:
    with memory.store.catalog.write() as session:
        row = session.get_one(CollectionRow, memory.store.collection_id)
        row.settings = {name: value for name, value in row.settings.items() if name != "keep_text"}
    with open_memory(memory.path, wide) as again:
        assert again.add([("ferry", FERRY), ("new", WALRUS)]).unchanged == ["ferry"]
        assert (texts_of(again, "ferry"), texts_of(again, "new")) == ([FERRY], [WALRUS])


def test_adding_again_with_the_other_setting_keeps_or_removes_the_text(bare: KVMemory, wide: Any) -> None:
    caches, passages = bare.store.caches(), [passage.text_sha256 for passage in bare.store.passages()]
    documents = [("ferry", FERRY), ("lamp", LAMP, {"year": 1921})]
    for keep_text, kept in ((True, 1), (False, 0)):
        with open_memory(bare.path, wide, keep_text=keep_text) as memory, recorded_inputs(wide) as inputs:
            report = memory.add(documents)
            assert (report.replaced, report.n_passages, inputs) == (["ferry", "lamp"], 0, [])
            assert [summary.n_texts for summary in memory.documents()] == [kept, kept]
            assert texts_of(memory, "ferry") == [FERRY if keep_text else None]
            assert memory.add(documents).unchanged == ["ferry", "lamp"]
            assert memory.retrieve("Skarholm")[0].document_id == "ferry"
            assert [passage.text_sha256 for passage in memory.store.passages()] == passages
            assert [c.blob_key for c in memory.store.caches()] == [c.blob_key for c in caches]


def test_removing_a_text_removes_its_words_from_row_and_index(memory: KVMemory, wide: Any) -> None:
    assert memory.retrieve("Skarholm")
    with open_memory(memory.path, wide, keep_text=False) as again:
        again.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})])
        assert not again.store.index_folder.exists()
        assert texts_of(again, "ferry") == texts_of(again, "lamp") == [None]
    memory.close()
    with open_memory(memory.path, wide) as again:
        again.store.purge()  # of free pages and logs
    assert held(memory.path, {b"skarholm", b"lighthouse"}) == set()


# -- where a text is wanted --------------------------------------------------------------------------------------------


def test_answering_from_texts_that_are_not_kept_is_an_error(bare: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs, pytest.raises(TextNotKeptError) as caught:
        bare.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS, read_from="text")
    assert inputs == []
    assert_says(caught.value, TextNotKeptError, what="not kept", where="ferry, passage 0", step="--keep-text")
    with open_memory(bare.path, wide, keep_text=True) as memory:
        memory.add(("ferry", FERRY))
        assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS, read_from="text").read_from == "text"


def test_a_damaged_cache_without_text_is_an_error_until_added_again(bare: KVMemory, wide: Any) -> None:
    path = blob_of(bare, "ferry")
    path.write_bytes(path.read_bytes()[:-1])
    with open_memory(bare.path, wide) as memory:
        with pytest.raises(CorruptCacheError) as caught:
            memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
        assert_says(caught.value, CorruptCacheError, what="quarantined", where="ferry", step="add the document again")
        assert "answer from the text" not in str(caught.value)
        assert memory.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})]).replaced == ["ferry"]
        assert answerable(memory, FERRY_QUESTION) == ["ferry"] and texts_of(memory, "ferry") == [None]


def test_a_damaged_cache_is_recreated_from_the_text_in_the_reference(bare: KVMemory, wide: Any) -> None:
    path = blob_of(bare, "ferry")
    path.write_bytes(path.read_bytes()[:-1])
    with open_memory(bare.path, wide) as memory:
        asked = [Turn("user", FERRY_QUESTION)]
        reply = memory.reader.reply(asked, [Reference(key=key_of(FERRY), text=FERRY)], settings=SETTINGS).answer
        assert reply.damaged == (key_of(FERRY),)
        assert answerable(memory, FERRY_QUESTION) == ["ferry"] and texts_of(memory, "ferry") == [None]


def test_errors_do_not_contain_texts() -> None:
    secret = "the launch code is 7040 " * 4
    with pytest.raises(UnreadableDocumentError) as caught:
        PassageRecord(text=secret + "\ud800", n_tokens=1)
    assert "launch" not in str(caught.value)


# -- compressing again -------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / "long.txt", folder / "walrus.md"]
    paths[0].write_bytes(f"{LONG} Ein Zoo in München.".encode("latin-1"))
    paths[1].write_text(WALRUS)
    return paths


def test_refresh_reads_files_again(tmp_path: Path, wide: Any) -> None:
    folder = tmp_path / "folder with spaces, ä"
    long, walrus = files(folder)
    with open_memory(tmp_path / "store", wide) as memory:
        memory.add(folder, encoding="latin-1")
        before = memory.document(str(long))
        assert len(before.passages) > 2
    with open_memory(tmp_path / "store", wide, keep_ratio=0.5, passage_tokens=300) as half:
        report = half.refresh(encoding="latin-1")
        assert (report.replaced, report.errors) == ([str(long), str(walrus)], [])
        assert half.document(str(long)).passages == before.passages  # cut as it was, whatever the settings say now
        assert half.document(str(long)).metadata == before.metadata
        assert answerable(half, "walrus", "comet") == [str(walrus), str(long)]
        assert half.refresh().unchanged == [str(long), str(walrus)]


def test_refresh_reports_unreadable_documents_and_keeps_them(tmp_path: Path, wide: Any) -> None:
    long, walrus = files(tmp_path / "files")
    gone = tmp_path / "files" / "gone.txt"
    gone.write_text("A kettle sings.")
    with open_memory(tmp_path / "store", wide) as memory:
        memory.add([long, walrus, gone, ("said", FERRY)], encoding="latin-1")
        before, caches = memory.documents(), memory.store.caches()
    walrus.write_text("The walrus swims.")
    gone.unlink()
    with open_memory(tmp_path / "store", wide, keep_ratio=0.5) as half:
        report = half.refresh()  # in UTF-8
        assert (report.replaced, report.unchanged, report.n_passages) == ([], [], 0)
        why = {error.where: error.what for error in report.errors}
        assert all(type(error) is TextNotKeptError and error.next_step for error in report.errors)
        assert "not valid utf-8" in why[str(long)]
        assert "a different text" in why[str(walrus)]
        assert "no such file" in why[str(gone)]
        assert "did not come from a file" in why["said"]
        assert (half.documents(), half.store.caches()) == (before, caches)
    with open_memory(tmp_path / "store", wide, keep_ratio=0.25) as memory:
        assert answerable(memory, "walrus", FERRY_QUESTION) == [str(walrus), "said"]


def test_refresh_compresses_kept_texts_without_their_files(memory: KVMemory, wide: Any) -> None:
    with open_memory(memory.path, wide, keep_text=False) as plain:
        plain.add(("walrus", WALRUS))
    with open_memory(memory.path, wide, keep_ratio=0.5) as half:
        report = half.refresh()
        assert report.replaced == ["ferry", "lamp"] and [error.where for error in report.errors] == ["walrus"]
        assert texts_of(half, "ferry") == [FERRY]  # refreshing is not adding


def test_another_tokenizer_splits_documents_without_texts_again(tmp_path: Path, wide: Any) -> None:
    long, _ = files(tmp_path / "files")
    with open_memory(tmp_path / "store", wide) as memory:
        memory.add(long, encoding="latin-1")
        before = memory.document(str(long))
    other = wide_backbone()
    count = other.count_tokens
    other.count_tokens = lambda texts: [2 * n for n in count(texts)]
    for again in (
        lambda memory: memory.refresh(encoding="latin-1"),
        lambda memory: memory.add(long, encoding="latin-1"),
    ):
        with open_memory(tmp_path / "store", other, keep_ratio=0.5) as memory:
            memory.store.delete(before.passages[0].text_sha256)
            again(memory)
            record = memory.document(str(long))
            assert (record.content_sha256, record.metadata) == (before.content_sha256, before.metadata)
            assert not memory.store.missing(memory.compressor.fingerprint(), 0.5)
            assert answerable(memory, "comet") == [str(long)]
            assert [passage.text for passage in record.passages] == [None] * len(record.passages)
            assert len(record.passages) > len(before.passages)


# -- passages ----------------------------------------------------------------------------------------------------------


def test_keep_text_can_be_set_per_call(bare: KVMemory) -> None:
    bare.add_passages("zoo", [WALRUS, "A kettle."], keep_text=True)
    assert texts_of(bare, "zoo") == [WALRUS, "A kettle."]
    bare.add_passages("zoo", ["A comet."], extend=True)
    assert texts_of(bare, "zoo") == [WALRUS, "A kettle.", None]
    assert bare.add_passages("zoo", ["A comet."], extend=True).unchanged == ["zoo"]
    assert bare.add_passages("zoo", ["A comet."], extend=True, keep_text=True).n_passages == 0
    assert texts_of(bare, "zoo") == [WALRUS, "A kettle.", "A comet."]
    bare.add_passages("zoo", [WALRUS], extend=True)
    assert texts_of(bare, "zoo") == [None, "A kettle.", "A comet."]
    assert bare.add_passages("zoo", [WALRUS, "A kettle.", "A comet."]).replaced == ["zoo"]
    assert texts_of(bare, "zoo") == [None] * 3
    assert [hit.ordinal for hit in bare.retrieve("kettle")] == [1]


def test_passages_can_be_dropped_by_key(bare: KVMemory) -> None:
    bare.add_passages("zoo", [WALRUS, "A kettle."])
    bare.add_passages("zoo", ["A comet."], extend=True, drop=[key_of(WALRUS)])
    keys = [passage.text_sha256 for passage in bare.document("zoo").passages]
    assert keys == [key_of("A kettle."), key_of("A comet.")]
    bare.add_passages("zoo", [], extend=True, drop=keys[:1], metadata={"n": 1})
    record = bare.document("zoo")
    assert ([passage.text_sha256 for passage in record.passages], record.metadata) == (keys[1:], {"n": 1})
    assert len(bare.store.caches()) == 3 and bare.check().ok


def test_a_document_without_texts_or_caches_can_be_extended(bare: KVMemory) -> None:
    bare.add_passages("zoo", [WALRUS])
    bare.store.delete(key_of(WALRUS))
    report = bare.add_passages("zoo", ["A kettle."], extend=True)
    assert (report.replaced, report.n_passages) == (["zoo"], 1)
    assert bare.add_passages("zoo", ["A kettle."], extend=True).unchanged == ["zoo"]
    assert [error.where for error in bare.refresh().errors] == ["zoo"]


def test_a_conversation_keeps_its_texts(bare: KVMemory) -> None:
    old = Conversation(bare, "alice")
    said = Turn("user", "My dog is called Biscuit.")
    old.add([said])
    assert old.turns() == [said]
    assert [passage.text for passage in old._memory.store.passages()] == [f"User: {said.text}"]
    assert texts_of(bare, "ferry") == [None]


def test_collections_without_texts_can_be_exported_and_merged(bare: KVMemory, wide: Any, tmp_path: Path) -> None:
    export_collection(bare.store, tmp_path / "bare.tar")
    with open_memory(tmp_path / "elsewhere", wide) as memory:
        memory.add(("walrus", "The walrus leaves."))
        import_archive(tmp_path / "bare.tar", memory.store)
        assert answerable(memory, "walrus", "Skarholm", LAMP_QUESTION) == ["walrus", "ferry", "lamp"]
        assert {hit.document_id for hit in memory.retrieve("What leaves?", top_k=9)} == {"walrus", "ferry"}
    with open_memory(tmp_path / "fresh", wide, load_model=False) as memory:
        import_archive(tmp_path / "bare.tar", memory.store)
        assert {hit.document_id for hit in memory.retrieve("What leaves?", top_k=9)} == {"ferry"}
    assert held(tmp_path, {b"skarholm", b"lighthouse"}) == set()
