from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor, Reconstruction
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, ContextWindowError, FingerprintMismatchError
from kv_memory.generate import Generator, compose
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_backbone, make_model, make_tokenizer
from tests.reference import assert_close, by_head, letters, recorded_inputs, shared_backbone

NAMES = ["llama", "gemma3", "phi3_longrope"]
N_PREFIX = 11


def distilled(backbone: Any, *, selector: Any = "attention", n: int = 3, length: int = 34) -> list[DistilledCache]:
    compressor = Compressor(backbone, selector=selector)
    return [compressor.compress(letters(length, seed=seed), keep_ratio=0.25) for seed in range(n)]


def free_keys(backbone: Any, made: Any, n_positions: int) -> torch.Tensor:
    keys = torch.stack([made.layer(index)[0][0] for index in range(backbone.num_layers)])
    return backbone.rope.unrotate(keys, made.composed_positions, n_positions=n_positions)


@pytest.mark.parametrize("selector", ["attention", "sink_recent"])
@pytest.mark.parametrize("name", NAMES)
def test_source_and_packed_positions(name: str, selector: str) -> None:
    backbone = shared_backbone(name)
    caches = distilled(backbone, selector=selector)  # 40 tokens each, 10 kept
    prefix = torch.arange(N_PREFIX)
    for layout, step in (("source", 40), ("packed", 10)):
        made = compose(backbone, caches, layout=layout, n_question=7)  # type: ignore[arg-type]
        assert int(made.next_positions) == N_PREFIX + 3 * step
        for layer in range(backbone.num_layers):
            for head in range(2):
                rows = [prefix]
                for index, cache in enumerate(caches):
                    inside = torch.arange(10)
                    if layout == "source":
                        inside = cache.positions[layer, head] if cache.per_head else cache.positions
                    rows.append(N_PREFIX + index * step + inside)
                found = made.key_positions(layer)[0]
                assert torch.equal(found[head if len(found) > 1 else 0].long(), torch.cat(rows).long())


@pytest.mark.parametrize("layout", ["source", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_another_order_changes_positions_only(name: str, layout: Any) -> None:
    backbone = shared_backbone(name)
    caches = distilled(backbone)
    order = [2, 0, 1]
    one = compose(backbone, caches, layout=layout, n_question=7)
    other = compose(backbone, [caches[i] for i in order], layout=layout, n_question=7)
    n_positions = int(one.next_positions) + 7
    first, second = free_keys(backbone, one, n_positions), free_keys(backbone, other, n_positions)
    moved = False
    for place, index in enumerate(order):
        here = slice(N_PREFIX + 10 * index, N_PREFIX + 10 * index + 10)
        there = slice(N_PREFIX + 10 * place, N_PREFIX + 10 * place + 10)
        torch.testing.assert_close(first[:, :, here], second[:, :, there], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first[:, :, here], caches[index].keys, rtol=1e-4, atol=1e-4)
        for layer in range(backbone.num_layers):
            assert torch.equal(one.layer(layer)[1][:, :, here], other.layer(layer)[1][:, :, there])
            assert torch.equal(one.layer(layer)[1][0, :, here], caches[index].values[layer])
            moved |= not torch.equal(one.layer(layer)[0][:, :, here], other.layer(layer)[0][:, :, there])
    assert moved


def test_shared_and_per_head_positions_can_be_mixed(backbone: Any) -> None:
    caches = [*distilled(backbone, n=1), *distilled(backbone, selector="sink_recent", n=1)]
    made = compose(backbone, caches, n_question=3)
    assert made.composed_positions.shape == (4, 2, N_PREFIX + 20)
    assert torch.equal(
        made.composed_positions[..., N_PREFIX + 10 :] - N_PREFIX - 40, caches[1].positions.expand(4, 2, -1)
    )


@pytest.mark.parametrize("layout", ["source", "packed"])
@pytest.mark.parametrize("name", [*NAMES, "mistral", "gemma2"])
def test_ragged_caches_compose_with_rectangular_ones(name: str, layout: Any) -> None:
    """Ragged caches beside one with a number for all: every head sees its own entries and nothing else."""
    backbone = shared_backbone(name)
    ragged = distilled(backbone, selector=Reconstruction(part_tokens=32), n=2)
    caches = [ragged[0], *distilled(backbone, selector="attention", n=1), ragged[1]]
    assert [cache.counts is not None for cache in caches] == [True, False, True]
    made = compose(backbone, caches, layout=layout, n_question=7, batch_size=2)
    spans = [40, 40, 40] if layout == "source" else [ragged[0].span, 10, ragged[1].span]
    prefix = backbone.prefix_for(N_PREFIX + sum(spans) + 7)
    assert made.next_positions.tolist() == [N_PREFIX + sum(spans)] * 2
    for layer in range(4):
        keys, values = made.layer(layer)
        where = made.key_positions(layer)
        for head in range(2):
            real = where[0, head] != NEVER
            expected, turned, kept = [torch.arange(N_PREFIX)], [prefix.keys[layer, head]], []
            for index, cache in enumerate(caches):
                positions, free, value = by_head(cache)[layer][head]
                if layout == "packed":
                    positions = torch.arange(cache.span - len(positions), cache.span)
                positions = positions + N_PREFIX + sum(spans[:index])
                whole = torch.zeros(4, 2, len(free), free.shape[1])
                whole[layer, head] = free
                on = backbone.rope.rotate(whole, positions, n_positions=N_PREFIX + sum(spans) + 7)
                expected.append(positions)
                turned.append(on[layer, head])
                kept.append(value)
            assert where[0, head][real].tolist() == torch.cat(expected).tolist()
            for row in range(2):
                torch.testing.assert_close(keys[row, head][real], torch.cat(turned), rtol=1e-5, atol=1e-5)
                assert torch.equal(values[row, head][real][N_PREFIX:], torch.cat(kept))


@pytest.mark.parametrize("name", [*NAMES, "mistral", "gemma2", "qwen2_yarn"])
def test_padding_does_not_affect_the_logits(name: str) -> None:
    """What lies in the padding of a ragged cache does not matter; what lies in its entries does."""
    backbone = shared_backbone(name)
    caches = distilled(backbone, selector=Reconstruction(part_tokens=32), n=2)
    ids = torch.tensor([backbone.encode("why so?"), backbone.encode("or how?")])

    def logits(spoil: str) -> torch.Tensor:
        made = compose(backbone, caches, n_question=7, n_new=2, batch_size=2)
        for layer in range(4):
            gone = made.key_positions(layer) == NEVER
            for tensor in made.layer(layer):
                if spoil == "padding":  # it is memory that nobody wrote: anything may be in it
                    tensor[gone] = torch.nan
                elif spoil == "entries":
                    tensor[~gone] += 3.0
        with torch.no_grad():
            backbone.logits(ids, made)
            return backbone.logits(ids[:, :1], made)  # a decoding step as well

    assert_close(logits("padding"), logits("nothing"))
    assert (logits("entries") - logits("nothing")).abs().max() > 0.1


def test_all_rows_of_a_batch_are_equal(backbone: Any) -> None:
    made = compose(backbone, distilled(backbone), n_question=3, batch_size=3)
    for index in range(backbone.num_layers):
        for tensor in made.layer(index):
            assert torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[0], tensor[2])
            assert tensor.isfinite().all()


def test_composing_no_documents_gives_the_prefix(backbone: Any) -> None:
    made = compose(backbone, [], n_question=3)
    assert int(made.next_positions) == N_PREFIX
    assert torch.equal(made.layer(1)[0][0], backbone.prefix.keys[1])


def test_caches_of_another_dtype_are_converted(backbone: Any) -> None:
    caches = distilled(backbone)
    half = [
        replace(
            c, keys=c.keys.bfloat16(), values=c.values.bfloat16(), fingerprint=replace(c.fingerprint, dtype="bfloat16")
        )
        for c in caches
    ]
    made = compose(backbone, half, n_question=3)
    assert made.layer(0)[0].dtype == torch.float32
    expected = compose(backbone, caches, n_question=3)
    for index in range(backbone.num_layers):
        for ours, theirs in zip(made.layer(index), expected.layer(index), strict=True):
            assert not torch.equal(ours, theirs)
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


# -- what is stored stays as it is -------------------------------------------------------------------------------------


def test_decoding_never_changes_a_stored_cache(backbone: Any, tmp_path: Path) -> None:
    caches = distilled(backbone)
    for index, cache in enumerate(caches):
        cache.save(tmp_path / str(index))
    paths = sorted(tmp_path.iterdir())
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    mapped = [DistilledCache.load(path) for path in paths]
    prefix = backbone.prefix.keys.clone()
    generator = Generator(backbone)
    for given in (caches, mapped):
        generator.generate_batch(["one?", "the other question?"], given, settings=DecodeSettings(max_new_tokens=5))
        assert [hashlib.sha256(cache.to_bytes()).hexdigest() for cache in given] == before
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == before
    assert torch.equal(backbone.prefix.keys, prefix)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_too_many_positions_are_refused_before_any_work() -> None:
    compressed_by = shared_backbone("llama")
    caches = distilled(compressed_by, n=13)  # 13 x 40 = 520 of 512 positions, 130 packed
    backbone = make_backbone()
    with recorded_inputs(backbone) as inputs:
        with pytest.raises(ContextWindowError) as caught:
            Generator(backbone).generate("why?", caches)
        with pytest.raises(ContextWindowError):
            Generator(backbone).stream("why?", caches)
        with pytest.raises(ContextWindowError):
            Generator(backbone).generate_batch(["why?"], caches)
    assert inputs == []
    assert "13 documents" in caught.value.what and "512" in caught.value.what
    assert caught.value.next_step is not None and "packed" in caught.value.next_step
    packed = Generator(backbone, layout="packed")
    assert packed.generate("why?", caches, settings=DecodeSettings(max_new_tokens=3)).n_cached_tokens == 11 + 130
    with recorded_inputs(backbone) as inputs, pytest.raises(ContextWindowError):
        packed.generate("why?", caches, settings=DecodeSettings(max_new_tokens=512))
    assert inputs == []


def test_the_last_position_may_be_used(backbone: Any) -> None:
    caches = distilled(backbone, n=3)  # prefix 11, documents 120, leaves 381
    compose(backbone, caches, n_question=300, n_new=81)
    with pytest.raises(ContextWindowError):
        compose(backbone, caches, n_question=300, n_new=82)


def foreign_backbones() -> dict[str, Any]:
    form = PromptForm(**SHORT_FORM)  # type: ignore[arg-type]
    weights = make_model("llama")
    with torch.no_grad():
        weights.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["word"])
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return {
        "weights": Backbone(weights, make_tokenizer(), prompt=form),
        "tokenizer": Backbone(make_model("llama"), tokenizer, prompt=form),
        "prompt": Backbone(make_model("llama"), make_tokenizer(), prompt=replace(form, question_after="\nB:")),
        "prefix": Backbone(make_model("llama"), make_tokenizer(), prompt=replace(form, prefix="Other. ")),
        "rope": make_backbone(rope_parameters=rope),
    }


def test_caches_with_another_fingerprint_are_refused(backbone: Any) -> None:
    caches = distilled(backbone, n=1)
    for field, other in foreign_backbones().items():
        with pytest.raises(FingerprintMismatchError) as caught:
            compose(other, caches)
        assert f"{field} is" in caught.value.what and "in the cache" in caught.value.what, field
        assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step
        with pytest.raises(FingerprintMismatchError):
            Generator(other).generate("why?", caches)


def test_caches_of_different_selectors_compose(backbone: Any) -> None:
    caches: Sequence[DistilledCache] = [*distilled(backbone, n=1), *distilled(backbone, selector="sink_recent", n=1)]
    windowed = Compressor(backbone, selector="attention", window_tokens=20).compress(letters(34), keep_ratio=0.5)
    assert compose(backbone, [*caches, windowed]).composed_positions.shape[-1] == N_PREFIX + 40


def test_an_unknown_layout_is_refused(backbone: Any) -> None:
    with pytest.raises(ConfigError, match="sideways") as caught:
        compose(backbone, [], layout="sideways")  # type: ignore[arg-type]
    assert caught.value.next_step is not None and "packed" in caught.value.next_step


def test_packed_and_source_differ_and_agree_at_keep_ratio_1(backbone: Any) -> None:
    ids = torch.tensor([backbone.encode_question("why?")])

    def logits(caches: Sequence[DistilledCache], layout: Any) -> torch.Tensor:
        made = compose(backbone, caches, layout=layout, n_question=ids.shape[1])
        with torch.no_grad():
            return backbone.logits(ids, made)

    few = distilled(backbone)
    assert (logits(few, "source") - logits(few, "packed")).abs().max() > 0.01
    whole = [Compressor(backbone, selector="attention").compress(letters(30, seed=s), keep_ratio=1.0) for s in (1, 2)]
    assert_close(logits(whole, "source"), logits(whole, "packed"))
