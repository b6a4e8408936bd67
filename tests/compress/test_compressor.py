from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor, Matched, MatchSettings, Reconstruction
from kv_memory.config import n_kept_for
from kv_memory.errors import ConfigError, EmptyDocumentError
from tests.conftest import make_backbone
from tests.reference import assert_close, by_head, letters, recorded_inputs, shared_backbone

TRAINING_FREE = ["sink_recent", "attention", "reconstruction", "reconstruction_head", "matched"]
# The paper's form; and others by scorer, routed tokens and first routed layer.
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "adapter_head": {"scorer": "head"},
    "adapter_head_one_pass": {"scorer": "head", "first_routed_layer": 1},
    "adapter_layer": {"scorer": "layer"},
    "adapter_document": {"scorer": "layer", "routed": "document"},
    "adapter_head_ragged": {"scorer": "head", "budget": "model"},
    "adapter_document_ragged": {"scorer": "layer", "routed": "document", "budget": "model"},
}
METHODS = [*TRAINING_FREE, *ADAPTERS, "combined"]
SHARED = {"sink_recent", "adapter"}  # one row for all heads
RAGGED = {"reconstruction", "matched", "adapter_head_ragged", "adapter_document_ragged", "combined"}
NAMES = ["llama", "mistral", "qwen3", "gemma3", "phi3_window", "phi3_longrope"]
TEXT = letters(60)


@cache
def compressor_for(name: str, method: str, **options: Any) -> Compressor:
    if method in {"sink_recent", "attention"}:
        return Compressor(shared_backbone(name), selector=method, **options)  # type: ignore[arg-type]
    if method.startswith("reconstruction"):
        selector = Reconstruction(part_tokens=32, budget="model" if method == "reconstruction" else "head")
        return Compressor(shared_backbone(name), selector=selector, **options)
    if method == "matched":
        return Compressor(
            shared_backbone(name), selector=Matched(MatchSettings(part_tokens=32, key_steps=6)), **options
        )
    backbone = make_backbone(name)
    if method == "combined":
        method, options = "adapter_document_ragged", {"selector": "combined", **options}
    adapter = Adapter.create(backbone, rank=4, zero_init=False, **ADAPTERS[method])
    return Compressor(backbone, adapter=adapter, **options)


@pytest.mark.parametrize("method", METHODS)
def test_one_prefill_serves_every_keep_ratio(method: str) -> None:
    compressor = compressor_for("llama", method)
    document = compressor.prefill(TEXT)
    for keep_ratio, spans in ((0.25, ()), (0.1, ()), (1.0, ()), (0.25, [(3, 9)])):
        expected = compressor.compress(TEXT, keep_ratio=keep_ratio, keep_spans=spans)
        made = document.keep(keep_ratio, keep_spans=spans)
        assert made.fingerprint == expected.fingerprint and made.keep_ratio == expected.keep_ratio
        for field in ("keys", "values", "positions", "counts", "bias"):
            mine, theirs = getattr(made, field), getattr(expected, field)
            assert mine is theirs is None or torch.equal(mine, theirs), field


# Every method on one architecture, and on the others one method of each kind.
MATRIX = [("llama", method) for method in METHODS] + [
    (name, method)
    for name in NAMES[1:]
    for method in ("attention", "reconstruction", "matched", "adapter", "adapter_document_ragged")
]


@pytest.mark.parametrize(("name", "method"), MATRIX)
class TestEveryMethod:
    """What holds whoever chooses."""

    def test_shapes_and_positions(self, name: str, method: str) -> None:
        for keep_ratio in (0.01, 0.9, 0.25):
            self.check_shapes_and_positions(name, method, keep_ratio)

    def check_shapes_and_positions(self, name: str, method: str, keep_ratio: float) -> None:
        compressor = compressor_for(name, method)
        made = compressor.compress(TEXT, keep_ratio=keep_ratio)
        n_tokens = len(TEXT) + 6  # the wrapper of the document
        n_kept = n_kept_for(n_tokens, keep_ratio)
        backbone = compressor.backbone
        heads = [head for layer in by_head(made) for head in layer]
        assert len(heads) == 4 * 2 and sum(len(p) for p, _, _ in heads) == 8 * n_kept
        if made.counts is None:
            assert made.keys.shape == made.values.shape == (4, 2, n_kept, backbone.head_dim)
        else:
            assert made.keys.shape == made.values.shape == (8 * n_kept, backbone.head_dim)
        assert (made.n_tokens, made.n_kept, made.keep_ratio) == (n_tokens, n_kept, keep_ratio)
        assert made.per_head == (method not in SHARED)
        assert (made.counts is not None) == (method in RAGGED)
        assert made.fingerprint == compressor.fingerprint()
        rows = [positions for positions, _, _ in heads]
        assert all((row.diff() > 0).all() and (row < n_tokens).all() for row in rows)
        if made.per_head and n_kept > 1:
            assert len({tuple(row.tolist()) for row in rows}) > 1, "every head chose the same"
        assert made.keys.isfinite().all() and made.values.isfinite().all()
        assert (made.bias is not None) == (method == "matched")

    def test_the_same_input_gives_the_same_bytes(self, name: str, method: str) -> None:
        compressor = compressor_for(name, method)
        first, other = (compressor.compress(text, keep_ratio=0.3).to_bytes() for text in (TEXT, letters(60, seed=1)))
        assert compressor.compress(TEXT, keep_ratio=0.3).to_bytes() == first != other

    def test_keeping_everything_is_the_plain_cache(self, name: str, method: str) -> None:
        made = compressor_for(name, method).compress(TEXT, keep_ratio=1.0)
        plain = compressor_for(name, "sink_recent").compress(TEXT, keep_ratio=1.0)
        assert torch.equal(made.keys, plain.keys) and torch.equal(made.values, plain.values)
        assert made.positions.tolist() == list(range(66)) and made.bias is None

    def test_kept_keys_and_values(self, name: str, method: str) -> None:
        made = compressor_for(name, method).compress(TEXT, keep_ratio=0.3)
        plain = compressor_for(name, method).compress(TEXT, keep_ratio=1.0)
        moved = 0.0
        first = 4 if method in TRAINING_FREE else 1 + ADAPTERS.get(method, {}).get("first_routed_layer", 0)
        for layer, heads in enumerate(by_head(made)):
            apart = 0.0
            for head, (positions, keys, values) in enumerate(heads):
                for kept, whole in ((keys, plain.keys), (values, plain.values)):
                    expected = whole[layer, head][positions]
                    if method == "matched":  # fitted, and moved
                        apart = max(apart, float((kept - expected).abs().max()) if len(kept) else 0.0)
                    elif layer < first:  # makes its keys and values before the first routed projection
                        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-3)
                    elif len(kept):
                        apart = max(apart, float((kept - expected).abs().max()))
            if method != "matched":
                assert (apart > 0.01) == (layer >= first)
            moved = max(moved, apart)
        assert moved > 0.01 or method in TRAINING_FREE[:-1]

    def test_windows_are_compressed_separately_and_joined(self, name: str, method: str) -> None:
        ids = shared_backbone(name).encode(letters(100, seed=2))
        joined = compressor_for(name, method, window_tokens=40).compress_ids(ids, keep_ratio=0.25)
        edges = [0, 33, 67, 100]  # the fewest windows that fit, of nearly equal length
        parts = [compressor_for(name, method).compress_ids(ids[a:b], keep_ratio=0.25) for a, b in pairwise(edges)]
        assert [part.n_kept for part in parts] == [8, 9, 8]
        assert (joined.n_tokens, joined.n_kept) == (100, 25)
        if method == "matched":
            assert joined.bias is not None and sorted(joined.bias.tolist()) == sorted(
                bias
                for part in parts
                for bias in part.bias.flatten().tolist()  # type: ignore[union-attr]
            )
        pieces = [by_head(part) for part in parts]
        for layer, heads in enumerate(by_head(joined)):
            for head, (positions, keys, values) in enumerate(heads):
                of = [piece[layer][head] for piece in pieces]
                shifted = [p + start for (p, _, _), start in zip(of, edges, strict=False)]
                assert torch.equal(positions, torch.cat(shifted))
                assert torch.equal(keys, torch.cat([k for _, k, _ in of]))
                assert torch.equal(values, torch.cat([v for _, _, v in of]))

    def test_spans_are_kept_whole(self, name: str, method: str) -> None:
        made = compressor_for(name, method).compress(TEXT, keep_ratio=0.2, keep_spans=[(10, 20), (15, 25), (59, 60)])
        wanted = [5 + i for i in [*range(10, 25), 59]]
        assert made.n_kept == 16 + n_kept_for(66 - 16, 0.2)
        for positions, _, _ in (head for layer in by_head(made) for head in layer):
            assert set(wanted) <= set(positions.tolist())


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_document_longer_than_the_context_window_is_split(backbone: Any) -> None:
    compressor = Compressor(backbone, selector="attention")
    assert compressor.window_tokens == 512 - 11
    backbone.prefix  # noqa: B018 (is read on first use)
    with recorded_inputs(backbone) as inputs:
        made = compressor.compress(letters(1200), keep_ratio=0.1)
    assert [ids.shape[1] for ids in inputs] == [402, 402, 402]
    assert made.n_tokens == 1206 and made.n_kept == 3 * 40
    for row in made.positions.reshape(-1, 120).tolist():
        assert [sum(a <= p < a + 402 for p in row) for a in (0, 402, 804)] == [40, 40, 40]


def test_selector_tokens_are_subtracted_from_the_window(backbone: Any) -> None:
    assert Compressor(backbone, selector=Reconstruction(part_tokens=64)).window_tokens == 512 - 11 - 128
    assert Compressor(backbone).window_tokens == 512 - 11 - 128 - 56  # `matched` asks for parts of a quarter of it
    with pytest.raises(ConfigError, match="reconstruction:1024") as caught:
        Compressor(backbone, selector="reconstruction")
    assert caught.value.where == "selector"
    assert caught.value.next_step is not None and "part_tokens" in caught.value.next_step
    # With an adapter nobody asks.
    mine = make_backbone()
    assert Compressor(mine, adapter=Adapter.create(mine, rank=2)).window_tokens == 501


def test_a_prompt_form_that_fills_the_window_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"11 tokens .* leave no room in a context window of 8") as caught:
        Compressor(make_backbone(max_position_embeddings=8), selector="attention")
    assert caught.value.where == "prompt"


@pytest.mark.parametrize("window_tokens", [0, -1, 502])
def test_window_tokens_out_of_range_are_rejected(backbone: Any, window_tokens: int) -> None:
    with pytest.raises(ConfigError, match="1 to 501"):
        Compressor(backbone, selector="attention", window_tokens=window_tokens)


def test_an_adapter_of_another_backbone_is_rejected(backbone: Any) -> None:
    with pytest.raises(ConfigError, match="another backbone"):
        Compressor(backbone, adapter=Adapter.create(make_backbone(), rank=2))


# -- spans -------------------------------------------------------------------------------------------------------------


def test_a_span_of_characters_keeps_the_tokens_it_touches(backbone: Any) -> None:
    text = "abcdé" + letters(30)  # é is two tokens
    made = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=0.01, keep_spans=[(3, 5)])
    assert made.positions.tolist() == [0, 8, 9, 10]  # the sink, d, and both tokens of é behind the wrapper's five
    expected = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=1.0)
    assert_close(made.keys, expected.keys[:, :, made.positions.long()])


def test_overlapping_token_spans_are_kept(backbone: Any) -> None:
    compressor, ids = Compressor(backbone, selector="sink_recent"), list(range(60, 100))
    made = compressor.compress_ids(ids, keep_ratio=0.01, keep_spans=[(20, 22), (21, 24)])
    assert made.positions.tolist() == [0, 20, 21, 22, 23]


def test_a_span_over_several_windows_is_kept(backbone: Any) -> None:
    compressor = Compressor(backbone, selector="attention", window_tokens=20)
    made = compressor.compress_ids(list(range(60, 120)), keep_ratio=0.1, keep_spans=[(15, 41)])
    # Windows of 20: 5 forced and 2 of 15, all 20, 1 forced and 2 of 19.
    assert made.n_kept == 7 + 20 + 3
    for row in made.positions.reshape(-1, 30).tolist():
        assert set(range(15, 41)) <= set(row)


@pytest.mark.parametrize("spans", [[(0, 66)], [(0, 30), (30, 66)], [(0, 40), (20, 66)]])
def test_keeping_the_whole_document_is_the_plain_cache(backbone: Any, spans: list[tuple[int, int]]) -> None:
    compressor = Compressor(backbone, selector="attention")
    ids = backbone.encode_document(TEXT)
    made = compressor.compress_ids(ids, keep_ratio=0.1, keep_spans=spans)
    plain = compressor.compress_ids(ids, keep_ratio=1.0)
    assert torch.equal(made.keys, plain.keys) and torch.equal(made.values, plain.values)


@pytest.mark.parametrize("span", [(5, 5), (6, 5), (-1, 4), (0, 61), (60, 70)])
def test_invalid_spans_are_rejected(backbone: Any, span: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="does not lie within the document's 60 characters") as caught:
        Compressor(backbone, selector="attention").compress(TEXT, keep_ratio=0.5, keep_spans=[span])
    assert caught.value.where == "keep_spans"
    with pytest.raises(ConfigError, match="does not lie within 60 tokens"):
        Compressor(backbone, selector="attention").compress_ids([70] * 60, keep_ratio=0.5, keep_spans=[span])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_document_is_rejected(backbone: Any, text: str) -> None:
    with pytest.raises(EmptyDocumentError):
        Compressor(backbone, selector="attention").compress(text, keep_ratio=0.5)
    with pytest.raises(EmptyDocumentError):
        Compressor(backbone, selector="attention").compress_ids([], keep_ratio=0.5)


@pytest.mark.parametrize("keep_ratio", [0, -1, 1.5, float("nan"), "x", True, None])
def test_keep_ratio_out_of_range_is_rejected(backbone: Any, keep_ratio: Any) -> None:
    with pytest.raises(ConfigError, match="keep_ratio must lie in") as caught:
        Compressor(backbone, selector="attention").compress(TEXT, keep_ratio=keep_ratio)
    assert caught.value.where == "keep_ratio"


def test_a_document_of_one_token_can_be_compressed(backbone: Any) -> None:
    made = Compressor(backbone, selector="attention").compress_ids([70], keep_ratio=0.1)
    assert isinstance(made, DistilledCache) and made.n_kept == made.n_tokens == 1
