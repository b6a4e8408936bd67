"""Streams that are closed, cancelled, or run beside each other."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from kv_memory import DecodeSettings, KVMemory
from kv_memory.generate import Turn, iterate_in_thread
from kv_memory.model.kv_cache import PositionedCache
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION
from tests.query_samples import ASKED, SAMPLED, of, reference
from tests.reference import recorded_inputs


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[PositionedCache]]:
    """Every cache that is made for a reply from now on."""
    made: list[weakref.ref[PositionedCache]] = []
    init: Callable[..., None] = PositionedCache.__init__

    def noted(self: PositionedCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(PositionedCache, "__init__", noted)
    return made


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_stops_decoding_and_frees_the_cache(
    memory: KVMemory, wide: Any, composed: list[weakref.ref[PositionedCache]], taken: int
) -> None:
    expected = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED).answer
    composed.clear()
    gc.collect()
    gc.disable()  # freed at once, not when the collector happens to come by
    try:
        with recorded_inputs(wide) as inputs:
            stream = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED)
            pieces = [next(stream) for _ in range(taken)]
            (cache,) = composed
            assert cache() is not None
            read = len(inputs)
            stream.close()
            assert cache() is None
            assert list(stream) == []
            reply = stream.answer
        assert len(inputs) == read < 40
    finally:
        gc.enable()
    assert (reply.n_new_tokens, reply.text.startswith("".join(pieces))) == (read, True)
    assert reply.finish_reason == "length"
    stream.close()  # twice is fine
    assert of(memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED).answer) == of(expected)


def test_a_complete_reply_frees_its_cache(memory: KVMemory, composed: list[weakref.ref[PositionedCache]]) -> None:
    stream = memory.reader.reply(ASKED, [reference(FERRY, text=FERRY)], settings=SAMPLED)
    assert stream.answer.text
    gc.collect()
    assert composed and all(cache() is None for cache in composed)


def test_concurrent_streams_get_their_own_replies(memory: KVMemory) -> None:
    jobs = [(FERRY_QUESTION, FERRY), (LAMP_QUESTION, LAMP)]
    expected = [
        memory.reader.reply([Turn("user", q)], [reference(text)], settings=SAMPLED).answer.text for q, text in jobs
    ]
    assert expected[0] != expected[1]
    found: dict[int, list[str]] = {0: [], 1: []}
    reader, both = memory.reader, threading.Barrier(2)

    def stream(index: int) -> None:
        question, text = jobs[index]
        both.wait()
        for _ in range(3):
            found[index].append("".join(reader.reply([Turn("user", question)], [reference(text)], settings=SAMPLED)))

    threads = [threading.Thread(target=stream, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [expected[0]] * 3, 1: [expected[1]] * 3}


def test_interleaved_streams_do_not_affect_each_other(memory: KVMemory) -> None:
    def start() -> list[Any]:
        return [memory.reader.reply(ASKED, [reference(text)], settings=SAMPLED) for text in (FERRY, LAMP)]

    expected = [stream.answer.text for stream in start()]
    streams, found = start(), ["", ""]
    for _ in range(40):
        for index, stream in enumerate(streams):
            found[index] += next(stream, "")
    assert found == expected


async def test_cancelling_a_stream_without_output_stops_within_one_token(memory: KVMemory, wide: Any) -> None:
    long = DecodeSettings(max_new_tokens=200)
    text = memory.reader.reply([Turn("user", "Why?")], settings=long).answer.text
    held = DecodeSettings(max_new_tokens=200, stop=(text + "#",))  # all of it may be the beginning of a stop string
    stream = memory.reader.reply([Turn("user", "Why?")], settings=held)

    async def take() -> None:
        async for _ in iterate_in_thread(stream):
            raise AssertionError("a piece was shown")

    with recorded_inputs(wide) as inputs:
        task = asyncio.create_task(take())
        while len(inputs) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(inputs) < 50
        n = len(inputs)
        await asyncio.sleep(0.05)
        assert len(inputs) == n
