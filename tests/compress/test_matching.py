"""Matched against float64 written out with loops, on every architecture; and what it does with odd input."""

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
from kv_memory.compress.fitting import FittedHeads, HeadSystem, bounded_ridge, fit_heads, refit_errors
from kv_memory.compress.matching import Matched, MatchSettings
from kv_memory.compress.reference_rows import record_rows
from kv_memory.config import n_kept_for
from kv_memory.errors import ConfigError, ModelError
from kv_memory.generate import compose
from kv_memory.model.backbone import cache_argument
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
        for layer in range(4):
            projection = double_model(name).get_decoder().layers[layer].self_attn.o_proj.weight
            for head in range(backbone.num_heads):
                w_g = projection[:, head * backbone.head_dim : (head + 1) * backbone.head_dim]
                v = values[layer][head // group][: first + N]
                for query in range(first + N, len(whole)):
                    p = weights[layer][head, query, : first + N]
                    output = p @ v
                    odds = p[first:] / (1 - p[first:]).clamp(min=0.01)
                    change = (v[first:] - output) @ w_g.T * odds[:, None] / hidden[layer][query].norm()
                    counts = math.exp(1.5 * layer / 3)  # the last of four layers 4.5 times as much as the first
                    expected[layer, head // group] += change.square().sum(1) * counts
    tokens = torch.tensor([ids])
    selector = Matched(SETTINGS)
    with torch.no_grad():
        document = backbone.prefixed_cache(N, room=selector.extra_tokens)
        backbone.prefill(tokens, document)
        keys = [document.layer(i)[0].clone() for i in range(4)]
        scores = selector.score(backbone, tokens, document, None)
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
            backbone.prefill(tokens, document)
            found.append(Matched(settings).score(backbone, tokens, document, None))
    torch.testing.assert_close(found[0], found[1] * counts[:, None, None], rtol=2e-3, atol=1e-4)
    assert Matched(SETTINGS).name != Matched(replace(SETTINGS, depth_weight=0.0)).name


# -- the fit -----------------------------------------------------------------------------------------------------------


def head(n: int = 30, kept: int = 8, m: int = 40, group: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A head with random attention, of which the first `kept` entries are kept."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(group, m, n + 5, generator=draw) * 1.5
    weights, values = logits.softmax(-1), torch.randn(n, 6, generator=draw)
    return {
        "weights": weights[..., :kept].flatten(0, 1),
        "rest": weights[..., n:].sum(-1).flatten(),
        "target": (weights[..., :n] @ values).flatten(0, 1),
        "values": values[:kept],
        "scale": (torch.rand(m, generator=draw) + 0.5).repeat(group),
        "held_out": (torch.arange(m) % 4 == 3).repeat(group),
        "fixed": torch.zeros(kept, dtype=torch.bool),
    }


def system_of(*given: dict[str, torch.Tensor]) -> HeadSystem:
    """Heads side by side, padded; rows that are held out stand last."""
    held_out, most = given[0]["held_out"], max(len(one["values"]) for one in given)
    order = held_out.to(torch.uint8).argsort(stable=True)

    def padded(part: torch.Tensor, dim: int) -> torch.Tensor:
        room = list(part.shape)
        room[dim] = most - part.shape[dim]
        return torch.cat([part, part.new_zeros(room)], dim)

    return HeadSystem(
        weights=torch.stack([padded(one["weights"], 1)[order] for one in given]),
        values=torch.stack([padded(one["values"], 0) for one in given]),
        real=torch.stack([torch.arange(most) < len(one["values"]) for one in given]),
        fixed=torch.stack([padded(one["fixed"], 0) for one in given]),
        n_learned=int((~held_out).sum()),
        **{name: torch.stack([one[name][order] for one in given]) for name in ("rest", "target", "scale")},
    )


def fit(given: dict[str, torch.Tensor]) -> FittedHeads:
    """Of one head, without the dimension of heads."""
    fitted = fit_heads(system_of(given), SETTINGS)
    return FittedHeads(fitted.values[0], fitted.bias[0])


def by_loops(given: dict[str, torch.Tensor], settings: MatchSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """The same fit in float64: weights by many steps of projected gradient, values from stacked least squares."""
    weights, rest, target = (given[name].double() for name in ("weights", "rest", "target"))
    values, scale, free = given["values"].double(), given["scale"].double(), ~given["fixed"]
    n = weights.shape[1]
    learned, held_out = (given["held_out"] == flag for flag in (False, True))
    learned, held_out = learned.nonzero()[:, 0].tolist(), held_out.nonzero()[:, 0].tolist()
    own = scale / scale.mean()

    def stacked(some: list[int], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares = [weights[i] * w / (rest[i] + (weights[i] * w).sum()) * own[i] for i in some]
        return torch.stack(shares), torch.stack([target[i] * own[i] for i in some])

    a = torch.stack([weights[i] * own[i] for i in learned])
    b = torch.stack([(1 - rest[i]) * own[i] for i in learned])
    ridge = settings.weight_ridge * a.square().sum(0).mean()
    w = torch.ones(n, dtype=torch.float64)
    step = 1 / (torch.linalg.matrix_norm(a, 2) ** 2 + ridge)
    for _ in range(200_000):
        new = (w - step * (a.T @ (a @ w - b) + ridge * (w - 1))).clamp(0.01, 100)
        new = torch.where(free, new, 1.0)
        if (new - w).abs().max() < 1e-12:
            break
        w = new

    def moved(some: list[int], strength: float) -> torch.Tensor:
        x, y = stacked(some, w)
        pull = (strength * x[:, free].square().sum(0).sum() / n).sqrt() * torch.eye(int(free.sum())).double()
        left = torch.cat([x[:, free], pull])
        right = torch.cat([y - x @ values, torch.zeros(int(free.sum()), values.shape[1]).double()])
        result = values.clone()
        result[free] += torch.linalg.lstsq(left, right).solution
        return result

    def error(of: torch.Tensor, w: torch.Tensor) -> float:
        x, y = stacked(held_out, w)
        return float((x @ of - y).square().sum())

    errors = {strength: error(moved(learned, strength), w) for strength in settings.value_ridges}
    best = min(errors, key=lambda strength: errors[strength])
    ones = torch.ones(n, dtype=torch.float64)
    if errors[best] >= error(values, ones):
        return values, ones
    return moved(learned + held_out, best), w


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fixed", [[], [0], [2, 5, 6]])
def test_fit_is_the_least_squares_solution(seed: int, fixed: list[int]) -> None:
    given = head(seed=seed, kept=7 + 3 * seed)
    given["fixed"][fixed] = True
    values, weights = by_loops(given, SETTINGS)
    fitted = fit(given)
    torch.testing.assert_close(fitted.bias.double(), weights.log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fitted.values.double(), values, rtol=1e-3, atol=2e-3)
    assert (weights != 1).any(), "the start is no proof"
    assert not fitted.bias[fixed].any() and torch.equal(fitted.values[fixed], given["values"][fixed])


def test_the_fit_brings_the_output_closer() -> None:
    given = head(seed=3)
    fitted = fit(given)

    def error(values: torch.Tensor, bias: torch.Tensor) -> float:
        shares = given["weights"] * bias.exp()
        shares = shares / (given["rest"] + shares.sum(-1))[:, None]
        return float((shares @ values - given["target"]).square().mean())

    assert error(fitted.values, fitted.bias) < 0.5 * error(given["values"], torch.zeros(8))


def test_refit_errors_equal_the_cost_of_refitting_without_each_entry() -> None:
    given = head(seed=4, kept=9)
    n = given["weights"].shape[1]
    metric = torch.eye(6)[None]
    ones = given["scale"] * 0 + 0.5
    shares = (given["weights"] / (given["rest"] + given["weights"].sum(-1))[:, None]).double()
    values = given["values"].double()
    start = FittedHeads(given["values"][None], torch.zeros(1, n))
    (found,) = refit_errors(system_of({**given, "scale": ones}), start, metric)
    pull = torch.eye(n).double() * (0.01 * shares.square().sum(0).mean()).sqrt()
    left, right = torch.cat([shares, pull]), torch.cat([shares, pull]) @ values
    for j in range(n):
        others = [i for i in range(n) if i != j]
        rest = right - left[:, others] @ torch.linalg.lstsq(left[:, others], right).solution
        assert float(found[j]) == pytest.approx(float(rest.square().sum()) * 0.25, rel=1e-3)


def test_heads_fitted_together_equal_heads_fitted_alone() -> None:
    given = [head(seed=seed, kept=kept) for seed, kept in enumerate([8, 3, 12, 1])]
    given[1]["fixed"][2] = given[2]["fixed"][5] = True
    system, metric = system_of(*given), torch.eye(6).expand(4, 6, 6)
    together = fit_heads(system, SETTINGS)
    errors = refit_errors(system, together, metric)
    for row, one in enumerate(given):
        n, own = len(one["values"]), system_of(one)
        alone = fit_heads(own, SETTINGS)
        torch.testing.assert_close(together.values[row, :n], alone.values[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[row, :n], alone.bias[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(errors[row, :n], refit_errors(own, alone, metric[:1])[0], rtol=1e-3, atol=1e-6)
        assert not together.values[row, n:].any()
    assert (together.bias.abs().amax(1) > 0).sum() >= 3, "starts are no proof"


def test_fitted_weights_stay_within_bounds() -> None:
    draw = torch.Generator().manual_seed(1)
    a, none = torch.rand(60, 12, generator=draw), torch.zeros(1, 12, dtype=torch.bool)
    wanted = torch.linspace(-3, 150, 12)
    gram, n_real = a.T @ a, torch.tensor([12])
    (found,) = bounded_ridge(gram[None], (gram @ wanted)[None], MatchSettings(weight_ridge=1e-6), none, n_real)
    assert found.min() == 0.01 and found.max() == 100
    slope = (a.T @ a) @ (found - wanted)
    inside = (found > 0.01) & (found < 100)
    assert inside.any() and (slope[inside].abs() < 0.05 * slope.abs().max()).all()
    assert (slope[found == 0.01] > 0).all() and (slope[found == 100] < 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": torch.zeros(120, 8)},  # attention that underflows
        {"weights": torch.full((120, 8), 0.1)},  # a singular system
        {"values": torch.ones(8, 6), "target": torch.ones(120, 6)},
        {"weights": torch.full((120, 8), torch.nan)},
        {"target": torch.full((120, 6), torch.inf)},
    ],
)
def test_degenerate_systems_give_finite_results(change: dict[str, torch.Tensor]) -> None:
    fitted = fit({**head(), **change})
    assert fitted.values.isfinite().all() and fitted.bias.isfinite().all()


@pytest.mark.parametrize("m", [1, 2, 4, 5])
def test_fit_with_fewer_rows_than_entries_is_finite(m: int) -> None:
    fitted = fit(head(m=m, kept=20))
    assert fitted.values.isfinite().all() and fitted.bias.isfinite().all()
    if m < 4:  # no row is held out: nothing can be chosen
        assert not fitted.bias.any()


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
    monkeypatch.setattr("kv_memory.compress.descent._WEIGHTS", 1)  # each head by itself
    alone = document.keep(0.4)
    torch.testing.assert_close(parts.values, alone.values, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole.positions, parts.positions) or not torch.allclose(whole.values, parts.values)


def test_many_entries_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    system = system_of(head(n=40, kept=24, m=80))

    def error(values: torch.Tensor, bias: torch.Tensor) -> float:
        shares = system.weights * bias.exp()[:, None]
        shares = shares / (system.rest + shares.sum(-1))[..., None]
        return float((shares @ values - system.target).square().mean())

    monkeypatch.setattr("kv_memory.compress.fitting._AT_ONCE", 10)
    parts = list(system.parts())
    assert [own for own, _ in parts] == [slice(0, 10), slice(10, 20), slice(20, 30)]
    torch.testing.assert_close(torch.stack([part.target for _, part in parts]).sum(0), system.target)
    torch.testing.assert_close(torch.stack([1 - part.rest for _, part in parts]).sum(0), 1 - system.rest)
    fitted = [fit_heads(part, SETTINGS) for _, part in parts]
    values, bias = torch.cat([part.values for part in fitted], 1), torch.cat([part.bias for part in fitted], 1)
    assert error(values, bias) < 0.8 * error(system.values, torch.zeros(1, 24))


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
