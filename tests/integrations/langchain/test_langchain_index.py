"""KVMemoryIndex beyond LangChain's standard suites: what `index` adds, changes and deletes."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index

from kv_memory import ConfigError, KVMemory, errors
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryIndex
from kv_memory.query import key_of
from tests.memories import FERRY, LAMP, cache_blobs, open_memory
from tests.reference import recorded_inputs

KIOSK = "The kiosk on the quay sells waffles."


@pytest.fixture
def manager() -> InMemoryRecordManager:
    manager = InMemoryRecordManager(namespace="docs")
    manager.create_schema()
    return manager


def texts(memory: KVMemory) -> list[str]:
    return sorted(passage.text for passage in memory.store.passages())


def test_indexing_keeps_caches_in_sync(memory: KVMemory, manager: InMemoryRecordManager, wide: Any) -> None:
    documents = [
        Document(page_content=f"Note {i}.", metadata={"source": f"{i}.txt", "pages": [i, None], "deep": {"a": 1.5}})
        for i in range(4)
    ]

    def run(*wanted: Document) -> dict[str, int]:
        found = index(list(wanted), manager, kv_index, cleanup="full", key_encoder="sha256")
        return {name: n for name, n in found.items() if n}

    with open_memory(memory.path.parent / "empty", wide) as own:
        kv_index = KVMemoryIndex(own)
        assert run(*documents[:3]) == {"num_added": 3}
        assert texts(own) == ["Note 0.", "Note 1.", "Note 2."] and cache_blobs(own) == 3
        found = kv_index.get([summary.id for summary in own.documents()])
        assert sorted((d.page_content, repr(d.metadata)) for d in found) == [
            (d.page_content, repr(d.metadata)) for d in documents[:3]
        ]
        with recorded_inputs(wide) as inputs:
            assert run(*documents[:3]) == {"num_skipped": 3}
        assert inputs == []
        documents[1].page_content = "Note 1, in other words."
        with recorded_inputs(wide) as inputs:
            assert run(documents[0], documents[1], documents[3]) == {"num_added": 2, "num_skipped": 1, "num_deleted": 2}
        assert len([ids for ids in inputs if ids.shape[1] > 1]) == 2  # what stayed was not read again
        assert texts(own) == ["Note 0.", "Note 1, in other words.", "Note 3."]
        assert cache_blobs(own) == 3 and own.check().ok
        (hit,) = kv_index.invoke("words", k=1)
        assert hit.page_content == "Note 1, in other words." and kv_index.get([str(hit.id)])[0].id == hit.id
        reply = ChatKVMemory(own, max_tokens=4).invoke("words?", kv_ids=[hit.metadata["kv_id"]])
        assert reply.usage_metadata is not None
        assert run() == {"num_deleted": 3}
        assert texts(own) == [] and cache_blobs(own) == 0


async def test_indexing_asynchronously(memory: KVMemory, manager: InMemoryRecordManager) -> None:
    kv_index = KVMemoryIndex(memory)
    found = await aindex([Document(page_content=KIOSK)], manager, kv_index, cleanup="full", key_encoder="sha256")
    assert found["num_added"] == 1 and memory.reader.has(KIOSK)
    found = await aindex([], manager, kv_index, cleanup="full", key_encoder="sha256")
    assert found["num_deleted"] == 1 and not memory.reader.has(KIOSK)
    assert memory.reader.has(FERRY)  # what came another way is not LangChain's to delete


def test_a_text_in_two_documents_keeps_its_cache(memory: KVMemory) -> None:
    kv_index = KVMemoryIndex(memory)
    kv_index.upsert([Document(page_content=KIOSK, id="a"), Document(page_content=KIOSK, id="b")])
    kv_index.delete(["a"])
    assert memory.reader.has(KIOSK)
    kv_index.delete(["b"])
    assert not memory.reader.has(KIOSK)


def test_a_found_document_can_be_upserted_again(memory: KVMemory) -> None:
    kv_index = KVMemoryIndex(memory)
    kv_index.upsert([Document(page_content=KIOSK, id="a", metadata={"n": 1})])
    (found,) = kv_index.invoke("waffles")
    assert found.metadata == {"n": 1, "kv_id": key_of(KIOSK)}
    kv_index.upsert([found])
    assert kv_index.get(["a"]) == [Document(page_content=KIOSK, id="a", metadata={"n": 1})]


def test_passages_of_a_document_are_joined(memory: KVMemory) -> None:
    memory.add_passages("two", ["One.", "Two."])
    assert KVMemoryIndex(memory).get(["two", "none"]) == [Document(page_content="One.\n\nTwo.", id="two")]


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (Document(page_content="a\0b", id="binary"), errors.UnreadableDocumentError),
        (Document(page_content="A text.", id="odd", metadata={"when": object()}), ConfigError),
    ],
)
def test_documents_that_cannot_be_stored_are_refused(
    memory: KVMemory, document: Document, error: type[Exception]
) -> None:
    before = memory.documents()
    with pytest.raises(error):
        KVMemoryIndex(memory).upsert([document])
    assert memory.documents() == before and memory.check().ok


def test_delete_without_ids_is_refused(memory: KVMemory) -> None:
    with pytest.raises(ValueError, match="no ids"):
        KVMemoryIndex(memory).delete()
    assert KVMemoryIndex(memory).delete([])["num_deleted"] == 0
    assert len(memory.documents()) == 2


# -- documents without text, and documents in several calls ------------------------------------------------------------

BLANK = ["", " \n\t", "\u00a0\u3000", "\u200b\ufeff", "\u00ad\u2060\ufe0f"]


@pytest.mark.parametrize("blank", BLANK)
@pytest.mark.parametrize("batch_size", [1, 2, 100])
async def test_indexing_goes_on_past_a_blank_page(
    empty: KVMemory, manager: InMemoryRecordManager, caplog: pytest.LogCaptureFixture, blank: str, batch_size: int
) -> None:
    kv_index = KVMemoryIndex(empty)
    pages = [Document(page_content=f"Note {i}.", metadata={"source": f"{i}.txt"}) for i in range(5)]
    pages[2].page_content = blank

    async def run() -> dict[str, int]:
        options: Any = {"cleanup": "full", "key_encoder": "sha256", "batch_size": batch_size}
        found = await (aindex(pages, manager, kv_index, **options) if batch_size == 2 else _sync(options))
        return {name: n for name, n in found.items() if n}

    async def _sync(options: Any) -> Any:
        return index(pages, manager, kv_index, **options)

    assert await run() == {"num_added": 5}
    assert texts(empty) == ["Note 0.", "Note 1.", "Note 3.", "Note 4."] and cache_blobs(empty) == 4
    assert caplog.text.count("without text") == 1
    # What the record manager lists is in the index, and the other way round.
    listed = manager.list_keys()
    assert sorted(summary.id for summary in empty.documents()) == sorted(listed)
    assert {document.id for document in kv_index.get(listed)} == set(listed)
    assert [d.metadata["source"] for d in kv_index.get(listed) if not d.page_content] == ["2.txt"]
    assert "2.txt" not in {d.metadata["source"] for d in kv_index.invoke("Note", k=9)}
    assert await run() == {"num_skipped": 5} and empty.check().ok
    pages[2].page_content = "Note 2."
    assert await run() == {"num_added": 1, "num_skipped": 4, "num_deleted": 1}
    assert texts(empty) == [f"Note {i}." for i in range(5)] and len(empty.documents()) == 5


def test_ids_of_an_upsert_align_with_its_documents(empty: KVMemory) -> None:
    kv_index = KVMemoryIndex(empty)
    response = kv_index.upsert([Document(page_content=text) for text in (FERRY, " ", LAMP)])
    assert response["failed"] == [] and [kv_index.get([id_])[0].page_content for id_ in response["succeeded"]] == [
        FERRY,
        "",
        LAMP,
    ]


def test_a_document_that_becomes_blank_loses_its_cache(empty: KVMemory) -> None:
    kv_index = KVMemoryIndex(empty)
    for text, metadata in ((FERRY, {"n": 1}), ("\u200b", {"n": 2})):
        kv_index.upsert([Document(page_content=text, id="a", metadata=metadata)])
    assert kv_index.get(["a"]) == [Document(page_content="", id="a", metadata={"n": 2})]
    assert texts(empty) == [] and cache_blobs(empty) == 0
    kv_index.upsert([Document(page_content=LAMP, id="a")])
    assert texts(empty) == [LAMP]
    assert kv_index.delete(["a"])["num_deleted"] == 1 and empty.documents() == []


@pytest.mark.parametrize("cleanup", [None, "incremental", "scoped_full"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_documents_of_one_source_can_come_in_several_batches(
    empty: KVMemory, manager: InMemoryRecordManager, cleanup: Any, batch_size: int
) -> None:
    pages = [Document(page_content=f"Note {i}.", metadata={"source": "all.txt"}) for i in range(4)]
    options: Any = {
        "cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256", "batch_size": batch_size
    }  # fmt: skip
    for _ in range(2):  # LangChain itself indexes most of them again in mode `incremental`, and says so
        index(pages, manager, KVMemoryIndex(empty), **options)
        assert texts(empty) == [f"Note {i}." for i in range(4)] and cache_blobs(empty) == 4
