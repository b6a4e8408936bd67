"""Several requests in one packed forward pass, against each of them alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Matched, MatchSettings, Reconstruction
from kv_memory.generate import compose
from kv_memory.model.kv_cache import PositionedCache
from tests.conftest import ARCHITECTURES
from tests.reference import assert_close, letters, recorded_inputs, shared_backbone

N_NEW = 12
EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))
PROMPTS = [list(letters(n, seed=n).encode()) for n in (9, 1, 31, 5, 70)]


@functools.cache
def documents(backbone: Any) -> list[list[DistilledCache]]:
    """Of each request: heads with different numbers of entries and biases, one number for all, both, none, and long."""
    matched = Compressor(backbone, selector=Matched(MatchSettings(part_tokens=32, key_steps=0)))
    ragged = Compressor(backbone, selector=Reconstruction(part_tokens=32))
    even = Compressor(backbone, selector="attention")
    first, second, third = letters(40, seed=1), letters(30, seed=2), letters(25, seed=3)
    return [
        [matched.compress(first, keep_ratio=0.25)],
        [even.compress(second, keep_ratio=0.5)],
        [ragged.compress(third, keep_ratio=0.3), even.compress(second, keep_ratio=0.2)],
        [],
        [matched.compress(first, keep_ratio=0.25), matched.compress(second, keep_ratio=0.5)],
    ]


def composed(backbone: Any) -> list[PositionedCache]:
    return [
        compose(backbone, caches, n_question=len(prompt), n_new=N_NEW)
        for caches, prompt in zip(documents(backbone), PROMPTS, strict=True)
    ]


@EVERY
@torch.no_grad()
def test_packed_requests_equal_each_alone(name: str) -> None:
    """One by one they join, and then decode beside prompts; longrope changes its frequencies for some of them."""
    backbone = shared_backbone(name)
    together, alone = composed(backbone), composed(backbone)
    for step in range(N_NEW):
        rows = []
        for index, prompt in enumerate(PROMPTS):
            if index == step:
                rows.append((index, prompt))
            elif index < step:
                rows.append((index, [65 + index + step]))
        with recorded_inputs(backbone) as inputs:
            found = backbone.packed_logits([(ids, together[index]) for index, ids in rows])
        if not backbone.rope.varies:
            assert [tuple(ids.shape) for ids in inputs] == [(1, sum(len(ids) for _, ids in rows))]
        assert found.shape == (len(rows), backbone.config.vocab_size)
        for logits, (index, ids) in zip(found, rows, strict=True):
            assert_close(logits, backbone.logits(torch.tensor([ids]), alone[index])[0])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.next_positions, other.next_positions)
        assert torch.equal(one.appended_positions, other.appended_positions)


def test_longrope_requests_of_different_frequencies_are_kept_apart() -> None:
    backbone = shared_backbone("phi3_longrope")
    caches = composed(backbone)
    regimes = [backbone.rope.regime(int(c.next_positions) + len(p)) for c, p in zip(caches, PROMPTS, strict=True)]
    assert regimes.count(("longrope", True)) in range(1, len(PROMPTS))
    with torch.no_grad(), recorded_inputs(backbone) as inputs:
        backbone.packed_logits(list(zip(PROMPTS, caches, strict=True)))
    assert len(inputs) == 2
    assert sum(ids.shape[1] for ids in inputs) == sum(map(len, PROMPTS))


@EVERY
@torch.no_grad()
def test_logits_after_every_token(name: str) -> None:
    backbone = shared_backbone(name)
    found = backbone.packed_logits(list(zip(PROMPTS, composed(backbone), strict=True)), every=True)
    parts = found.split([len(prompt) for prompt in PROMPTS])
    for prompt, cache, logits in zip(PROMPTS, composed(backbone), parts, strict=True):
        expected = backbone.logits(torch.tensor([prompt]), cache, every=True)[0]
        assert_close(logits, expected)


@EVERY
@torch.no_grad()
def test_copies_of_a_composed_cache_are_decoded_apart(name: str) -> None:
    backbone = shared_backbone(name)
    for caches in documents(backbone):
        whole = compose(backbone, caches, n_question=40)
        before = [tensor.clone() for index in range(4) for tensor in whole.layer(index)]
        copies = [whole.copy(room=room) for room in (0, 3, 41)]
        for copy, prompt in zip(copies, PROMPTS, strict=False):
            logits = backbone.logits(torch.tensor([prompt]), copy)
            assert_close(logits[0], backbone.logits(torch.tensor([prompt]), whole.copy(room=99))[0])
        real = [whole.key_positions(index)[0] != torch.iinfo(torch.int32).max for index in range(4)]
        for place, tensor in enumerate(tensor for index in range(4) for tensor in whole.layer(index)):
            seen = real[place // 2].expand(2, -1)
            assert torch.equal(tensor[0][seen], before[place][0][seen])


@EVERY
@torch.no_grad()
def test_one_row_is_an_ordinary_pass(name: str) -> None:
    """A request that is alone gets what it got before there were others: the same bits."""
    backbone = shared_backbone(name)
    for packed, plain, prompt in zip(composed(backbone), composed(backbone), PROMPTS, strict=True):
        for ids in (prompt, [66], [67]):
            expected = backbone.logits(torch.tensor([ids]), plain)
            assert torch.equal(backbone.packed_logits([(ids, packed)]), expected)
