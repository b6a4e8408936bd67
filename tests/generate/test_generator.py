from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Matched, MatchSettings
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, FingerprintMismatchError
from kv_memory.generate import Generator, compose
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import is_visible
from kv_memory.model.kv_cache import PositionedCache
from kv_memory.model.prompts import PromptForm
from tests.conftest import ARCHITECTURES, SHORT_FORM, make_backbone, make_model, make_tokenizer
from tests.reference import full_logits, letters, may_open, recorded_inputs, shared_backbone

QUESTIONS = ["why?", "where is the lamp that burned whale oil until then?", "who was it?", ""]
SAMPLED = DecodeSettings(max_new_tokens=12, temperature=1.0, top_k=50, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def caches(backbone: Any) -> list[DistilledCache]:
    compressor = Compressor(backbone, selector="attention")
    return [compressor.compress(letters(40, seed=seed), keep_ratio=0.5) for seed in (1, 2)]


@pytest.fixture(scope="module")
def generator(backbone: Any) -> Generator:
    return Generator(backbone)


# -- which tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_greedy_equals_an_argmax_loop_over_the_text(name: str) -> None:
    backbone, text = shared_backbone(name), letters(25, seed=4)
    cache = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=1.0)
    ids = [*backbone.prefix_ids, *backbone.encode_document(text), *backbone.encode_question("why?")]
    expected: list[int] = []
    for _ in range(8):
        logits = full_logits(name, ids + expected)[-1]
        if not is_visible(backbone.tokenizer.decode(expected)):
            fits = [may_open(backbone.tokenizer, expected, token) for token in range(len(logits))]
            logits = logits.masked_fill(~torch.tensor(fits), -torch.inf)
        expected.append(int(logits.argmax()))
        if expected[-1] == 2:
            break
    answer = Generator(backbone).generate("why?", [cache], settings=DecodeSettings(max_new_tokens=8))
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("kept", [[1], [1, 0], [3, 1, 2]])  # with the longest, whose length may decide frequencies
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_rows_of_a_batch_continue_after_others_are_removed(name: str, kept: list[int]) -> None:
    """Heads that hold different numbers of entries, with biases, behind questions of different lengths."""
    backbone = shared_backbone(name)
    matched = Matched(MatchSettings(part_tokens=32, key_steps=0))
    cache = Compressor(backbone, selector=matched).compress(letters(30), keep_ratio=0.25)
    asked = [backbone.encode_question(question) for question in QUESTIONS]
    lengths = torch.tensor([len(ids) for ids in asked])
    padded = torch.tensor([ids + [0] * (int(lengths.max()) - len(ids)) for ids in asked])

    def composed() -> PositionedCache:
        whole = compose(backbone, [cache], n_question=padded.shape[1], n_new=4, batch_size=len(asked))
        backbone.logits(padded, whole, lengths=lengths)
        return whole

    every, fewer = composed(), composed()
    fewer.keep_rows(kept)
    for tokens in torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]):
        expected = backbone.logits(tokens[:, None], every)[kept]
        torch.testing.assert_close(backbone.logits(tokens[kept][:, None], fewer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [DecodeSettings(max_new_tokens=15), SAMPLED])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_window"])
def test_a_batch_equals_each_question_alone(name: str, settings: DecodeSettings) -> None:
    backbone = shared_backbone(name, tie_word_embeddings=False)  # tied, a random Gemma repeats one token for ever
    cache = Compressor(backbone, selector="attention").compress(letters(40), keep_ratio=0.5)
    together = Generator(backbone).generate_batch(QUESTIONS, [cache], settings=settings)
    alone = [Generator(backbone).generate(question, [cache], settings=settings) for question in QUESTIONS]
    assert [(a.text, a.token_ids, a.finish_reason, a.n_prompt_tokens, a.n_cached_tokens) for a in together] == [
        (a.text, a.token_ids, a.finish_reason, a.n_prompt_tokens, a.n_cached_tokens) for a in alone
    ]
    if settings is SAMPLED:
        assert len({answer.token_ids for answer in together}) > 1


def test_a_finished_row_does_not_change_the_others() -> None:
    backbone = make_backbone()
    cache = Compressor(backbone, selector="attention").compress(letters(40), keep_ratio=0.5)
    free = Generator(backbone).generate_batch(QUESTIONS, [cache], settings=SAMPLED)
    # From now on a token that the first answer reaches early ends an answer.
    end = free[0].token_ids[2]
    backbone.model.generation_config.eos_token_id = [2, end]
    again = Backbone(backbone.model, backbone.tokenizer, prompt=backbone.prompt)
    ended = Generator(again).generate_batch(QUESTIONS, [cache], settings=SAMPLED)
    assert len(ended[0].token_ids) <= 3 and ended[0].finish_reason == "stop"
    for before, after in zip(free, ended, strict=True):
        ids = list(before.token_ids)
        assert list(after.token_ids) == (ids[: ids.index(end) + 1] if end in ids else ids)
    assert len({len(answer.token_ids) for answer in ended}) > 1


def test_seeds_make_sampling_reproducible(generator: Generator, caches: list[DistilledCache]) -> None:
    def answer(seed: int | None) -> tuple[int, ...]:
        return generator.generate("why?", caches, settings=replace(SAMPLED, seed=seed)).token_ids

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(3)}) == 3
    assert len({answer(None) for _ in range(3)}) > 1


def test_sampling_from_one_token_is_greedy(generator: Generator, caches: list[DistilledCache]) -> None:
    greedy = generator.generate("why?", caches, settings=DecodeSettings(max_new_tokens=15))
    for change in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        settings = replace(SAMPLED, **{"top_k": 0, "top_p": 1.0, **change})  # type: ignore[arg-type]
        assert generator.generate("why?", caches, settings=settings).token_ids == greedy.token_ids


def test_a_document_as_text_equals_its_uncompressed_cache(backbone: Any, generator: Generator) -> None:
    text = letters(40, seed=3)
    cache = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=1.0)
    expected = generator.generate("why?", [cache], settings=DecodeSettings(max_new_tokens=10))
    answer = generator.stream("why?", texts=[text], settings=DecodeSettings(max_new_tokens=10)).answer
    assert answer.token_ids == expected.token_ids
    assert (answer.n_cached_tokens, answer.n_prompt_tokens) == (11, expected.n_prompt_tokens + 46)


def test_an_answer_without_documents(generator: Generator, backbone: Any) -> None:
    answer = generator.generate("why?", settings=DecodeSettings(max_new_tokens=5))
    ids = [*backbone.prefix_ids, *backbone.encode_question("why?")]
    assert answer.token_ids[0] == int(full_logits("llama", ids)[-1].argmax())
    assert answer.n_cached_tokens == 11


def test_a_batch_without_questions_is_empty(generator: Generator) -> None:
    assert generator.generate_batch([]) == []


# -- where an answer ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9])
def test_max_new_tokens_limits_tokens_and_forward_passes(
    generator: Generator, backbone: Any, caches: list[DistilledCache], n: int
) -> None:
    with recorded_inputs(backbone) as inputs:
        answer = generator.generate("why?", caches, settings=replace(SAMPLED, max_new_tokens=n))
    assert len(answer.token_ids) == n == len(inputs)  # no forward pass for a token that nobody wants
    assert answer.finish_reason == "length"


def test_stop_strings_end_the_answer(generator: Generator, backbone: Any, caches: list[DistilledCache]) -> None:
    free = generator.generate("why?", caches, settings=replace(SAMPLED, max_new_tokens=40))
    printable = [i for i in range(5, len(free.text) - 3) if free.text[i : i + 3].isprintable()]
    stop = free.text[printable[0] : printable[0] + 3]
    settings = replace(SAMPLED, max_new_tokens=40, stop=("never in there", stop))
    answer = generator.generate("why?", caches, settings=settings)
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) < len(free.token_ids)
    pieces = list(generator.stream("why?", caches, settings=settings))
    assert "".join(pieces) == answer.text
    # The form's own stop strings hold as well.
    form = PromptForm(**SHORT_FORM, stop=(stop,))  # type: ignore[arg-type]
    other = Generator(Backbone(backbone.model, backbone.tokenizer, prompt=form))
    assert other.generate("why?", caches, settings=replace(SAMPLED, max_new_tokens=40)).text == answer.text


def test_token_counts_and_times_are_reported(generator: Generator, backbone: Any, caches: list[DistilledCache]) -> None:
    answer = generator.generate("why?", caches, settings=SAMPLED)
    assert answer.n_prompt_tokens == len(backbone.encode_question("why?"))
    assert answer.n_cached_tokens == 11 + sum(cache.n_kept for cache in caches)
    assert 0 < answer.ttft_s < answer.total_s


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_joined_pieces_equal_the_answer(generator: Generator, caches: list[DistilledCache], seed: int) -> None:
    settings = replace(SAMPLED, seed=seed, max_new_tokens=30)  # sampled bytes: many are half a character
    pieces = list(generator.stream("why?", caches, settings=settings))
    assert "".join(pieces) == generator.generate("why?", caches, settings=settings).text
    assert all(pieces)


def test_a_stream_raises_at_the_call(generator: Generator, caches: list[DistilledCache]) -> None:
    foreign = replace(caches[0], fingerprint=replace(caches[0].fingerprint, weights="0" * 64))
    with pytest.raises(FingerprintMismatchError):
        generator.stream("why?", [foreign])


def test_a_closed_stream_stops_decoding(generator: Generator, backbone: Any, caches: list[DistilledCache]) -> None:
    with recorded_inputs(backbone) as inputs:
        stream: Any = generator.stream("why?", caches, settings=SAMPLED)
        next(stream)
        before = len(inputs)
        stream.close()
        assert list(stream) == []
        assert len(inputs) == before < SAMPLED.max_new_tokens


def test_gradients_stay_enabled_between_pieces(generator: Generator, caches: list[DistilledCache]) -> None:
    assert torch.is_grad_enabled()
    for _ in generator.stream("why?", caches, settings=SAMPLED):
        assert torch.is_grad_enabled()


@contextmanager
def slowed(backbone: Any, seconds: float) -> Iterator[None]:
    handle = backbone.decoder.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


async def longest_stall_s(generator: Generator, caches: list[DistilledCache], settings: DecodeSettings) -> float:
    stalls, done = [0.0], False

    async def tick() -> None:
        while not done:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            stalls.append(time.perf_counter() - before)

    ticking = asyncio.create_task(tick())
    async for _ in generator.astream("why?", caches, settings=settings):
        pass
    done = True
    await ticking
    assert len(stalls) > 20
    return max(stalls)


async def test_the_model_does_not_block_the_event_loop(
    generator: Generator, backbone: Any, caches: list[DistilledCache]
) -> None:
    settings = replace(SAMPLED, max_new_tokens=3)
    with slowed(backbone, 0.2):
        stalls = []
        for _ in range(3):  # a busy machine may stall us once; a loop that waits stalls every time
            stalls.append(await longest_stall_s(generator, caches, settings))
            if stalls[-1] < 0.05:
                break
    assert stalls[-1] < 0.05, stalls


async def test_an_asynchronous_stream_gives_the_same_answer(generator: Generator, caches: list[DistilledCache]) -> None:
    pieces = [piece async for piece in generator.astream("why?", caches, settings=SAMPLED)]
    assert "".join(pieces) == generator.generate("why?", caches, settings=SAMPLED).text
    assert torch.is_grad_enabled()


async def test_a_cancelled_stream_leaves_the_generator_usable(
    generator: Generator, backbone: Any, caches: list[DistilledCache]
) -> None:
    expected = generator.generate("why?", caches, settings=SAMPLED)
    taken: list[str] = []
    started = asyncio.Event()

    async def take() -> None:
        async for piece in generator.astream("why?", caches, settings=SAMPLED):
            taken.append(piece)
            started.set()

    with slowed(backbone, 0.05), recorded_inputs(backbone) as inputs:
        task = asyncio.create_task(take())
        await asyncio.wait_for(started.wait(), 10)
        await asyncio.sleep(0.02)  # into the middle of a step
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        read = len(inputs)
        await asyncio.sleep(0.15)
        assert len(inputs) == read < SAMPLED.max_new_tokens  # nobody goes on decoding
    assert 0 < len(taken) < len(expected.token_ids)
    assert generator.generate("why?", caches, settings=SAMPLED).token_ids == expected.token_ids
    pieces = [piece async for piece in generator.astream("why?", caches, settings=SAMPLED)]
    assert "".join(pieces) == expected.text


async def test_leaving_an_asynchronous_stream_stops_decoding(
    generator: Generator, backbone: Any, caches: list[DistilledCache]
) -> None:
    with recorded_inputs(backbone) as inputs:
        stream: Any = generator.astream("why?", caches, settings=SAMPLED)
        async for _ in stream:
            break
        await stream.aclose()
    assert len(inputs) < SAMPLED.max_new_tokens


async def test_an_asynchronous_stream_raises_errors(generator: Generator, caches: list[DistilledCache]) -> None:
    foreign = replace(caches[0], fingerprint=replace(caches[0].fingerprint, weights="0" * 64))
    with pytest.raises(FingerprintMismatchError):
        async for _ in generator.astream("why?", [foreign]):
            pass


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_concurrent_threads_get_their_own_answers(name: str) -> None:
    backbone = Backbone(make_model(name), make_tokenizer(), prompt=PromptForm(**SHORT_FORM))  # type: ignore[arg-type]
    compressor = Compressor(backbone, selector="attention")
    short, long = (compressor.compress(letters(n, seed=n), keep_ratio=0.5) for n in (20, 150))
    jobs = [("why?", [short]), ("where?", [long]), ("who?", [short, long]), ("when?", [])]
    generator = Generator(backbone)
    expected = [generator.generate(question, given, settings=SAMPLED).token_ids for question, given in jobs]
    found: dict[tuple[int, int], Any] = {}

    def ask(index: int, round_: int) -> None:
        try:
            found[index, round_] = generator.generate(*jobs[index], settings=SAMPLED).token_ids
        except BaseException as error:
            found[index, round_] = error

    threads = [threading.Thread(target=ask, args=(i, r)) for r in range(3) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(i, r): expected[i] for r in range(3) for i in range(len(jobs))}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop", ("",)),
        ("stop", "text"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        DecodeSettings(**{name: value})
    assert caught.value.where == name
