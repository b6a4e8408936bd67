"""Matched against float64 by hand, on every architecture; and what it does with odd input."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.matching import Matched
from kv_memory.compress.reference_rows import record_rows
from kv_memory.config import n_kept_for
from kv_memory.errors import ConfigError, ModelError
from kv_memory.generate import compose
from kv_memory.model.forward import cache_argument
from tests.conftest import ARCHITECTURES, make_backbone
from tests.reference import LAYER_TYPED, letters, padded, plain_model, shared_backbone

EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))
N = 40
SETTINGS = MatchSettings(part_tokens=24, key_steps=6)


@functools.cache
def double_model(name: str) -> Any:
    return copy.deepcopy(plain_model(name)).double()


def rows_of(backbone: Any, ids: list[int]) -> list[list[int]]:
    """The reference rows, as token ids."""
    asked = [
        ("Who built the tower?", "Jan Novak"),
        ("When did the war begin?", "in 1914"),
        ("How many people live there?", "about 40,000"),
        ("Where was it first used?", "in northern Italy"),
        ("What is the main cause?", "a lack of rain"),
        ("Why did they leave?", "because of the storm"),
        ("Which company made it?", "Siemens"),
        ("What is the name of the river?", "the Danube"),
    ]
    rows = [(backbone.encode_question(q) + backbone.encode(f" {a}"))[-64:] for q, a in asked]
    for start in range(0, len(ids), 24):
        request = "\n\nRepeat the previous text exactly" + (".\n" if start == 0 else ", from here on: ")
        rows.append(backbone.encode(request)[:48] + ids[max(0, start - 8) : start] + ids[start : start + 24])
    return rows


def attention_of(name: str, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Of every layer: weights `(num_heads, queries, keys)`, values `(num_kv_heads, keys, head_dim)`, hidden states."""
    model, values = double_model(name), []
    layers = model.get_decoder().layers

    def note(module: Any, args: Any, out: Any) -> None:
        values.append(out)

    handles = []
    for layer in layers:
        attention = layer.self_attn
        handles.append(getattr(attention, "v_proj", getattr(attention, "qkv_proj", None)).register_forward_hook(note))
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    heads, dim = model.config.num_key_value_heads, layers[0].self_attn.head_dim
    split = [v[0, :, -heads * dim :].unflatten(1, (heads, dim)).transpose(0, 1) for v in values]
    return [w[0] for w in out.attentions], split, [h[0] for h in out.hidden_states]


@EVERY
def test_scores_are_the_change_of_the_output_when_an_entry_is_removed(name: str) -> None:
    backbone = shared_backbone(name)
    ids, first = backbone.encode(letters(N)), len(backbone.prefix_ids)
    expected = torch.zeros(4, 2, N, dtype=torch.float64)
    group = backbone.num_heads // 2
    for row in rows_of(backbone, ids):
        whole = [*backbone.prefix_ids, *ids, *row]
        weights, values, hidden = attention_of(name, whole)
        own = slice(first + N, len(whole))  # queries of the row
        for layer in range(4):
            projection = double_model(name).get_decoder().layers[layer].self_attn.o_proj.weight
            for head in range(backbone.num_heads):
                w_g = projection[:, head * backbone.head_dim : (head + 1) * backbone.head_dim]
                v = values[layer][head // group][: first + N]
                p = weights[layer][head, own, : first + N]  # (queries, keys)
                odds = p[:, first:] / (1 - p[:, first:]).clamp(min=0.01)
                change = (v[None, first:] - (p @ v)[:, None]) @ w_g.T  # (queries, N, hidden_size)
                change = change * odds[..., None] / hidden[layer][own].norm(dim=-1)[:, None, None]
                counts = math.exp(1.5 * layer / 3)  # the last of four layers 4.5 times as much as the first
                expected[layer, head // group] += change.square().sum((0, 2)) * counts
    tokens = torch.tensor([ids])
    selector = Matched(SETTINGS)
    with torch.no_grad():
        document, plain = (backbone.prefixed_cache(N, room=selector.extra_tokens) for _ in range(2))
        backbone.prefill(tokens, plain)
        keys = [plain.layer(i)[0] for i in range(4)]
        scores = selector.score(backbone, tokens, document)
    assert all(torch.equal(document.layer(i)[0], key) for i, key in enumerate(keys)) or "longrope" in name
    if "longrope" not in name:  # whose frequencies may differ between reading and asking
        torch.testing.assert_close(scores.double(), expected, rtol=2e-3, atol=1e-6)


def test_depth_weight_scales_scores_by_layer() -> None:
    backbone, counts = shared_backbone("llama"), torch.arange(4).div(3).mul(1.5).exp()
    tokens = torch.tensor([backbone.encode(letters(N))])
    found = []
    for settings in (SETTINGS, replace(SETTINGS, depth_weight=0.0)):
        document = backbone.prefixed_cache(N, room=Matched(settings).extra_tokens)
        with torch.no_grad():
            found.append(Matched(settings).score(backbone, tokens, document))
    torch.testing.assert_close(found[0], found[1] * counts[:, None, None], rtol=2e-3, atol=1e-4)
    assert Matched(SETTINGS).name != Matched(replace(SETTINGS, depth_weight=0.0)).name


# -- decoding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_by_hand(name: str, backbone: Any, caches: list[DistilledCache], question: list[int]) -> torch.Tensor:
    """What the untouched model computes in float64 when every head's entries and biases are put before it."""
    model, first = double_model(name), len(backbone.prefix_ids)
    end = first + sum(cache.n_tokens for cache in caches)
    n_positions = end + len(question)
    prefix = backbone.prefix_for(n_positions)
    ours = {"keys": [prefix.keys], "values": [prefix.values]}
    where, biases = [torch.arange(first).expand(4, 2, -1)], [torch.zeros(4, 2, first)]
    offset = first
    for cache in caches:
        keys, values, positions, bias = padded(cache)
        at = torch.where(positions < 0, 0, positions + offset)
        ours["keys"].append(backbone.rope.rotate(keys.float(), at, n_positions=n_positions))
        ours["values"].append(values)
        where.append(torch.where(positions < 0, 10**6, at))
        biases.append(bias.float())
        offset += cache.n_tokens
    keys, values = (torch.cat(parts, 2).double() for parts in ours.values())
    at, added = torch.cat(where, 2), torch.cat(biases, 2).double()
    past = DynamicCache()
    for layer in range(4):
        past.update(keys[layer][None], values[layer][None], layer)
    queries = torch.arange(end, n_positions)
    window = getattr(model.config, "sliding_window", None)

    def hook(layer: int) -> Any:
        def swap(module: Any, args: Any, kwargs: Any) -> Any:
            own = module.self_attn
            near = getattr(own, "sliding_window", None) if model.config.model_type in LAYER_TYPED else window
            positions = torch.cat([at[layer], queries.expand(2, -1)], 1)  # (kv_heads, keys)
            seen = positions[:, None] <= queries[:, None]
            if near is not None:
                seen &= queries[:, None] - positions[:, None] < near
            mask = torch.nn.functional.pad(added[layer], (0, len(queries)))[:, None].expand(seen.shape)
            mask = mask.masked_fill(~seen, torch.finfo(torch.float64).min)
            return args, {**kwargs, "attention_mask": mask.repeat_interleave(backbone.num_heads // 2, 0)[None]}

        return swap

    handles = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, module in enumerate(model.get_decoder().layers)
    ]
    try:
        out = model(
            torch.tensor([question]),
            position_ids=queries[None],
            use_cache=True,
            **{cache_argument(model.forward): past},
        )
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[0]


@pytest.mark.parametrize("ratio", [0.5, 0.2])
@EVERY
def test_decoding_adds_the_biases(name: str, ratio: float) -> None:
    backbone = shared_backbone(name)
    compressor = Compressor(backbone, selector=Matched(SETTINGS))
    # Short: the longrope model changes its frequencies at 96.
    caches = [compressor.compress(letters(n, seed=n), keep_ratio=ratio) for n in (24, 26)]
    assert all(made.bias is not None and made.bias.any() for made in caches)
    question = backbone.encode_question("where is it?")
    expected = logits_by_hand(name, backbone, caches, question)
    with torch.no_grad():
        cache = compose(backbone, caches, n_question=len(question))
        ours = backbone.logits(torch.tensor([question]), cache, every=True)[0]
        stepwise = compose(backbone, caches, n_question=len(question))
        steps = [backbone.logits(torch.tensor([[token]]), stepwise)[0] for token in question]
        batch = compose(backbone, caches, n_question=len(question), batch_size=2)
        lengths = torch.tensor([len(question), 3])
        rows = backbone.logits(torch.tensor([question] * 2), batch, lengths=lengths)
    spread = float(expected.max() - expected.min())
    for found, wanted in ((ours, expected), (torch.stack(steps), expected), (rows, expected[[-1, 2]])):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * spread)
    plain = compose(backbone, [DistilledCache(**{**vars(made), "bias": None}) for made in caches], n_question=20)
    with torch.no_grad():
        without = backbone.logits(torch.tensor([question]), plain, every=True)[0]
    assert (without - ours).abs().max() > 20 * 1e-4 * spread, "biases without effect prove nothing"


def test_caches_with_and_without_biases_can_be_joined() -> None:
    backbone = shared_backbone("llama")
    matched = Compressor(backbone, selector=Matched(SETTINGS)).compress(letters(40), keep_ratio=0.3)
    question = backbone.encode_question("why?")
    for selector, ratio in (("attention", 0.4), ("sink_recent", 0.2)):
        other = Compressor(backbone, selector=selector).compress(letters(30, seed=2), keep_ratio=ratio)  # type: ignore[arg-type]
        for caches in ([matched, other], [other, matched]):
            expected = logits_by_hand("llama", backbone, caches, question)
            with torch.no_grad():
                cache = compose(backbone, caches, n_question=len(question))
                ours = backbone.logits(torch.tensor([question]), cache, every=True)[0]
            torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


# -- documents ---------------------------------------------------------------------------------------------------------


def test_kept_spans_are_neither_changed_nor_biased(backbone: Any) -> None:
    compressor = Compressor(backbone, selector=Matched(SETTINGS))
    made = compressor.compress(letters(60), keep_ratio=0.2, keep_spans=[(10, 22)])
    plain = compressor.compress(letters(60), keep_ratio=1.0)
    keys, values, positions, bias = padded(made)
    inside = (positions >= 15) & (positions < 27)
    assert inside.sum() == 12 * 8 and not bias[inside].any() and bias[~inside].any()
    at = positions.clamp(min=0).long()
    original = plain.values.gather(2, at[..., None].expand_as(values))
    assert torch.equal(values[inside], original[inside]) and not torch.equal(values, original)
    torch.testing.assert_close(keys[inside], plain.keys.gather(2, at[..., None].expand_as(keys))[inside])


@pytest.mark.parametrize("text", ["a", "ab", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " \n x \n ", letters(7)])
@pytest.mark.parametrize("keep_ratio", [0.001, 0.1, 0.5, 0.99])
def test_short_and_odd_documents(backbone: Any, text: str, keep_ratio: float) -> None:
    made = Compressor(backbone, selector=Matched(SETTINGS)).compress(text, keep_ratio=keep_ratio)
    heads = backbone.num_layers * backbone.num_kv_heads
    n_tokens = len(text) + 6
    assert made.positions.numel() * (1 if made.per_head else heads) == heads * n_kept_for(n_tokens, keep_ratio)
    assert made.keys.isfinite().all() and made.values.isfinite().all()
    assert made.bias is None or made.bias.isfinite().all()


def test_a_head_may_keep_no_entries(backbone: Any) -> None:
    made = Compressor(backbone, selector=Matched(SETTINGS)).compress(letters(60), keep_ratio=0.02)
    assert made.counts is not None and int(made.counts.min()) == 0


def test_non_finite_activations_are_rejected() -> None:
    broken = make_backbone("llama")
    with torch.no_grad():
        broken.layers[2].self_attn.v_proj.weight[3] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        Compressor(broken, selector=Matched(SETTINGS)).compress(letters(60), keep_ratio=0.3)


def test_one_stage_of_scores_without_a_fit_keeps_values(backbone: Any) -> None:
    made = Compressor(backbone, selector=Matched(MatchSettings(part_tokens=24, fit=False)))
    cache = made.compress(letters(60), keep_ratio=0.3)
    plain = made.compress(letters(60), keep_ratio=1.0)
    _, values, positions, bias = padded(cache)
    at = positions.clamp(min=0).long()[..., None].expand_as(values)
    assert torch.equal(values[positions >= 0], plain.values.gather(2, at)[positions >= 0]) and not bias.any()


def test_blocks_and_batched_rows_do_not_change_the_result(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kv_memory.compress import matching, reference_rows

    def compress() -> DistilledCache:
        return Compressor(backbone, selector=Matched(SETTINGS)).compress(letters(60), keep_ratio=0.3)

    whole = compress()
    monkeypatch.setattr(matching, "_LOGITS", 500)
    monkeypatch.setattr(reference_rows, "_BLOCK", 7)
    monkeypatch.setattr(reference_rows, "_COPIED_ENTRIES", 1)
    parts = compress()
    assert torch.equal(parts.positions, whole.positions)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-2, atol=1e-3)


def test_max_final_rows_reduces_the_rows_of_the_fit(backbone: Any) -> None:
    tokens = torch.tensor([backbone.encode(letters(200))])
    with torch.no_grad():
        cache = backbone.prefixed_cache(200, room=80)
        backbone.prefill(tokens, cache)
        n_rows = len(record_rows(backbone, tokens, cache, part_tokens=24)[0][0].positions)
    few = MatchSettings(part_tokens=24, max_final_rows=n_rows // 4)
    made = [Compressor(backbone, selector=Matched(s)).compress(letters(200), keep_ratio=0.2) for s in (SETTINGS, few)]
    assert not torch.equal(made[0].values[:8], made[1].values[:8])


def test_some_heads_record_every_token_of_a_long_document(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([backbone.encode(letters(200))])
    with torch.no_grad():
        cache = backbone.prefixed_cache(200, room=80)
        backbone.prefill(tokens, cache)
        every = record_rows(backbone, tokens, cache, part_tokens=24)[0][0].positions
        monkeypatch.setattr("kv_memory.compress.reference_rows._RECORDED", 50)  # a quarter
        some = record_rows(backbone, tokens, cache, part_tokens=24)[0][0].positions
    assert 0.2 * every.shape[1] < some.shape[1] <= every.shape[1] / 4
    assert set(some.flatten().tolist()) >= set(range(211, 211 + 50)), "behind prefix and document"
    made = Compressor(backbone, selector=Matched(SETTINGS)).compress(letters(200), keep_ratio=0.2)
    assert made.bias is not None and made.bias.any()


def test_entries_of_batched_heads_are_fitted_in_parts(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Compressor(backbone, selector=Matched(SETTINGS)).prefill(letters(200))
    whole = document.keep(0.4)
    monkeypatch.setattr("kv_memory.compress.fitting._AT_ONCE", 30)
    parts = document.keep(0.4)
    assert whole.counts is not None and int(whole.counts.max()) > 60, "three parts"
    monkeypatch.setattr("kv_memory.compress.head_fit._WEIGHTS", 1)  # each head by itself
    alone = document.keep(0.4)
    torch.testing.assert_close(parts.values, alone.values, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole.positions, parts.positions) or not torch.allclose(whole.values, parts.values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth_weight", math.inf),
        ("stages", (0.5,)),
        ("weight_ridge", 0),
        ("value_ridges", ()),
        ("value_ridges", (-1.0,)),
        ("part_tokens", 0),
        ("max_final_rows", 0),
    ],
)
def test_settings_out_of_range_are_rejected(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        MatchSettings(**{name: value})
