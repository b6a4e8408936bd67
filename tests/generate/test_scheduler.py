"""Requests that decode together: they join, leave, wait, and are slow."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, ContextWindowError, DecodeTimeoutError, QueueFullError
from kv_memory.generate import AnswerStream, Generator, Scheduler, iterate_in_thread
from kv_memory.generate.request import AHEAD, Request
from kv_memory.generate.scheduler import CHUNK_TOKENS
from kv_memory.model.kv_cache import PositionedCache
from tests.generate.scheduled import SAMPLED, before_each_pass, in_threads, scheduled, start, twelve_jobs
from tests.reference import letters, recorded_inputs, shared_backbone


@pytest.fixture
def backbone() -> Any:
    return shared_backbone("llama")


@pytest.fixture
def jobs() -> list[Any]:
    return twelve_jobs()[0]


@pytest.fixture
def expected() -> list[tuple[int, ...]]:
    return twelve_jobs()[1]


# -- together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_requests_that_join_and_leave_at_random_equal_each_alone(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], seed: int
) -> None:
    draw = random.Random(seed)
    generator = scheduled(backbone, max_batch=draw.choice([1, 2, 5, 16]), max_queue=20)
    waiting, running, answers = list(range(len(jobs))), dict[int, AnswerStream](), {}
    draw.shuffle(waiting)
    closed = set(draw.sample(waiting, 3))
    while waiting or running:
        if waiting and (not running or draw.random() < 0.2):
            index = waiting.pop()
            running[index] = start(generator, jobs[index])
        index = draw.choice(list(running))
        if index in closed and draw.random() < 0.2:
            running.pop(index).close()
        elif next(running[index], None) is None:
            answers[index] = running.pop(index).answer.token_ids
    assert answers == {index: expected[index] for index in range(len(jobs)) if index not in closed or index in answers}
    assert len(answers) >= len(jobs) - 3


@pytest.mark.parametrize("max_batch", [3, 16])
def test_threads_are_decoded_together(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], max_batch: int
) -> None:
    generator = scheduled(backbone, max_batch=max_batch)
    together = threading.Barrier(len(jobs))

    def ask(job: Any) -> tuple[int, ...]:
        together.wait()
        return start(generator, job).answer.token_ids

    with recorded_inputs(backbone) as inputs, before_each_pass(backbone, lambda: time.sleep(0.002)):
        assert in_threads([lambda job=job: ask(job) for job in jobs]) == expected  # type: ignore[misc]
    n_tokens = sum(map(len, expected))
    assert len(inputs) < n_tokens / min(max_batch, 4) * 2
    assert max(len(ids) for ids in expected) <= len(inputs)


async def test_tasks_are_decoded_together_by_one_thread_at_a_time(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = scheduled(backbone, max_batch=8)

    stepping, most = [0], [0]

    async def ask(job: Any) -> tuple[int, ...]:
        stream = start(generator, job)
        async for _ in iterate_in_thread(stream):
            pass
        return stream.answer.token_ids

    def counted(step: Callable[..., Any], *args: Any) -> Any:
        stepping[0] += 1
        most[0] = max(most[0], stepping[0])
        try:
            return step(*args)
        finally:
            stepping[0] -= 1

    lead = generator.scheduler._lead
    monkeypatch.setattr(generator.scheduler, "_lead", lambda *args: counted(lead, *args))
    with recorded_inputs(backbone) as inputs:
        found = await asyncio.gather(*(ask(job) for job in jobs))
    assert list(found) == expected
    assert len(inputs) < sum(map(len, expected)) / 2
    assert most == [1]


def test_a_batch_larger_than_the_scheduler_admits(backbone: Any, jobs: list[Any]) -> None:
    questions = [question for question, _, _ in jobs]
    caches, settings = jobs[3][1], replace(SAMPLED, seed=5)
    found = scheduled(backbone, max_batch=3, max_queue=0).generate_batch(questions, caches, settings=settings)
    alone = [Generator(backbone).generate(question, caches, settings=settings) for question in questions]
    assert [(a.token_ids, a.n_prompt_tokens, a.n_cached_tokens) for a in found] == [
        (a.token_ids, a.n_prompt_tokens, a.n_cached_tokens) for a in alone
    ]


def test_a_long_prompt_is_prefilled_in_parts_beside_others(backbone: Any) -> None:
    wide = shared_backbone("llama", max_position_embeddings=4096)
    long, short = letters(3 * CHUNK_TOKENS, seed=1), "why?"
    settings = replace(SAMPLED, seed=1)
    alone = [Generator(wide).generate(question, settings=settings).token_ids for question in (long, short)]
    generator = scheduled(wide)
    first = generator.stream(short, settings=settings)
    next(first)
    second = generator.stream(long, settings=settings)
    with recorded_inputs(wide) as inputs:
        assert [second.answer.token_ids, first.answer.token_ids] == alone
    assert [ids.shape[1] for ids in inputs][:3] == [CHUNK_TOKENS + 1] * 3
    assert first.answer.ttft_s < second.answer.ttft_s


# -- in turn -----------------------------------------------------------------------------------------------------------


def test_first_come_first_served(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drives the decoding: here it is the last one."""
    took: list[Request] = []
    take = Request.take
    monkeypatch.setattr(Request, "take", lambda self, *args: took.append(self) or take(self, *args))
    generator = scheduled(backbone, max_batch=2)
    streams = [generator.stream(f"why {n}?", settings=replace(SAMPLED, max_new_tokens=5, seed=n)) for n in range(6)]
    assert streams[-1].answer.n_new_tokens == 5
    in_turn = [stream._request for stream in streams]
    assert took == [one for pair in range(3) for one in in_turn[2 * pair : 2 * pair + 2] * 5]


def test_the_queue_is_bounded(backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]) -> None:
    generator = scheduled(backbone, max_batch=2, max_queue=1)
    streams = [start(generator, job) for job in jobs[:3]]
    with recorded_inputs(backbone) as inputs, pytest.raises(QueueFullError, match=r"^2 .* 1 wait") as caught:
        start(generator, jobs[3])
    assert inputs == [] and caught.value.next_step
    assert streams[0].answer.token_ids == expected[0]
    fourth = start(generator, jobs[3])
    with pytest.raises(QueueFullError):
        generator.scheduler.check_room()
    streams[1].close()
    generator.scheduler.check_room()
    assert fourth.answer.token_ids == expected[3] and streams[2].answer.token_ids == expected[2]


def test_those_who_wait_take_no_memory(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[PositionedCache]] = []
    init: Callable[..., None] = PositionedCache.__init__

    def noted(self: PositionedCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(PositionedCache, "__init__", noted)
    generator = scheduled(backbone, max_batch=2)
    streams = [start(generator, job) for job in jobs[:6]]
    assert len(made) == 2
    with pytest.raises(ContextWindowError):  # at the call all the same
        generator.stream("why?", jobs[0][1], settings=DecodeSettings(max_new_tokens=500))
    most = [0]

    def count() -> None:
        most[0] = max(most[0], sum(cache() is not None for cache in made))

    with before_each_pass(backbone, count):
        assert [stream.answer.token_ids for stream in streams] == expected[:6]
    assert most == [2] and len(made) == 6


def test_a_cache_that_cannot_be_composed_at_its_turn_is_an_error_of_its_request_alone(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = scheduled(backbone, max_batch=1)
    first, second = start(generator, jobs[0]), start(generator, jobs[1])
    monkeypatch.setattr(second._request, "_cache", lambda: 1 // 0)
    third = start(generator, jobs[2])
    assert third.answer.token_ids == expected[2] and first.answer.token_ids == expected[0]
    with pytest.raises(ZeroDivisionError):
        list(second)


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"max_queue": -1}])
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Scheduler(**limits)


def test_waiting_counts_towards_the_first_token_and_the_time_limit(backbone: Any) -> None:
    generator = scheduled(backbone, max_batch=1)
    long = replace(SAMPLED, max_new_tokens=40, seed=1)
    with before_each_pass(backbone, lambda: time.sleep(0.01)):
        first = generator.stream("why?", settings=long)
        next(first)
        works = [
            lambda: first.answer,
            lambda: generator.generate("who?", settings=replace(long, max_new_tokens=1)),
            lambda: generator.generate("who?", settings=replace(long, timeout_s=0.05)),
        ]
        answer, later, late = in_threads(works)
    assert later.ttft_s > 0.2 and answer.total_s > 0.4
    assert isinstance(late, DecodeTimeoutError) and "; 0 tokens" in late.what


def test_a_slow_consumer_is_paused_and_keeps_nobody_waiting(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]
) -> None:
    generator = scheduled(backbone, max_batch=1)
    slow = generator.stream("why?", settings=replace(SAMPLED, seed=2, max_new_tokens=60))
    with recorded_inputs(backbone) as inputs:
        pieces = [next(slow)]
        for index in (0, 1, 3):
            assert start(generator, jobs[index]).answer.token_ids == expected[index]
        assert len(inputs) <= 1 + AHEAD + sum(len(expected[index]) for index in (0, 1, 3))
    pieces += slow
    assert slow.answer.n_new_tokens == 60 and "".join(pieces) == slow.answer.text
