"""Keys, values and biases of a head moved by gradient descent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor, Matched, MatchSettings
from kv_memory.compress.descent import descend
from kv_memory.compress.fitting import FittedHeads, HeadGroup, fit_heads
from kv_memory.compress.head_fit import alike
from kv_memory.compress.reference_rows import ReferenceRows
from kv_memory.model.attention import AttentionKind
from tests.reference import letters, padded, shared_backbone

ROWS, KEPT, DIM, LEARNED = 800, 6, 4, 600
CPU = torch.device("cpu")
SETTINGS = MatchSettings(part_tokens=32, key_steps=8, key_rate=0.05, rows_per_step=250)


def make_heads(*seeds: int, kept: tuple[int, ...] = (KEPT,), fixed: tuple[int, ...] = ()) -> HeadGroup:
    """Heads of 20 entries each, of which the first are kept."""
    parts: dict[str, list[torch.Tensor]] = {}
    real = torch.arange(max(kept)) < torch.tensor(kept)[:, None]
    for seed, own in zip(seeds, real, strict=True):
        draw = torch.Generator().manual_seed(seed)
        query, keys = torch.randn(ROWS, DIM, generator=draw), torch.randn(20, DIM, generator=draw)
        values, other = torch.randn(20, 5, generator=draw), torch.rand(ROWS, generator=draw) + 0.5
        logits, n = query @ keys.T, len(own)
        total = torch.cat([logits, other[:, None].log()], 1).logsumexp(1)
        weights = (logits - total[:, None]).exp()
        made = {
            "query": query,
            "own": other.log(),
            "total": total,
            "weights": weights[:, :n] * own,
            "rest": other / total.exp(),
            "target": weights @ values,
            "keys": keys[:n] * own[:, None],
            "values": values[:n] * own[:, None],
            "scale": torch.rand(ROWS, generator=draw) + 0.5,
        }
        for name, part in made.items():
            parts.setdefault(name, []).append(part)
    stacked = {name: torch.stack(several) for name, several in parts.items()}
    marked = torch.zeros_like(real)
    marked[:, list(fixed)] = True
    rows = ReferenceRows(
        **{name: stacked[name] for name in ("query", "own", "scale")},
        positions=torch.full((len(seeds), ROWS), 30),
        kind=AttentionKind(scaling=1.0),
    )
    return HeadGroup(
        **{name: stacked[name] for name in ("weights", "total", "rest", "target", "keys", "values")},
        rows=rows,
        where=torch.arange(max(kept)).expand(len(seeds), -1),
        bias=torch.zeros(len(seeds), max(kept)),
        real=real,
        fixed=marked,
        n_learned=LEARNED,
    )


def start_of(heads: HeadGroup) -> FittedHeads:
    return fit_heads(heads, SETTINGS)


def descended(heads: HeadGroup, settings: MatchSettings = SETTINGS) -> FittedHeads:
    return descend(heads, start_of(heads), settings)


def run(
    seed: int = 0, *, fixed: tuple[int, ...] = (), settings: MatchSettings = SETTINGS
) -> tuple[FittedHeads, FittedHeads]:
    """The start of one head, and what the descent makes of it."""
    heads = make_heads(seed, fixed=fixed)
    start, found = (moved.of(0, heads.real[0]) for moved in (start_of(heads), descended(heads, settings)))
    return start, found


def error(moved: FittedHeads, seed: int, some: slice) -> float:
    heads = make_heads(seed)
    weights = (heads.rows.query[0, some] @ moved.keys.T - heads.total[0, some, None] + moved.bias).exp()
    output = weights @ moved.values / (heads.rest[0, some] + weights.sum(1))[:, None]
    return float(((output - heads.target[0, some]) * heads.rows.scale[0, some, None]).square().mean())


def by_hand(seed: int, fixed: tuple[int, ...]) -> FittedHeads:
    """The same steps in float64, with gradients worked out by hand."""
    heads = make_heads(seed, fixed=fixed)
    start, marked = start_of(heads), heads.fixed[0]
    query, shift = heads.rows.query[0].double(), -heads.total[0].double()[:, None]
    scale = (heads.rows.scale[0] / heads.rows.scale[0].mean()).double()[:, None]
    target, rest, free = heads.target[0].double(), heads.rest[0].double()[:, None], (~marked).double()
    size = (target * scale)[:LEARNED].square().mean()
    parts = [start.keys[0].double(), start.values[0].double(), start.bias[0].double()]
    units = [parts[0].std(), parts[1].std(), torch.tensor(1.0)]
    moves = [torch.zeros_like(part) for part in parts]
    mean, square = ([torch.zeros_like(part) for part in parts] for _ in range(2))
    n_parts = -(-LEARNED // SETTINGS.rows_per_step)
    for step in range(SETTINGS.key_steps):
        k, v, b = (
            p + m * u * (free[:, None] if p.ndim == 2 else free) for p, m, u in zip(parts, moves, units, strict=True)
        )
        rows = list(range(step % n_parts, LEARNED, n_parts))
        weights = (query[rows] @ k.T + shift[rows] + b).exp()
        shares = weights / (rest[rows] + weights.sum(1, keepdim=True))
        output = shares @ v
        pull = 2 * (output - target[rows]) * scale[rows] ** 2 / (size * output.numel())
        of_logits = shares * (pull @ v.T - (pull * output).sum(1, keepdim=True))
        slopes = [of_logits.T @ query[rows], shares.T @ pull, of_logits.sum(0)]
        rate = SETTINGS.key_rate * (1 - step / SETTINGS.key_steps)
        for i, slope in enumerate(slopes):
            slope = slope * units[i] * (free[:, None] if slope.ndim == 2 else free)
            mean[i] = 0.9 * mean[i] + 0.1 * slope
            square[i] = 0.95 * square[i] + 0.05 * slope**2
            step_size = (mean[i] / (1 - 0.9 ** (step + 1))) / ((square[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            moves[i] = moves[i] - rate * step_size
    k, v, b = (
        p + m * u * (free[:, None] if p.ndim == 2 else free) for p, m, u in zip(parts, moves, units, strict=True)
    )
    weights = (query @ k.T + shift + b).exp()
    shares = weights / (rest + weights.sum(1, keepdim=True)) * scale
    moving = [i for i in range(KEPT) if i not in fixed]
    own = shares[:, moving]
    gram = shares.T @ shares
    gram[list(fixed)], gram[:, list(fixed)] = 0.0, 0.0
    ridge = 1e-2 * gram.diagonal().mean()
    v[moving] += torch.linalg.solve(
        own.T @ own + ridge * torch.eye(len(moving)).double(), own.T @ (target * scale - shares @ v)
    )
    return FittedHeads(k, v, b)


@pytest.mark.parametrize("fixed", [(), (1, 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_equal_gradients_computed_by_hand(seed: int, fixed: tuple[int, ...]) -> None:
    _, found = run(seed, fixed=fixed)
    expected = by_hand(seed, fixed)
    for name in ("keys", "values", "bias"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_descent_reduces_the_error_on_held_out_rows(seed: int) -> None:
    start, found = run(seed, settings=MatchSettings(key_steps=60))
    held_out = slice(LEARNED, None)
    assert error(found, seed, held_out) < 0.8 * error(start, seed, held_out)


def test_fixed_entries_stay_bit_identical() -> None:
    start, found = run(fixed=(1, 4))
    for name in ("keys", "values", "bias"):
        before, after = getattr(start, name), getattr(found, name)
        assert torch.equal(before[[1, 4]], after[[1, 4]]), name
        assert not torch.equal(before[[0, 2]], after[[0, 2]]), name


@pytest.mark.parametrize(
    "settings", [{"key_steps": 0}, {"key_rate": 1e4}], ids=["no steps", "steps that lead away from the rows held out"]
)
def test_start_is_kept_without_steps_or_gain(settings: dict[str, Any]) -> None:
    start, found = run(settings=MatchSettings(**settings))
    assert all(torch.equal(getattr(found, name), getattr(start, name)) for name in ("keys", "values", "bias"))


def test_heads_optimised_together_equal_heads_optimised_alone() -> None:
    kept = (6, 3, 5)
    together = descended(make_heads(0, 1, 2, kept=kept, fixed=(1,)))
    for seed, n in enumerate(kept):
        found = together.of(seed, torch.arange(6) < n)
        alone = descended(make_heads(seed, kept=(n,), fixed=(1,))).of(0, torch.ones(n, dtype=torch.bool))
        for name in ("keys", "values", "bias"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


def test_groups_have_similar_sizes_and_cover_every_head() -> None:
    sizes = [0, 50, 3, 52, 400, 3, 70, 8, 51]
    groups = list(alike(sizes, [None] * 9, 1024, device=CPU))
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert [1, 8, 3, 6] in groups and [4] in groups
    assert all(len(group) * max(sizes[i] for i in group) * 1024 <= 1 << 19 or len(group) == 1 for group in groups)
    assert list(alike([], [], 1024, device=CPU)) == []
    assert sorted(alike([5, 5, 5, 5], [None, 24, None, 24], 1024, device=CPU)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("broken", ["target", "scale"])
def test_heads_with_nan_rows_are_left_unchanged(broken: str) -> None:
    heads = make_heads(0, 1, kept=(KEPT, KEPT))
    start = start_of(heads)
    (heads.target if broken == "target" else heads.rows.scale)[0, 2] = torch.nan
    found = descend(heads, start, SETTINGS)
    assert found.keys.isfinite().all() and found.values.isfinite().all() and found.bias.isfinite().all()
    assert torch.equal(found.keys[0], heads.keys[0]) and not torch.equal(found.keys[1], heads.keys[1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "phi3_longrope"])  # soft cap, windows, partial rotation
def test_keys_change_only_when_there_are_steps(name: str) -> None:
    backbone, text = shared_backbone(name), letters(24)  # the longrope model changes its frequencies at 96
    still, moved = (
        Compressor(backbone, selector=Matched(MatchSettings(part_tokens=32, key_steps=n))).compress(
            text, keep_ratio=0.3
        )
        for n in (0, 20)
    )
    plain = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=1.0)
    assert torch.equal(still.positions, moved.positions) and still.fingerprint != moved.fingerprint
    keys, _, positions, _ = padded(still)
    at = positions.clamp(min=0).long()
    original = plain.keys.gather(2, at[..., None].expand_as(keys))
    torch.testing.assert_close(keys[positions >= 0], original[positions >= 0])
    assert not torch.allclose(still.keys, moved.keys, atol=1e-2)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_window"])  # some layers have a window of 24 tokens
def test_heads_of_one_document_are_optimised_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selector = Matched(MatchSettings(part_tokens=32, key_steps=20))
    document = Compressor(shared_backbone(name), selector=selector).prefill(letters(60))
    together = document.keep(0.3)
    monkeypatch.setattr("kv_memory.compress.head_fit._WEIGHTS", 1)
    alone = document.keep(0.3)
    torch.testing.assert_close(together.keys, alone.keys, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.values, alone.values, rtol=1e-3, atol=1e-3)
