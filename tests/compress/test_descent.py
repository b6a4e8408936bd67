"""Keys, values and biases of a head moved by gradient descent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor, Matched, MatchSettings
from kv_memory.compress.descent import MovedHead, MovingHead, alike, descend
from kv_memory.compress.fitting import HeadSystem, fit_head
from kv_memory.compress.reference_rows import ReferenceRows
from tests.reference import letters, shared_backbone

ROWS, KEPT, DIM, LEARNED = 800, 6, 4, 600
SETTINGS = MatchSettings(part_tokens=32, key_steps=8, key_rate=0.05, rows_per_step=250)


def make_head(seed: int = 0, *, kept: int = KEPT, fixed: tuple[int, ...] = ()) -> MovingHead:
    """A head of 20 entries of which the first are kept, and fitted."""
    draw = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(ROWS, DIM, generator=draw), torch.randn(20, DIM, generator=draw)
    values, other = torch.randn(20, 5, generator=draw), torch.rand(ROWS, generator=draw) + 0.5
    logits = query @ keys.T
    total = torch.cat([logits, other[:, None].log()], 1).logsumexp(1)
    weights = (logits - total[:, None]).exp()
    scale = torch.rand(ROWS, generator=draw) + 0.5
    system = HeadSystem(
        weights=weights[:, :kept],
        rest=other / total.exp(),
        target=weights @ values,
        values=values[:kept],
        scale=scale,
        n_learned=LEARNED,
    )
    rows = ReferenceRows(
        query=query[None],
        own=other.log()[None],
        positions=torch.full((1, ROWS), 30),
        scale=scale[None],
        scaling=1.0,
        softcap=None,
        window=None,
    )
    marked = torch.zeros(kept, dtype=torch.bool)
    marked[list(fixed)] = True
    fitted = fit_head(system, marked, SETTINGS)
    return MovingHead(rows, total, system, torch.arange(kept), keys[:kept], fitted, marked)


def run(
    seed: int = 0, *, fixed: tuple[int, ...] = (), settings: MatchSettings = SETTINGS
) -> tuple[MovedHead, MovedHead]:
    """The start, and what the descent makes of it."""
    head = make_head(seed, fixed=fixed)
    (found,) = descend([head], settings)
    return MovedHead(head.keys, head.fitted.values, head.fitted.bias), found


def error(moved: MovedHead, seed: int, some: slice) -> float:
    head = make_head(seed)
    system = head.system
    weights = (head.rows.query[0, some] @ moved.keys.T - head.total[some, None] + moved.bias).exp()
    output = weights @ moved.values / (system.rest[some] + weights.sum(1))[:, None]
    return float(((output - system.target[some]) * system.scale[some, None]).square().mean())


def by_hand(seed: int, fixed: tuple[int, ...]) -> MovedHead:
    """The same steps in float64, with gradients worked out by hand."""
    head = make_head(seed, fixed=fixed)
    system, keys, fitted, marked = head.system, head.keys, head.fitted, head.fixed
    query, shift = head.rows.query[0].double(), -head.total.double()[:, None]
    scale = (system.scale / system.scale.mean()).double()[:, None]
    target, rest, free = system.target.double(), system.rest.double()[:, None], (~marked).double()
    size = (target * scale)[:LEARNED].square().mean()
    parts = [keys.double(), fitted.values.double(), fitted.bias.double()]
    units = [keys.double().std(), fitted.values.double().std(), torch.tensor(1.0)]
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
    return MovedHead(k, v, b)


@pytest.mark.parametrize("fixed", [(), (1, 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_are_those_of_gradients_worked_out_by_hand(seed: int, fixed: tuple[int, ...]) -> None:
    _, found = run(seed, fixed=fixed)
    expected = by_hand(seed, fixed)
    for name in ("keys", "values", "bias"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_it_comes_closer_on_rows_held_out(seed: int) -> None:
    start, found = run(seed, settings=MatchSettings(key_steps=60))
    held_out = slice(LEARNED, None)
    assert error(found, seed, held_out) < 0.8 * error(start, seed, held_out)


def test_what_is_fixed_stays_to_the_last_bit() -> None:
    start, found = run(fixed=(1, 4))
    for name in ("keys", "values", "bias"):
        before, after = getattr(start, name), getattr(found, name)
        assert torch.equal(before[[1, 4]], after[[1, 4]]), name
        assert not torch.equal(before[[0, 2]], after[[0, 2]]), name


@pytest.mark.parametrize(
    "settings", [{"key_steps": 0}, {"key_rate": 1e4}], ids=["no steps", "steps that lead away from the rows held out"]
)
def test_the_start_is_kept(settings: dict[str, Any]) -> None:
    start, found = run(settings=MatchSettings(**settings))
    assert all(getattr(found, name) is getattr(start, name) for name in ("keys", "values", "bias"))


def test_heads_moved_together_are_as_if_alone() -> None:
    heads = [make_head(seed, kept=kept, fixed=(1,)) for seed, kept in enumerate([6, 3, 5])]
    for head, found in zip(heads, descend(heads, SETTINGS), strict=True):
        (alone,) = descend([head], SETTINGS)
        for name in ("keys", "values", "bias"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


def test_groups_are_of_like_size_and_hold_every_head() -> None:
    sizes = [0, 50, 3, 52, 400, 3, 70, 8, 51]
    groups = list(alike(sizes, [None] * 9, 1024))
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert [1, 8, 3, 6] in groups and [4] in groups
    assert all(len(group) * max(sizes[i] for i in group) * 1024 <= 1 << 19 or len(group) == 1 for group in groups)
    assert list(alike([], [], 1024)) == []
    assert sorted(alike([5, 5, 5, 5], [None, 24, None, 24], 1024)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("broken", ["values", "target", "scale"])
def test_what_is_no_number_is_not_learned_from(broken: str) -> None:
    head = make_head()
    getattr(head.system, broken)[2] = torch.nan
    (found,) = descend([head], SETTINGS)
    assert found.keys.isfinite().all() and found.values.isfinite().all() and found.bias.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "phi3_longrope"])  # soft cap, windows, partial rotation
def test_keys_of_a_document_move_and_stay_where_they_are_without_steps(name: str) -> None:
    backbone, text = shared_backbone(name), letters(24)  # the longrope model changes its frequencies at 96
    still, moved = (
        Compressor(backbone, selector=Matched(MatchSettings(part_tokens=32, key_steps=n))).compress(
            text, keep_ratio=0.3
        )
        for n in (0, 20)
    )
    plain = Compressor(backbone, selector="sink_recent").compress(text, keep_ratio=1.0)
    assert torch.equal(still.positions, moved.positions) and still.fingerprint != moved.fingerprint
    keys, _, positions, _ = still.padded()
    at = positions.clamp(min=0).long()
    original = plain.keys.gather(2, at[..., None].expand_as(keys))
    torch.testing.assert_close(keys[positions >= 0], original[positions >= 0])
    assert not torch.allclose(still.keys, moved.keys, atol=1e-2)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_window"])  # some layers have a window of 24 tokens
def test_heads_of_a_document_are_moved_as_if_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selector = Matched(MatchSettings(part_tokens=32, key_steps=20))
    document = Compressor(shared_backbone(name), selector=selector).prefill(letters(60))
    together = document.keep(0.3)
    monkeypatch.setattr("kv_memory.compress.descent._WEIGHTS", 1)
    alone = document.keep(0.3)
    torch.testing.assert_close(together.keys, alone.keys, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.values, alone.values, rtol=1e-3, atol=1e-3)
