"""Questions to one memory at the same time: from threads, from tasks, from several collections."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from kv_memory import DecodeSettings, KVMemory, QueueFullError
from tests.memories import FERRY, FERRY_QUESTION, LAMP_QUESTION, open_memory
from tests.query_samples import ASKED, SAMPLED, of, reference
from tests.reference import recorded_inputs

QUESTIONS = [FERRY_QUESTION, LAMP_QUESTION, "When does the ferry leave?", "Who looks after the lamp?"] * 5


async def test_twenty_tasks_are_answered_together(memory: KVMemory, wide: Any) -> None:
    expected = [memory.ask(question, settings=SAMPLED) for question in QUESTIONS]
    with recorded_inputs(wide) as inputs:
        found = await asyncio.gather(*(memory.aask(question, settings=SAMPLED) for question in QUESTIONS))
    assert [of(answer) for answer in found] == [of(answer) for answer in expected]
    assert [answer.sources for answer in found] == [answer.sources for answer in expected]
    assert len(inputs) < sum(answer.n_new_tokens for answer in expected) / 4


async def test_tasks_stream_side_by_side(memory: KVMemory) -> None:
    async def pieces(question: str) -> list[str]:
        return [piece async for piece in memory.astream(question, settings=SAMPLED)]

    found = await asyncio.gather(*(pieces(question) for question in QUESTIONS[:4]))
    for question, taken in zip(QUESTIONS, found, strict=False):
        assert len(taken) > 5 and "".join(taken).strip() == memory.ask(question, settings=SAMPLED).text


async def test_the_wait_for_a_thread_counts_towards_the_first_token(memory: KVMemory) -> None:
    loop = asyncio.get_running_loop()
    busy = [loop.run_in_executor(None, time.sleep, 0.3) for _ in range(64)]
    answer = await memory.aask(FERRY_QUESTION, settings=DecodeSettings(max_new_tokens=2))
    assert answer.ttft_s > 0.25
    await asyncio.gather(*busy)


def test_collections_are_decoded_together(memory: KVMemory, wide: Any) -> None:
    other = memory.in_collection("other")
    other.add(("ferry", FERRY))
    alone = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED).answer
    streams = [one.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED) for one in (memory, other)]
    with recorded_inputs(wide) as inputs:
        assert [of(stream.answer) for stream in streams] == [of(alone)] * 2
    assert len(inputs) < 2 * alone.n_new_tokens - 10


def test_a_full_queue_refuses_before_anything_is_loaded(
    tmp_path: Path, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_memory(tmp_path / "store", wide, max_batch=1, max_queue=1) as memory:
        memory.add(("ferry", FERRY))
        held = [memory.stream(FERRY_QUESTION, settings=SAMPLED) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(memory.store, "get", lambda *_: pytest.fail("a cache was loaded"))
            for call in (memory.ask, memory.stream):
                with pytest.raises(QueueFullError, match="wait") as caught:
                    call(FERRY_QUESTION)
                assert caught.value.next_step is not None and "max_queue" in caught.value.next_step
        held[0].close()
        assert memory.ask(FERRY_QUESTION, settings=SAMPLED).text == held[1].answer.text


def test_copies_keep_the_limits(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, max_batch=3, max_queue=5) as memory:
        memory.add(("ferry", FERRY))
        again, arguments = memory.__reduce__()
        assert again.keywords["max_batch"] == 3 and again.keywords["max_queue"] == 5 and arguments == ()
        with again() as copy:
            assert copy.__reduce__()[0].keywords == again.keywords
