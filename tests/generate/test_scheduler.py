"""Requests that decode together: they join, leave, wait, are closed, are slow, and fail."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Reconstruction
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, DecodeFailedError, DecodeTimeoutError, QueueFullError
from kv_memory.generate import AnswerStream, Generator, Scheduler, iterate_in_thread
from kv_memory.generate.request import AHEAD, Request
from kv_memory.generate.scheduler import CHUNK_TOKENS
from tests.reference import letters, recorded_inputs, shared_backbone

SAMPLED = DecodeSettings(max_new_tokens=30, temperature=1.0, top_p=0.95)


@pytest.fixture(scope="module")
def backbone() -> Any:
    return shared_backbone("llama")


@pytest.fixture(scope="module")
def jobs(backbone: Any) -> list[tuple[str, list[DistilledCache], DecodeSettings]]:
    """Questions of different lengths about different documents, each with a seed and a length of its own."""
    compressor = Compressor(backbone, selector=Reconstruction(part_tokens=32))
    caches = [compressor.compress(letters(n, seed=n), keep_ratio=0.4) for n in (20, 35, 50)]
    documents: list[list[DistilledCache]] = [[caches[0]], [caches[1]], [], [caches[2], caches[0]]]
    return [
        (letters(3 + 5 * n, seed=n), documents[n % 4], replace(SAMPLED, seed=n, max_new_tokens=8 + 7 * (n % 5)))
        for n in range(12)
    ]


@pytest.fixture(scope="module")
def expected(backbone: Any, jobs: list[Any]) -> list[tuple[int, ...]]:
    return [Generator(backbone).generate(q, caches, settings=s).token_ids for q, caches, s in jobs]


def scheduled(backbone: Any, **limits: int) -> Generator:
    return Generator(backbone, scheduler=Scheduler(**limits))


def start(generator: Generator, job: Any) -> AnswerStream:
    question, caches, settings = job
    return generator.stream(question, caches, settings=settings)


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of all works, or what they raised."""
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == len(works), "a thread hangs"
    return [found[index] for index in range(len(works))]


@contextmanager
def before_each_pass(backbone: Any, work: Callable[[], Any]) -> Iterator[None]:
    handle = backbone.decoder.register_forward_pre_hook(lambda *_: work() and None)
    try:
        yield
    finally:
        handle.remove()


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


# -- closed ------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_lost_leaves_its_place_and_frees_its_cache(
    backbone: Any, jobs: list[Any], expected: list[tuple[int, ...]]
) -> None:
    generator = scheduled(backbone, max_batch=1, max_queue=0)
    lost = start(generator, jobs[3])
    next(lost)
    request: Any = lost._request
    cache = weakref.ref(request.cache)
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
