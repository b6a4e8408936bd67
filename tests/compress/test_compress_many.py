"""Several documents in one batch: what comes out is what comes out of each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.keep import Keep
from kv_memory.compress import Compressor, Matched, MatchSettings
from kv_memory.compress import windows as windows_module
from kv_memory.errors import ConfigError, EmptyDocumentError
from tests.compress.test_compressor import ADAPTERS, NAMES, compressor_for
from tests.reference import by_head, letters, recorded_inputs, shared_backbone

LENGTHS = [60, 23, 1, 90, 41]
TEXTS = [letters(n, seed=n) for n in LENGTHS]


def assert_like(made: DistilledCache, alone: DistilledCache) -> None:
    matched = alone.bias is not None  # steps of gradient descent carry what sums differ in further
    near = {"rtol": 1e-2, "atol": 2e-3} if matched else {"rtol": 1e-3, "atol": 1e-4}
    assert (made.n_tokens, made.n_kept, made.fingerprint) == (alone.n_tokens, alone.n_kept, alone.fingerprint)
    assert (made.counts is None) == (alone.counts is None) and made.per_head == alone.per_head
    for layers in zip(by_head(made), by_head(alone), strict=True):
        for head, other in zip(*layers, strict=True):
            assert head[0].tolist() == other[0].tolist()
            for ours, theirs in zip(head[1:], other[1:], strict=True):
                torch.testing.assert_close(ours, theirs, **near)
    assert (made.bias is None) == (alone.bias is None)
    if made.bias is not None and alone.bias is not None:
        torch.testing.assert_close(made.bias, alone.bias, **near)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", method) for method in ADAPTERS] + [(name, "adapter_document_ragged") for name in NAMES[1:]],
)
def test_batched_documents_equal_single_ones(name: str, method: str) -> None:
    compressor = compressor_for(name, method)
    alone = [compressor.compress(text, keep_ratio=0.3) for text in TEXTS]
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    together = len(TEXTS) - (name == "phi3_longrope")  # whose longest text has other rotary frequencies
    assert max(ids.shape[0] for ids in inputs) == together, "they were not read together"
    for ours, theirs in zip(made, alone, strict=True):
        assert_like(ours, theirs)


def matching(name: str, **options: Any) -> Compressor:
    selector = Matched(MatchSettings(part_tokens=128, **{"key_steps": 6, "rows_per_step": 64, **options}))
    return Compressor(shared_backbone(name), selector=selector)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2_window", "phi3_window", "phi3_longrope"])
def test_batched_matched_documents_equal_single_ones(name: str) -> None:
    compressor = matching(name)
    alone = [compressor.compress(text, keep_ratio=0.3) for text in TEXTS]
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    if name == "phi3_longrope":  # its frequencies change between a document and the rows behind it
        assert [one.to_bytes() for one in made] == [one.to_bytes() for one in alone]
        return
    assert [ids.shape[0] for ids in inputs] == [5, 40, 5], "documents, eight questions behind each, repetitions"
    for ours, theirs in zip(made, alone, strict=True):
        assert ours.bias is not None and ours.bias.any()
        assert_like(ours, theirs)


def test_matched_documents_with_different_stages_can_be_batched() -> None:
    compressor = matching("llama", rows_per_step=40)
    ratios = [0.2, 0.9, 1.0, 0.05, 0.45]  # of four times 0.45 there is nothing to prune, of 1.0 nothing to do
    made = compressor.compress_many(TEXTS, keep_ratio=ratios)
    for text, ratio, ours in zip(TEXTS, ratios, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=ratio))


@pytest.mark.parametrize("most", [8192, 200])
def test_row_limits_apply_to_each_matched_document(most: int) -> None:
    compressor = matching("llama", max_rows=most, max_final_rows=most)
    made = compressor.compress_many(TEXTS[:2], keep_ratio=0.3)
    for text, ours in zip(TEXTS, made, strict=False):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))


def test_a_document_of_several_parts_is_matched_alone() -> None:
    compressor = Compressor(shared_backbone("llama"), selector=Matched(MatchSettings(part_tokens=64, key_steps=6)))
    with recorded_inputs(compressor.backbone) as inputs:
        compressor.compress_many(TEXTS, keep_ratio=0.3)
    sizes = [ids.shape[0] for ids in inputs]
    assert sizes[:3] == [3, 24, 3] and sizes[3:] == [1, 8, 1, 1] * 2


def test_matched_batches_are_halved_when_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, sizes = matching("llama"), []
    match = Matched.match

    def small(self: Matched, documents: Any, *args: Any) -> Any:
        sizes.append(len(documents))
        if len(documents) > 3:
            raise torch.OutOfMemoryError("too much")
        return match(self, documents, *args)

    monkeypatch.setattr(Matched, "match", small)
    made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    assert sizes == [5, 2, 3]
    for text, ours in zip(TEXTS, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))


def test_each_document_can_have_its_own_keep_ratio() -> None:
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


def test_documents_that_cannot_be_batched_are_compressed_alone() -> None:
    compressor = compressor_for("llama", "adapter_head", window_tokens=64)  # the longest has two windows
    with recorded_inputs(compressor.backbone) as inputs:
        made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    assert sorted({ids.shape[0] for ids in inputs}) == [1, 3]  # those of 23, 1 and 41 letters and their wrappers
    for text, ours in zip(TEXTS, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))
    whole = compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=1.0)
    assert [cache.n_kept for cache in whole] == [cache.n_tokens for cache in whole]


def test_training_free_selectors_compress_one_by_one() -> None:
    compressor = compressor_for("llama", "attention")
    made = compressor.compress_many(TEXTS[:2], keep_ratio=0.3)
    assert [cache.to_bytes() for cache in made] == [
        compressor.compress(text, keep_ratio=0.3).to_bytes() for text in TEXTS[:2]
    ]


def test_batches_are_halved_when_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor: Compressor = compressor_for("llama", "adapter_head")
    read, sizes = windows_module.prefill_documents, []

    def small(adapter: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("too much")
        return read(adapter, ids, *args, **options)

    monkeypatch.setattr(windows_module, "prefill_documents", small)
    made = compressor.compress_many(TEXTS, keep_ratio=0.3)
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.undo()
    for text, ours in zip(TEXTS, made, strict=True):
        assert_like(ours, compressor.compress(text, keep_ratio=0.3))


def test_a_single_document_that_exceeds_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(windows_module, "prefill_documents", never)
    with pytest.raises(torch.OutOfMemoryError):
        compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=0.3)


def test_empty_documents_and_invalid_ratios_are_rejected() -> None:
    compressor = compressor_for("llama", "adapter_head")
    assert compressor.compress_many([], keep_ratio=0.3) == []
    with pytest.raises(EmptyDocumentError):
        compressor.compress_many([TEXTS[0], "  "], keep_ratio=0.3)
    with pytest.raises(ConfigError, match="keep_ratio"):
        compressor.compress_many(TEXTS, keep_ratio=0.0)


def test_assert_like_detects_a_changed_cache() -> None:
    made = compressor_for("llama", "adapter_head").compress_many(TEXTS[:2], keep_ratio=0.3)
    with pytest.raises(AssertionError):
        assert_like(replace(made[0], keys=made[0].keys + 0.01), made[0])
