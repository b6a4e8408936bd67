"""Caches of a ranking: their order and the bias of those behind the best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Reconstruction
from kv_memory.generate import add_bias, compose, place_ranked
from tests.reference import letters, shared_backbone

NAMES = ["llama", "gemma2", "gemma3"]
QUESTION = [7, 8, 9, 10]


def distilled(name: str, selector: Any, n: int = 2) -> list[DistilledCache]:
    compressor = Compressor(shared_backbone(name), selector=selector)
    return [compressor.compress(letters(34, seed=seed), keep_ratio=0.25) for seed in range(n)]


@torch.no_grad()
def logits(name: str, caches: list[DistilledCache]) -> torch.Tensor:
    backbone = shared_backbone(name)
    made = compose(backbone, caches, n_question=len(QUESTION))
    return backbone.logits(torch.tensor([QUESTION]), made).float()


def twice(cache: DistilledCache) -> DistilledCache:
    """Every entry of a cache with equally full heads two times."""
    changes = {name: getattr(cache, name).repeat_interleave(2, dim=2) for name in ("keys", "values")}
    return replace(cache, **changes, positions=cache.positions.repeat_interleave(2, dim=-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_of_log_2_counts_every_entry_twice(name: str) -> None:
    best, other = distilled(name, "attention")
    doubled = logits(name, [best, twice(other)])
    torch.testing.assert_close(logits(name, [best, add_bias(other, math.log(2))]), doubled, atol=2e-3, rtol=1e-3)
    assert (logits(name, [best, other]) - doubled).abs().max() > 0.01


@pytest.mark.parametrize("selector", ["attention", Reconstruction(part_tokens=32), "matched"])
def test_the_bias_is_added_to_every_entry_and_the_cache_stays_as_it_is(selector: Any) -> None:
    (cache,) = distilled("llama", selector, n=1)
    before = None if cache.bias is None else cache.bias.clone()
    biased = add_bias(cache, -1.5)
    expected = torch.full(cache.keys.shape[:-1], -1.5) + (0 if before is None else before.float())
    assert biased.bias is not None
    torch.testing.assert_close(biased.bias.float(), expected, atol=1e-2, rtol=1e-3)
    assert biased.keys is cache.keys and (cache.bias is None if before is None else torch.equal(cache.bias, before))
    assert add_bias(cache, 0.0) is cache


def test_only_the_passages_behind_the_best_are_biased() -> None:
    caches = distilled("llama", "attention", n=3)
    for order, best in (("best_last", 2), ("best_first", 0)):
        placed = place_ranked(caches, order=order, rank_bias=-1)  # type: ignore[arg-type]
        assert placed[best] is caches[0]
        assert [cache.bias is None for cache in placed].count(True) == 1
    keys = [cache.keys for cache in place_ranked(caches)]
    assert keys == [cache.keys for cache in caches[::-1]]  # compared by identity first
    assert place_ranked([]) == []
