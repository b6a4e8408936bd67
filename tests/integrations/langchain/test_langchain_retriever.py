"""KVMemoryRetriever beyond LangChain's standard suites."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore

from kv_memory import ConfigError, KVMemory, errors
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryIndex, KVMemoryRetriever, create_kv_chain
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, cache_blobs, open_memory
from tests.reference import recorded_inputs

BOTH = f"{FERRY_QUESTION} {LAMP_QUESTION}"
KIOSK = "The kiosk on the quay sells waffles."


class Fixed(BaseRetriever):
    """Finds the same documents whatever it is asked, and takes no k."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


def fixed(*texts: str) -> Fixed:
    return Fixed(
        documents=[Document(page_content=text, id=f"id {i}", metadata={"i": i}) for i, text in enumerate(texts)]
    )


def vector_store(*texts: str) -> InMemoryVectorStore:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_texts(list(texts))
    return store


# -- the store's own retrieval -----------------------------------------------------------------------------------------


async def test_documents_come_with_their_cache(memory: KVMemory) -> None:
    (document,) = KVMemoryRetriever(memory, k=1).invoke(LAMP_QUESTION)
    assert document == Document(
        id="lamp#0", page_content=LAMP, metadata={"source": "lamp", "year": 1921, "kv_id": key_of(LAMP)}
    )
    assert await KVMemoryRetriever(memory).ainvoke(LAMP_QUESTION, k=1) == [document]
    assert len(KVMemoryRetriever(memory).invoke(BOTH)) == 2  # the memory's own top_k is 3
    memory.add([("web", "A walrus.", {"source": "https://example.org"})])
    assert KVMemoryRetriever(memory).invoke("walrus")[0].metadata["source"] == "https://example.org"
    assert KVMemoryRetriever(memory).invoke("xylophone") == []


@pytest.mark.parametrize("kind", [KVMemoryRetriever, KVMemoryIndex])
def test_search_kwargs_choose_documents(memory: KVMemory, kind: Any) -> None:
    memory.add([("old", "The lamp of the ferry.", {"year": 1900})])

    def found(**search_kwargs: Any) -> list[str | None]:
        return [document.id for document in kind(memory, search_kwargs=search_kwargs).invoke("ferry lamp")]

    assert len(found()) == 3
    assert {str(id_).partition("#")[0] for id_ in found(filter={"year": [1900, 1921]})} == {"old", "lamp"}
    assert {str(id_).partition("#")[0] for id_ in found(document_ids=["ferry"])} == {"ferry"}
    assert found(min_score=1000) == []
    with pytest.raises(ConfigError, match="Did you mean 'filter'"):
        found(filters={})


def test_search_kwargs_are_not_for_other_retrievers(memory: KVMemory) -> None:
    with pytest.raises(ConfigError, match="another retriever"):
        KVMemoryRetriever(memory, retriever=fixed(LAMP), search_kwargs={"min_score": 1})


async def test_passages_without_texts_are_answered_from_their_caches(bare: KVMemory, memory: KVMemory) -> None:
    found = KVMemoryRetriever(bare, k=1).invoke(LAMP_QUESTION)
    assert found == [
        Document(id="lamp#0", page_content="", metadata={"source": "lamp", "year": 1921, "kv_id": key_of(LAMP)})
    ]
    # Around it, too: what stands between the two may be anything that finds documents.
    for on_missing in ("text", "compress", "skip", "raise"):
        around = KVMemoryRetriever(bare, retriever=KVMemoryRetriever(bare, k=1), on_missing=on_missing)
        assert await around.ainvoke(LAMP_QUESTION) == found
    assert KVMemoryIndex(bare, k=1).invoke(LAMP_QUESTION)[0].metadata["kv_id"] == key_of(LAMP)
    asked = {"context": found, "input": LAMP_QUESTION}
    expected = {"context": KVMemoryRetriever(memory, k=1).invoke(LAMP_QUESTION), "input": LAMP_QUESTION}
    answers = [
        create_kv_chain(ChatKVMemory(kept, max_tokens=4)).invoke(given)
        for kept, given in ((bare, asked), (memory, expected))
    ]
    assert answers[0] == answers[1]


def test_passages_with_neither_text_nor_cache_fail_or_are_skipped(bare: KVMemory) -> None:
    for cache in list(bare.store.caches()):
        bare.store.delete(cache.text_sha256)
    for on_missing in ("text", "compress"):
        with pytest.raises(errors.TextNotKeptError, match="--stale"):
            KVMemoryRetriever(bare, retriever=KVMemoryRetriever(bare), on_missing=on_missing).invoke(LAMP_QUESTION)
    around = KVMemoryRetriever(bare, retriever=KVMemoryRetriever(bare), on_missing="skip")
    assert around.invoke(LAMP_QUESTION) == []


def test_an_index_returns_upserted_texts_and_refuses_missing_ones(bare: KVMemory) -> None:
    documents = KVMemoryIndex(bare)
    documents.upsert([Document(id="kiosk", page_content=KIOSK)])
    assert documents.get(["kiosk"]) == [Document(id="kiosk", page_content=KIOSK)]
    assert documents.invoke("kiosk")[0].page_content == KIOSK
    with pytest.raises(errors.TextNotKeptError, match="ferry"):
        documents.get(["kiosk", "ferry"])


async def test_k_can_be_set_in_constructor_and_call(memory: KVMemory) -> None:
    for retriever in (
        KVMemoryRetriever(memory, k=2),
        KVMemoryIndex(memory, k=2),
        KVMemoryRetriever(memory, retriever=vector_store(FERRY, LAMP, KIOSK).as_retriever(), k=2),
        KVMemoryRetriever(memory, retriever=fixed(FERRY, LAMP, KIOSK), k=2),
    ):
        assert len(retriever.invoke(BOTH)) == len(await retriever.ainvoke(BOTH)) == 2
        assert len(retriever.invoke(BOTH, k=1)) == len(await retriever.ainvoke(BOTH, k=1)) == 1
        for k in (0, -1):
            with pytest.raises(ConfigError, match="at least 1"):
                retriever.invoke(BOTH, k=k)
            with pytest.raises(ConfigError, match="at least 1"):
                await retriever.ainvoke(BOTH, k=k)
    for make in (KVMemoryRetriever, KVMemoryIndex):
        with pytest.raises(ConfigError, match="at least 1"):
            make(memory, k=0)


async def test_k_is_passed_to_a_vector_store(memory: KVMemory) -> None:
    inner = vector_store(*(f"Text {i}." for i in range(8))).as_retriever(search_kwargs={"k": 2})
    assert len(KVMemoryRetriever(memory, retriever=inner).invoke("Text")) == 2
    assert len(KVMemoryRetriever(memory, retriever=inner).invoke("Text", k=7)) == 7  # not the first two of seven
    assert len(await KVMemoryRetriever(memory, retriever=inner, k=5).ainvoke("Text")) == 5


# -- around another retriever ------------------------------------------------------------------------------------------


async def test_only_documents_with_a_cache_are_marked(memory: KVMemory) -> None:
    inner = fixed(KIOSK, FERRY)
    retriever = KVMemoryRetriever(memory, retriever=inner)
    kiosk, ferry = retriever.invoke("?")
    assert kiosk == inner.documents[0] and "kv_id" not in kiosk.metadata
    assert ferry == Document(id="id 1", page_content=FERRY, metadata={"i": 1, "kv_id": key_of(FERRY)})
    assert "kv_id" not in inner.documents[1].metadata  # another's documents are not changed
    assert await retriever.ainvoke("?") == [kiosk, ferry]


def test_a_cache_needs_exactly_the_same_text(memory: KVMemory) -> None:
    found = KVMemoryRetriever(memory, retriever=fixed(FERRY + " ", FERRY.lower())).invoke("?")
    assert all("kv_id" not in document.metadata for document in found)


def test_a_mark_of_another_store_is_removed(memory: KVMemory) -> None:
    stale = Document(page_content=KIOSK, metadata={"kv_id": "0" * 64})
    (document,) = KVMemoryRetriever(memory, retriever=Fixed(documents=[stale])).invoke("?")
    assert document.metadata == {}


def test_compress_makes_the_cache_once(memory: KVMemory, wide: Any) -> None:
    retriever = KVMemoryRetriever(memory, retriever=fixed(KIOSK), on_missing="compress")
    n_blobs = cache_blobs(memory)
    with recorded_inputs(wide) as inputs:
        (document,) = retriever.invoke("?")
    assert inputs and document.metadata["kv_id"] == key_of(KIOSK) and cache_blobs(memory) == n_blobs + 1
    with recorded_inputs(wide) as inputs:
        assert retriever.invoke("?") == [document]
    assert inputs == []
    create_kv_chain(ChatKVMemory(memory, max_tokens=4)).invoke({"context": [document], "input": "Waffles?"})
    memory.remove("id 0")
    assert cache_blobs(memory) == n_blobs
    sourced = [Document(page_content=text, metadata={"source": "kiosk.txt"}) for text in (KIOSK, "A second text.")]
    KVMemoryRetriever(memory, retriever=Fixed(documents=sourced), on_missing="compress").invoke("?")
    assert [passage.text for passage in memory.document("kiosk.txt").passages] == [KIOSK, "A second text."]


def test_on_missing_skip_and_raise(memory: KVMemory, wide: Any) -> None:
    inner = fixed(KIOSK, FERRY)
    skipping = KVMemoryRetriever(memory, retriever=inner, on_missing="skip").invoke("?")
    assert [document.page_content for document in skipping] == [FERRY]
    with pytest.raises(errors.CacheNotFoundError):
        KVMemoryRetriever(memory, retriever=inner, on_missing="raise").invoke("?")
    with open_memory(memory.path, wide, selector="sink_recent") as other:
        retriever = KVMemoryRetriever(other, retriever=fixed(FERRY), on_missing="raise")
        with pytest.raises(errors.FingerprintMismatchError):
            retriever.invoke("?")
    with pytest.raises(ConfigError, match="on_missing"):
        KVMemoryRetriever(memory, on_missing="ignore")


def test_documents_without_text_are_left_out(memory: KVMemory, caplog: pytest.LogCaptureFixture) -> None:
    inner = fixed("", FERRY, "\u200b\n")
    with caplog.at_level(logging.WARNING):
        (ferry,) = KVMemoryRetriever(memory, retriever=inner).invoke("?")
    assert ferry.page_content == FERRY and caplog.text.count("without text") == 2
    with pytest.raises(errors.EmptyDocumentError):
        KVMemoryRetriever(memory, retriever=inner, on_missing="raise").invoke("?")
