"""Requests that are closed, lost, cancelled or fail while others go on."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.config import DecodeSettings
from kv_memory.errors import DecodeFailedError, QueueFullError
from kv_memory.generate import Generator, iterate_in_thread
from tests.generate.scheduled import SAMPLED, before_each_pass, in_threads, scheduled, start, twelve_jobs
from tests.reference import shared_backbone


@pytest.fixture
def backbone() -> Any:
    return shared_backbone("llama")


@pytest.fixture
def jobs() -> list[Any]:
    return twelve_jobs()[0]


@pytest.fixture
def expected() -> list[tuple[int, ...]]:
    return twelve_jobs()[1]


# -- closed ------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_lost_leaves_its_place_and_frees_its_cache(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]
) -> None:
    generator = scheduled(backbone, max_batch=1, max_queue=0)
    lost = start(generator, jobs[3])
    next(lost)
    request: Any = lost._request
    cache = weakref.ref(request.cache())
    with pytest.raises(QueueFullError):
        start(generator, jobs[0])
    del lost
    gc.collect()
    assert cache() is None
    assert start(generator, jobs[0]).answer.token_ids == expected[0]


async def test_tasks_cancelled_in_the_queue_and_while_decoding(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]
) -> None:
    generator = scheduled(backbone, max_batch=1)
    begun = asyncio.Event()

    async def ask(index: int) -> tuple[int, ...]:
        stream = start(generator, jobs[index])
        async for _ in iterate_in_thread(stream):
            begun.set()
        return stream.answer.token_ids

    with before_each_pass(backbone, lambda: time.sleep(0.005)):
        decoding, queued, *others = [asyncio.create_task(ask(index)) for index in range(5)]
        await begun.wait()
        queued.cancel()
        decoding.cancel()
        found = await asyncio.gather(decoding, queued, *others, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in found[:2]] == [True, True]
    assert found[2:] == expected[2:5]


def test_closing_wakes_whoever_waits(backbone: Any) -> None:
    generator = scheduled(backbone, max_batch=1)
    long = replace(SAMPLED, max_new_tokens=100, seed=1)
    with before_each_pass(backbone, lambda: time.sleep(0.01)):
        first, second = generator.stream("why?", settings=long), generator.stream("who?", settings=long)
        next(first)

        def close() -> str:
            time.sleep(0.1)
            second.close()
            first.close()
            return "closed"

        assert in_threads([lambda: list(first), lambda: list(second), close])[1:] == [[], "closed"]


# -- failing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failing_step_ends_those_in_it_and_no_others(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], error: BaseException
) -> None:
    generator = scheduled(backbone, max_batch=3)
    streams = [start(generator, job) for job in jobs[:5]]
    next(streams[0])
    requests: list[Any] = [stream._request for stream in streams[:3]]
    decoded = [request.answer.token_ids for request in requests]
    assert all(decoded)

    def fail() -> None:
        raise error

    with before_each_pass(backbone, fail), pytest.raises(type(error)) as caught:
        list(streams[1])
    assert caught.value is error
    for stream in (streams[0], streams[2]):
        with pytest.raises(DecodeFailedError, match="Ask again") as other:
            list(stream)
        assert other.value.__cause__ is error
    assert [stream.answer.token_ids for stream in streams[:3]] == decoded  # it stays
    for index in (3, 4):
        assert streams[index].answer.token_ids == expected[index]
    assert start(generator, jobs[0]).answer.token_ids == expected[0]


def test_whoever_leads_for_others_is_not_hit_by_their_failure(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]
) -> None:
    generator, failed = scheduled(backbone, max_batch=1), []
    first, second = start(generator, jobs[0]), start(generator, jobs[1])

    def fail() -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError("out of memory")

    with before_each_pass(backbone, fail):
        assert second.answer.token_ids == expected[1]
    with pytest.raises(DecodeFailedError):
        list(first)


def test_an_error_of_one_request_is_its_own(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = scheduled(backbone)
    bad, good = start(generator, jobs[0]), start(generator, jobs[1])

    def broken(_: torch.Tensor) -> int:
        raise ValueError("no such token")

    monkeypatch.setattr(bad._request, "_choose", broken)
    assert good.answer.token_ids == expected[1]
    with pytest.raises(ValueError, match="no such token"):
        list(bad)


def test_constrained_answers_beside_free_ones(backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]) -> None:
    pytest.importorskip("llguidance")
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    settings = DecodeSettings(max_new_tokens=30, json_schema=schema)
    alone = Generator(backbone).generate("how many?", settings=settings)
    generator = scheduled(backbone)
    free, bound = start(generator, jobs[1]), generator.stream("how many?", settings=settings)
    assert free.answer.token_ids == expected[1] and bound.answer.token_ids == alone.token_ids
