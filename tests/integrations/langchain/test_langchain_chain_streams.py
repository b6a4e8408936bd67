"""Chains that stream, also in a graph of LangGraph."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessageChunk
from langgraph.graph import END, START, StateGraph

from kv_memory import KVMemory
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_chain, create_kv_retrieval_chain
from tests.integrations.langchain.test_langchain_chain import asked, documents
from tests.memories import FERRY_QUESTION, LAMP_QUESTION
from tests.reference import recorded_inputs

# -- streaming ---------------------------------------------------------------------------------------------------------


async def test_tokens_stream_through(memory: KVMemory) -> None:
    chain = create_kv_chain(ChatKVMemory(memory, max_tokens=24, temperature=1.0, seed=1))
    values = asked(memory)
    whole = chain.invoke(values)
    pieces = list(chain.stream(values))
    assert len([piece for piece in pieces if piece]) > 2 and "".join(pieces) == whole
    assert [piece async for piece in chain.astream(values)] == pieces
    assert await chain.ainvoke(values) == whole
    seen = [event async for event in chain.astream_events(values, version="v2")]
    streamed = [e["data"]["chunk"].content for e in seen if e["event"] == "on_chat_model_stream"]
    assert "".join(streamed) == whole and len(streamed) > 2


@pytest.mark.parametrize("retrieves", [False, True])
async def test_an_abandoned_stream_stops_at_once(memory: KVMemory, wide: Any, retrieves: bool) -> None:
    llm = ChatKVMemory(memory, max_tokens=500, temperature=1.0, seed=1)
    chain: Any = create_kv_retrieval_chain(KVMemoryRetriever(memory, k=1), llm) if retrieves else create_kv_chain(llm)

    def is_text(piece: Any) -> bool:
        return bool(piece.get("answer") if retrieves else piece)

    with recorded_inputs(wide) as inputs:
        stream = chain.stream(asked(memory))
        next(piece for piece in stream if is_text(piece))
        stream.close()
        n_sync = len(inputs)
        pieces = chain.astream(asked(memory))
        async for piece in pieces:
            if is_text(piece):
                break
        await pieces.aclose()
        n_both = len(inputs)
        await asyncio.sleep(0.2)
    assert n_sync < 10 and n_both < 20  # some bytes make one letter
    assert len(inputs) <= n_both + 1


async def test_a_cancelled_task_stops_decoding(memory: KVMemory, wide: Any) -> None:
    chain = create_kv_chain(ChatKVMemory(memory, max_tokens=500))
    with recorded_inputs(wide) as inputs:
        task = asyncio.create_task(chain.ainvoke(asked(memory)))
        while len(inputs) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        n_after = len(inputs)
        await asyncio.sleep(0.1)
    assert n_after < 50 and len(inputs) == n_after


async def test_a_retrieval_chain_returns_context_and_answer(memory: KVMemory, llm: Any) -> None:
    chain = create_kv_retrieval_chain(KVMemoryRetriever(memory, k=1), llm)
    result = chain.invoke({"input": LAMP_QUESTION, "user": "alice"})
    assert result == {
        "input": LAMP_QUESTION,
        "user": "alice",
        "context": documents(memory, LAMP_QUESTION),
        "answer": create_kv_chain(llm).invoke(asked(memory, LAMP_QUESTION)),
    }
    assert await chain.ainvoke({"input": LAMP_QUESTION, "user": "alice"}) == result
    pieces = [part["answer"] for part in chain.stream({"input": LAMP_QUESTION}) if "answer" in part]
    assert "".join(pieces) == result["answer"] and len(pieces) > 1


# -- LangGraph ---------------------------------------------------------------------------------------------------------


class State(TypedDict, total=False):
    input: str
    context: list[Document]
    answer: str


async def test_the_chain_works_inside_a_graph_node(memory: KVMemory) -> None:
    chain = create_kv_chain(ChatKVMemory(memory, max_tokens=24))

    def find(state: State) -> State:
        return {"context": documents(memory, state["input"])}

    async def answer(state: State) -> State:
        return {"answer": await chain.ainvoke(dict(state))}

    def answer_now(state: State) -> State:
        return {"answer": chain.invoke(dict(state))}

    expected = chain.invoke(asked(memory))
    for node in (answer_now, answer):
        graph: Any = StateGraph(State)
        graph.add_node("find", find)
        graph.add_node("answer", node)
        graph.add_edge(START, "find")
        graph.add_edge("find", "answer")
        graph.add_edge("answer", END)
        app = graph.compile()
        state = {"input": FERRY_QUESTION}
        assert (await app.ainvoke(state))["answer"] == expected
        tokens = [message async for message, _ in app.astream(state, stream_mode="messages")]
        assert all(isinstance(token, AIMessageChunk) for token in tokens) and len(tokens) > 2
        assert "".join(token.text for token in tokens) == expected
        if node is answer_now:
            assert app.invoke(state)["answer"] == expected
            updates = list(app.stream(state, stream_mode="updates"))
            assert updates[-1] == {"answer": {"answer": expected}}
            streamed = [message.text for message, _ in app.stream(state, stream_mode="messages")]
            assert "".join(streamed) == expected and len(streamed) > 2


def test_the_chain_can_be_a_graph_node(memory: KVMemory, llm: Any) -> None:
    chain = create_kv_retrieval_chain(KVMemoryRetriever(memory, k=1), llm)
    graph: Any = StateGraph(State)
    graph.add_node("ask", chain)
    graph.add_edge(START, "ask")
    result = graph.compile().invoke({"input": FERRY_QUESTION})
    assert result["answer"] == chain.invoke({"input": FERRY_QUESTION})["answer"]
