"""Caches that go between being found and being loaded, runnables as retrievers, and copies in other processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from kv_memory import KVMemory
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_chain, create_kv_retrieval_chain
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION


def test_a_document_whose_cache_is_gone_is_prefilled_as_text(memory: KVMemory) -> None:
    found = KVMemoryRetriever(memory=memory).invoke(FERRY_QUESTION)
    assert found and found[0].page_content
    chain = create_kv_chain(ChatKVMemory(memory=memory))
    before = chain.invoke({"context": found[:1], "input": FERRY_QUESTION})
    memory.remove("ferry")
    memory.store.purge()
    assert not memory.reader.has(FERRY)
    after = chain.invoke({"context": found[:1], "input": FERRY_QUESTION})
    assert isinstance(before, str) and isinstance(after, str)


def test_any_runnable_that_returns_documents_is_a_retriever(memory: KVMemory) -> None:
    seen: list[Any] = []

    def find(values: dict[str, Any]) -> list[Document]:
        seen.append(values)
        return KVMemoryRetriever(memory=memory).invoke(values["input"])

    chain = create_kv_retrieval_chain(RunnableLambda(find), ChatKVMemory(memory=memory))
    found = chain.invoke({"input": FERRY_QUESTION, "chat_history": []})
    assert seen == [{"input": FERRY_QUESTION, "chat_history": []}]
    assert FERRY in [document.page_content for document in found["context"]]
    assert "".join(part.get("answer", "") for part in chain.stream({"input": FERRY_QUESTION})) == found["answer"]


def test_a_document_that_is_replaced_in_between_is_found_again(memory: KVMemory) -> None:
    calls: list[int] = []

    def find(values: dict[str, Any]) -> list[Document]:
        calls.append(1)
        found = KVMemoryRetriever(memory=memory).invoke(values["input"])
        bare = [Document(page_content="", metadata=document.metadata) for document in found[:1]]
        if len(calls) == 1:
            memory.add(("ferry", "The ferry to Skarholm does leave at 8.15 now."))
            memory.store.delete(key_of(FERRY))  # as it happens to old caches after a while
        return bare

    chain = create_kv_retrieval_chain(RunnableLambda(find), ChatKVMemory(memory=memory))
    assert chain.invoke({"input": FERRY_QUESTION})["answer"] is not None
    assert len(calls) == 2


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_copies_open_the_same_store(memory: KVMemory, way: Any) -> None:
    llm = way(ChatKVMemory(memory=memory, max_tokens=5))
    assert llm.memory.path == memory.path
    assert llm.memory.settings == memory.settings
    assert llm.max_tokens == 5
    assert [summary.id for summary in llm.memory.documents()] == [summary.id for summary in memory.documents()]
