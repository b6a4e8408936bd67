from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError, DocumentNotFoundError, EmptyDocumentError, UnreadableDocumentError
from kv_memory.ingest.pipeline import AddProgress
from kv_memory.query import key_of
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    LONG,
    answerable,
    cache_blobs,
    open_memory,
    untouched,
)
from tests.reference import recorded_inputs

WALRUS, KETTLE, COMET = "The walrus sleeps.", "The kettle sings.", "The comet returns."


def texts_of(memory: KVMemory, document_id: str) -> list[str]:
    return [passage.text for passage in memory.document(document_id).passages]


def cached(memory: KVMemory) -> set[str]:
    return {info.text_sha256 for info in memory.store.caches()}


# -- passages cut by others --------------------------------------------------------------------------------------------


def test_passages_are_stored_as_given(memory: KVMemory, wide: Any) -> None:
    told: list[AddProgress] = []
    texts = [f"  {WALRUS}\n", LONG]  # the second is far longer than a passage of this store
    with recorded_inputs(wide) as inputs:
        report = memory.add_passages("zoo", texts, metadata={"page": 3}, on_progress=told.append)
    assert len(inputs) == report.n_passages == len(told) == 2
    assert report.added == ["zoo"] and report.replaced == report.unchanged == []
    assert texts_of(memory, "zoo") == texts
    record = memory.document("zoo")
    assert [passage.n_tokens for passage in record.passages] == wide.count_tokens(texts)
    assert record.metadata == {"page": 3}
    assert report.n_tokens == record.n_tokens + 2 * 6  # the wrappers
    assert (told[-1].document_id, told[-1].n_tokens) == ("zoo", record.n_tokens)
    assert answerable(memory, "What of the walrus?", FERRY_QUESTION) == ["zoo", "ferry"]


def test_unchanged_passages_are_not_compressed_again(memory: KVMemory, wide: Any) -> None:
    metadata = {"pages": (1, 2)}  # JSON knows no tuples
    memory.add_passages("zoo", [WALRUS, KETTLE], metadata=metadata)
    revision = memory.store.revision
    with recorded_inputs(wide) as inputs:
        report = memory.add_passages("zoo", [WALRUS, KETTLE], metadata=metadata)
    assert inputs == [] and report.unchanged == ["zoo"] and report.added == report.replaced == []
    assert memory.store.revision == revision


def test_new_passages_replace_the_old_ones_and_their_caches(memory: KVMemory, wide: Any) -> None:
    memory.add_passages("zoo", [WALRUS, KETTLE])
    with recorded_inputs(wide) as inputs:
        report = memory.add_passages("zoo", [KETTLE, COMET])
    assert len(inputs) == 1 and report.replaced == ["zoo"]
    assert texts_of(memory, "zoo") == [KETTLE, COMET]
    assert cached(memory) == {key_of(text) for text in (FERRY, LAMP, KETTLE, COMET)}
    assert cache_blobs(memory) == 4
    assert memory.add_passages("zoo", [COMET, KETTLE]).replaced == ["zoo"]  # their order is theirs as well
    assert texts_of(memory, "zoo") == [COMET, KETTLE]


def test_changed_metadata_needs_no_forward_pass(memory: KVMemory, wide: Any) -> None:
    memory.add_passages("zoo", [WALRUS], metadata={"page": 1})
    with recorded_inputs(wide) as inputs:
        assert memory.add_passages("zoo", [WALRUS], metadata={"page": 2}).replaced == ["zoo"]
        assert memory.document("zoo").metadata == {"page": 2}
        assert memory.add_passages("zoo", [WALRUS]).replaced == ["zoo"]
        assert memory.document("zoo").metadata == {}
    assert inputs == []


def test_extend_keeps_existing_passages(memory: KVMemory, wide: Any) -> None:
    assert memory.add_passages("zoo", [WALRUS], metadata={"page": 1}, extend=True).added == ["zoo"]
    with recorded_inputs(wide) as inputs:
        report = memory.add_passages("zoo", [COMET, WALRUS, KETTLE], extend=True)
        assert len(inputs) == 2 and report.replaced == ["zoo"]
        assert memory.add_passages("zoo", [KETTLE], extend=True).unchanged == ["zoo"]
        assert len(inputs) == 2
    assert texts_of(memory, "zoo") == [WALRUS, COMET, KETTLE]
    assert memory.document("zoo").metadata == {"page": 1}
    memory.add_passages("zoo", [KETTLE], metadata={"page": 2}, extend=True)
    assert memory.document("zoo").metadata == {"page": 2}
    # A document that was read from its text may be extended as well.
    memory.add_passages("ferry", [COMET], extend=True)
    assert texts_of(memory, "ferry") == [FERRY, COMET]


def test_concurrent_extends_lose_nothing(memory: KVMemory) -> None:
    texts = [f"Passage number {number}." for number in range(6)]
    together = threading.Barrier(len(texts))

    def extend(text: str) -> None:
        together.wait()
        memory.add_passages("zoo", [text], extend=True)

    threads = [threading.Thread(target=extend, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts_of(memory, "zoo")) == texts
    assert all(memory.reader.has(text) for text in texts)


def test_a_repeated_text_is_stored_once(memory: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        memory.add_passages("zoo", [WALRUS, KETTLE, WALRUS, FERRY])  # the last is in another document, too
    assert len(inputs) == 2
    assert texts_of(memory, "zoo") == [WALRUS, KETTLE, FERRY]
    memory.remove("zoo")
    assert cached(memory) == {key_of(FERRY), key_of(LAMP)}


def test_missing_caches_are_recreated(memory: KVMemory, wide: Any) -> None:
    for again in (lambda: memory.add_passages("zoo", [WALRUS, KETTLE]), memory.refresh):
        memory.add_passages("zoo", [WALRUS, KETTLE])
        memory.store.delete(key_of(KETTLE))
        with recorded_inputs(wide) as inputs:
            assert again().replaced == ["zoo"]
        assert len(inputs) == 1
        assert answerable(memory, "What of the kettle?") == ["zoo"]


def test_gc_and_check_keep_added_passages(memory: KVMemory) -> None:
    memory.add_passages("zoo", [WALRUS, KETTLE])
    assert memory.check().ok and memory.check().unreferenced == ()
    assert memory.gc().n_unreferenced_caches == 0
    assert cache_blobs(memory) == 4
    assert answerable(memory, "What of the walrus?") == ["zoo"]


def test_settings_are_remembered(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_ratio=0.5) as memory:
        memory.add_passages("zoo", [WALRUS])
    with KVMemory.open(tmp_path / "store", model=wide) as memory:
        assert memory.settings.keep_ratio == 0.5
        assert answerable(memory, "What of the walrus?") == ["zoo"]


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([], EmptyDocumentError),
        ([WALRUS, ""], EmptyDocumentError),
        ([WALRUS, " \n"], EmptyDocumentError),
        ([WALRUS, "a\0b"], UnreadableDocumentError),
        ([WALRUS, "half \ud83d"], UnreadableDocumentError),
        ([WALRUS, 7], ConfigError),
        (WALRUS, ConfigError),  # would be a passage for every letter
    ],
)
def test_invalid_passages_are_refused(memory: KVMemory, texts: Any, error: type[Exception]) -> None:
    for document_id, extend in (("zoo", False), ("ferry", False), ("ferry", True)):
        with untouched(memory), pytest.raises(error) as caught:
            memory.add_passages(document_id, texts, extend=extend)
        assert caught.value.where in (document_id, "texts")  # type: ignore[attr-defined]


def test_metadata_that_is_not_json_is_refused(memory: KVMemory) -> None:
    with untouched(memory), pytest.raises(ConfigError, match="JSON"):
        memory.add_passages("zoo", [WALRUS], metadata={"when": object()})


# -- collections beside each other -------------------------------------------------------------------------------------


def test_collections_share_the_model(memory: KVMemory, wide: Any) -> None:
    other = memory.in_collection("tenant")
    assert other.backbone is memory.backbone is wide and other.compressor is memory.compressor
    assert other is memory.in_collection("tenant")
    assert memory.in_collection(memory.collection) is memory
    assert (other.collection, other.path, other.settings) == ("tenant", memory.path, memory.settings)


def test_collections_have_their_own_documents(memory: KVMemory, wide: Any) -> None:
    other = memory.in_collection("tenant")
    assert other.documents() == [] and other.retrieve(FERRY_QUESTION) == []
    with recorded_inputs(wide) as inputs:
        other.add([("ferry", "The ferry is a secret."), ("walrus", WALRUS)])
        assert len(inputs) == 2  # not the prefix, which was read already
    assert answerable(other, FERRY_QUESTION) == ["ferry"]
    assert {hit.document_id for hit in other.retrieve("ferry lamp walrus oil")} == {"ferry", "walrus"}
    assert [document.id for document in memory.documents()] == ["ferry", "lamp"]
    assert texts_of(memory, "ferry") == [FERRY]
    with pytest.raises(DocumentNotFoundError):
        memory.document("walrus")
    other.remove("ferry")
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]


def test_another_collection_persists_when_the_store_is_reopened(memory: KVMemory, wide: Any) -> None:
    memory.in_collection("tenant", keep_ratio=0.5).add(("walrus", WALRUS))
    memory.close()
    with KVMemory.open(memory.path, model=wide, collection="tenant") as again:
        assert again.settings.keep_ratio == 0.5
        assert answerable(again, "What of the walrus?") == ["walrus"]


def test_collections_can_have_their_own_keep_ratio(memory: KVMemory) -> None:
    half = memory.in_collection("tenant", keep_ratio=0.5)
    assert (half.settings.keep_ratio, memory.settings.keep_ratio) == (0.5, 0.25)
    half.add(("walrus", WALRUS))
    assert [info.keep_ratio for info in half.store.caches()] == [0.5]
    same = memory.in_collection(memory.collection, keep_ratio=0.5)
    assert same is not memory and [document.id for document in same.documents()] == ["ferry", "lamp"]
    with pytest.raises(ConfigError, match="keep_ratio"):
        memory.in_collection("tenant", keep_ratio=0)
    with pytest.raises(ConfigError, match="name"):
        memory.in_collection("")


def test_closing_the_memory_closes_its_collections(memory: KVMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    other = memory.in_collection("tenant")
    inner = other.in_collection("tenant of a tenant")
    closed: list[str] = []
    for one in (memory, other, inner):
        monkeypatch.setattr(
            one.store, "close", lambda one=one, close=one.store.close: (closed.append(one.collection), close())
        )
    memory.close()
    assert sorted(closed) == ["default", "tenant", "tenant of a tenant"]
