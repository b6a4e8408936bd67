"""The integration over smollm2: what a random model cannot show. Seconds each, hence slow."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import Memory

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import KVMemoryBlock, KVMemoryLLM, KVMemoryQueryEngine
from tests.integrations.llama_index.li_samples import WordRetriever, index_over, keys_of, splitter

pytestmark = pytest.mark.slow
KESSEL = "The observatory on Mount Kessel was opened in 1931 by Ida Brandt. Its telescope weighs 14 tons."
QUESTION = "Who opened the observatory?"


async def longest_stall(work: Any) -> float:
    """Seconds for which the event loop did nothing else, at worst, while the work was done."""
    worst, done = 0.0, False

    async def tick() -> None:
        nonlocal worst
        before = time.perf_counter()
        while not done:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            worst, before = max(worst, now - before), now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    try:
        await work
    finally:
        done = True
        await ticker
    return worst


async def test_the_event_loop_never_waits_for_the_model(embedded: KVMemory) -> None:
    embedded.add_passages("kessel", [KESSEL])
    llm = KVMemoryLLM(embedded, max_tokens=24)
    llm.complete(QUESTION)

    async def streamed() -> None:
        async for _ in await llm.astream_chat([ChatMessage(role="user", content=QUESTION)], kv_ids=keys_of(KESSEL)):
            pass

    for make in (lambda: llm.acomplete("Tell me a story about a walrus."), streamed):
        stalls = []
        for _ in range(3):  # the machine is shared
            stalls.append(await longest_stall(make()))
            if stalls[-1] < 0.05:
                break
        assert min(stalls) < 0.05, stalls


async def test_an_answer_from_caches(embedded: KVMemory) -> None:
    docs = [
        Document(text=KESSEL, id_="kessel"),
        Document(text="The ferry to Skarholm leaves at 7.40 from pier 4 every morning.", id_="ferry"),
    ]
    index_over(embedded, docs)
    retriever = WordRetriever(splitter().get_nodes_from_documents(docs))
    llm = KVMemoryLLM(embedded, max_tokens=16)
    engine = KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="raise")
    assert "Ida Brandt" in str(engine.query(QUESTION))
    assert "7.40" in str(await engine.aquery("When does the ferry to Skarholm leave?"))


@pytest.mark.usefixtures("chat_memories")
async def test_a_fact_from_the_third_of_many_turns_is_recalled(embedded: KVMemory) -> None:
    block = KVMemoryBlock(embedded, conversation_id="alice", keep_ratio=1.0)
    chat = Memory.from_defaults(token_limit=300, token_flush_size=100, tokenizer_fn=str.split, memory_blocks=[block])
    subjects = ["weather", "garden", "train", "kitchen", "harbour", "library", "bridge", "market"]
    for i in range(36):
        said = "My dog is called Biscuit." if i == 1 else f"Today I looked at the {subjects[i % 8]}, for {i} minutes."
        reply = "A fine name." if i == 1 else f"I see, the {subjects[i % 8]}."
        await chat.aput_messages([ChatMessage(role="user", content=said), ChatMessage(role="assistant", content=reply)])
    question = "What is my dog called?"
    messages = await chat.aget(input=question)
    assert not any("Biscuit" in str(message.content) for message in messages)
    llm = KVMemoryLLM(embedded, max_tokens=16)
    response = await llm.achat([*messages, ChatMessage(role="user", content=question)])
    assert "Biscuit" in str(response.message.content)
    usage = response.raw["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 1000
