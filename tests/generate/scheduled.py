"""Requests for the tests of the scheduler: what they ask, how they are started, and what they give alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Reconstruction
from kv_memory.config import DecodeSettings
from kv_memory.generate import AnswerStream, Generator, Scheduler
from tests.reference import letters, shared_backbone

SAMPLED = DecodeSettings(max_new_tokens=30, temperature=1.0, top_p=0.95)
Job = tuple[str, list[DistilledCache], DecodeSettings]


@cache
def twelve_jobs() -> tuple[list[Job], list[tuple[int, ...]]]:
    """Questions of different lengths about different documents, each with a seed and a length of its own.

    With the tokens of their answers when each is alone.
    """
    backbone = shared_backbone("llama")
    compressor = Compressor(backbone, selector=Reconstruction(part_tokens=32))
    caches = [compressor.compress(letters(n, seed=n), keep_ratio=0.4) for n in (20, 35, 50)]
    documents: list[list[DistilledCache]] = [[caches[0]], [caches[1]], [], [caches[2], caches[0]]]
    jobs = [
        (letters(3 + 5 * n, seed=n), documents[n % 4], replace(SAMPLED, seed=n, max_new_tokens=8 + 7 * (n % 5)))
        for n in range(12)
    ]
    return jobs, [Generator(backbone).generate(q, caches, settings=s).token_ids for q, caches, s in jobs]


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
