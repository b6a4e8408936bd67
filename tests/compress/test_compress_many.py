"""Several documents in one batch: what comes out is what comes out of each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.cache import DistilledCache
from kv_memory.compress import Compressor
from kv_memory.compress import compressor as compressor_module
from kv_memory.errors import ConfigError, EmptyDocumentError
from kv_memory.keep import Keep
from tests.compress.test_compressor import ADAPTERS, NAMES, compressor_for
from tests.reference import by_head, letters, recorded_inputs

LENGTHS = [60, 23, 1, 90, 41]
TEXTS = [letters(n, seed=n) for n in LENGTHS]


def assert_like(made: DistilledCache, alone: DistilledCache) -> None:
    assert (made.n_tokens, made.n_kept, made.fingerprint) == (alone.n_tokens, alone.n_kept, alone.fingerprint)
    assert (made.counts is None) == (alone.counts is None) and made.per_head == alone.per_head
    for layers in zip(by_head(made), by_head(alone), strict=True):
        for head, other in zip(*layers, strict=True):
            assert head[0].tolist() == other[0].tolist()
            for ours, theirs in zip(head[1:], other[1:], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_as_if_alone(name: str, method: str) -> None:
    compressor = compressor_for(name, method)
    alone = [compressor.compress(text, keep_ratio=0.3) for text in TEXTS]
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    together = len(TEXTS) - (name == "phi3_longrope")  # whose longest text has other rotary frequencies
    assert max(ids.shape[0] for ids in inputs) == together, "they were not read together"
    for ours, theirs in zip(made, alone, strict=True):
        assert_like(ours, theirs)


def test_each_has_a_keep_ratio_of_its_own() -> None:
    compressor = compressor_for("llama", "adapter_head")
    ratios = [compressor.ratio_for(text, Keep(keep_tokens=7)) for text in TEXTS]
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=ratios)
    assert max(ids.shape[0] for ids in inputs) > 1
    for text, ratio, ours in zip(TEXTS, ratios, made, strict=True):
        assert (ours.n_kept, ours.keep_ratio) == (min(7, ours.n_tokens), ratio)
        assert_like(ours, compressor.compress(text, keep_ratio=ratio))
    with pytest.raises(ConfigError, match="keep_ratio"):
        compressor.compress_many(TEXTS[:2], keep_ratio=[0.3, 0.0])


def test_what_cannot_be_batched_is_compressed_alone() -> None:
    compressor = compressor_for("llama", "adapter_head", window_tokens=64)  # the longest has two windows
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    assert sorted({ids.shape[0] for ids in inputs}) == [1, 3]  # those of 23, 1 and 41 letters and their wrappers
    for text, ours in zip(TEXTS, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))
    whole = compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=1.0)
    assert [cache.n_kept for cache in whole] == [cache.n_tokens for cache in whole]


def test_a_training_free_selector_reads_one_by_one() -> None:
    compressor = compressor_for("llama", "attention")
    made = compressor.compress_many(TEXTS[:2], keep_ratio=0.3)
    assert [cache.to_bytes() for cache in made] == [
        compressor.compress(text, keep_ratio=0.3).to_bytes() for text in TEXTS[:2]
    ]


def test_what_memory_does_not_hold_together_is_read_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor: Compressor = compressor_for("llama", "adapter_head")
    read, sizes = compressor_module.read_documents, []

    def small(adapter: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("too much")
        return read(adapter, ids, *args, **options)

    monkeypatch.setattr(compressor_module, "read_documents", small)
    made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.undo()
    for text, ours in zip(TEXTS, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))


def test_one_that_memory_does_not_hold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(compressor_module, "read_documents", never)
    with pytest.raises(torch.OutOfMemoryError):
        compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=0.3)


def test_what_is_refused() -> None:
    compressor = compressor_for("llama", "adapter_head")
    assert compressor.compress_many([], keep_ratio=0.3) == []
    with pytest.raises(EmptyDocumentError):
        compressor.compress_many([TEXTS[0], "  "], keep_ratio=0.3)
    with pytest.raises(ConfigError, match="keep_ratio"):
        compressor.compress_many(TEXTS, keep_ratio=0.0)


def test_it_can_be_told_from_a_wrong_one() -> None:
    made = compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=0.3)
    with pytest.raises(AssertionError):
        assert_like(replace(made[0], keys=made[0].keys + 0.01), made[0])
