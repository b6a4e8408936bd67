"""The fit of a head's entries against float64 written out with loops; and what it does with odd input."""

from __future__ import annotations

import pytest
import torch

from kv_memory.compress.fitting import FittedHeads, HeadGroup, bounded_ridge, fit_heads, refit_errors
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows
from kv_memory.model.attention import AttentionKind

SETTINGS = MatchSettings()


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


def system_of(*given: dict[str, torch.Tensor]) -> HeadGroup:
    """Heads side by side, padded; rows that are held out stand last."""
    held_out, most = given[0]["held_out"], max(len(one["values"]) for one in given)
    order = held_out.to(torch.uint8).argsort(stable=True)

    def padded(part: torch.Tensor, dim: int) -> torch.Tensor:
        room = list(part.shape)
        room[dim] = most - part.shape[dim]
        return torch.cat([part, part.new_zeros(room)], dim)

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([one[name][order] for one in given])

    none, values = torch.zeros(len(given), len(order), 0), torch.stack([padded(one["values"], 0) for one in given])
    return HeadGroup(
        rows=ReferenceRows(none, none, none, stacked("scale"), AttentionKind(scaling=1.0)),
        total=none,
        rest=stacked("rest"),
        target=stacked("target"),
        n_learned=int((~held_out).sum()),
        where=torch.arange(most).expand(len(given), -1),
        keys=torch.zeros_like(values),
        bias=torch.zeros(len(given), most),
        values=values,
        weights=torch.stack([padded(one["weights"], 1)[order] for one in given]),
        real=torch.stack([torch.arange(most) < len(one["values"]) for one in given]),
        fixed=torch.stack([padded(one["fixed"], 0) for one in given]),
    )


def fit(given: dict[str, torch.Tensor]) -> FittedHeads:
    """Of one head, without the dimension of heads."""
    fitted = fit_heads(system_of(given), SETTINGS)
    return FittedHeads(fitted.keys[0], fitted.values[0], fitted.bias[0])


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
    start = FittedHeads(torch.zeros(1, n, 6), given["values"][None], torch.zeros(1, n))
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


def test_many_entries_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    system = system_of(head(n=40, kept=24, m=80))

    def error(values: torch.Tensor, bias: torch.Tensor) -> float:
        shares = system.weights * bias.exp()[:, None]
        shares = shares / (system.rest + shares.sum(-1))[..., None]
        return float((shares @ values - system.target).square().mean())

    monkeypatch.setattr("kv_memory.compress.fitting._AT_ONCE", 10)
    parts = list(system.parts())
    assert [part.where[0].tolist() for part in parts] == [[*range(10)], [*range(10, 20)], [*range(20, 24)]]
    torch.testing.assert_close(torch.stack([part.target for part in parts]).sum(0), system.target)
    torch.testing.assert_close(torch.stack([1 - part.rest for part in parts]).sum(0), 1 - system.rest)
    fitted = [fit_heads(part, SETTINGS) for part in parts]
    values, bias = torch.cat([part.values for part in fitted], 1), torch.cat([part.bias for part in fitted], 1)
    assert error(values, bias) < 0.8 * error(system.values, torch.zeros(1, 24))
