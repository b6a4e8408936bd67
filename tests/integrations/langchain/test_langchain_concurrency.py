"""ChatKVMemory in threads and under asyncio: blocking, cancelled and abandoned calls, time limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kv_memory import KVMemory, Reference, errors
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_retrieval_chain
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION
from tests.reference import recorded_inputs

FERRY_ID, LAMP_ID = str(Reference(key=key_of(FERRY))), str(Reference(key=key_of(LAMP)))


@contextmanager
def slowed(backbone: Any, seconds: float) -> Iterator[list[float]]:
    """Every forward pass takes this much longer; yields when they were."""
    times: list[float] = []

    def wait(*_: Any) -> None:
        times.append(time.perf_counter())
        time.sleep(seconds)

    handle = backbone.decoder.embed_tokens.register_forward_pre_hook(wait)
    try:
        yield times
    finally:
        handle.remove()


def test_an_answer_over_its_time_limit_raises(memory: KVMemory, wide: Any) -> None:
    llm = ChatKVMemory(memory, max_tokens=1000)
    with slowed(wide, 0.05), pytest.raises(errors.DecodeTimeoutError, match=r"0\.2 s"):
        llm.invoke("Hello", timeout=0.2)
    with slowed(wide, 0.05), pytest.raises(errors.DecodeTimeoutError):
        list(ChatKVMemory(memory, timeout=0.2).stream("Hello", kv_ids=[FERRY_ID]))


def test_concurrent_threads_get_their_own_answers(memory: KVMemory) -> None:
    llm = ChatKVMemory(memory, max_tokens=16)
    asks = [("Hello", {}), (FERRY_QUESTION, {"kv_ids": [FERRY_ID]}), (LAMP_QUESTION, {"kv_ids": [LAMP_ID]})] * 2
    expected = [llm.invoke(question, **options).content for question, options in asks]  # type: ignore[arg-type]
    found: list[Any] = [None] * len(asks)
    start = threading.Barrier(len(asks))

    def ask(index: int) -> None:
        question, options = asks[index]
        start.wait()
        found[index] = "".join(chunk.text for chunk in llm.stream(question, **options))  # type: ignore[arg-type]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


async def longest_stall(work: Any) -> float:
    """Seconds the event loop did not get to run for while it awaited `work`."""
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0.002)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await task
    return longest


@pytest.mark.parametrize("way", ["invoke", "stream", "chain"])
async def test_the_event_loop_is_never_blocked(memory: KVMemory, wide: Any, way: str) -> None:
    llm = ChatKVMemory(memory, max_tokens=4)

    async def work() -> None:
        if way == "invoke":
            await llm.ainvoke(FERRY_QUESTION, kv_ids=[FERRY_ID])
        elif way == "chain":
            retriever = KVMemoryRetriever(memory, k=1)
            assert (await create_kv_retrieval_chain(retriever, llm).ainvoke({"input": FERRY_QUESTION}))["answer"]
        else:
            assert len([chunk async for chunk in llm.astream(FERRY_QUESTION, kv_ids=[FERRY_ID])]) > 1

    await work()  # imports and first times
    stalls: list[float] = []
    with slowed(wide, 0.1) as times:
        while len(stalls) < 3 and min(stalls, default=1.0) >= 0.05:  # other processes stall this one too
            stalls.append(await longest_stall(work()))
    assert len(times) == len(stalls) * 4
    assert min(stalls) < 0.05, stalls


@pytest.mark.parametrize("way", ["invoke", "stream"])
async def test_a_cancelled_task_stops_within_a_token(memory: KVMemory, wide: Any, way: str) -> None:
    llm = ChatKVMemory(memory, max_tokens=500)

    async def work() -> None:
        if way == "invoke":
            await llm.ainvoke("Hello")
        else:
            async for _ in llm.astream("Hello"):
                pass

    with slowed(wide, 0.02) as times:
        task = asyncio.create_task(work())
        while len(times) < 3:
            await asyncio.sleep(0.001)
        n_before = len(times)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        n_after = len(times)
        await asyncio.sleep(0.1)
    assert n_after <= n_before + 1 and len(times) == n_after


async def test_an_abandoned_stream_stops_at_once(llm: ChatKVMemory, wide: Any) -> None:
    llm.max_tokens = 500
    with recorded_inputs(wide) as inputs:
        for _ in llm.stream("Hello"):
            break
        n_sync = len(inputs)
        stream = llm.astream("Hello")
        assert isinstance(stream, AsyncIterator)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        n_both = len(inputs)
        await asyncio.sleep(0.1)
    assert n_sync <= 4 and n_both - n_sync <= 4  # a first token may be only a part of a letter
    assert len(inputs) == n_both
