"""Matched: keep what the layers' outputs need, and fit what is kept.

Three steps, without training. Entries are *scored* by what their loss would do to the output of their layer (an entry
whose value is close to what its head puts out anyway can go, however much attention it gets). They are pruned in
*stages*, because what one entry is worth depends on which others are left. What is kept is *fitted* in closed form so
that it stands for what was dropped: each entry gets a bias, for the attention of the dropped ones, and another value.
The fit follows Attention Matching (arXiv 2602.16284), but that residuals are relative to the whole softmax, that ridges
pull to the original values and to no bias, and that their strength is chosen on rows held out.

For a query i of query head g, P[i, j] is its attention to entry j with the full cache (prefix and its own row in the
denominator), o[i] what prefix and document put out together, W_g the head's part of the output projection, M[g] is
W_g^T W_g, and r[i] the norm of the hidden state that enters the layer. All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kv_memory.backbone import Backbone
from kv_memory.compress.reading import check_finite, choose
from kv_memory.compress.reference_rows import CUE_TOKENS, QUESTION_TOKENS, REQUEST_TOKENS, ReferenceRows, record_rows
from kv_memory.config import Budget
from kv_memory.errors import ConfigError
from kv_memory.positioned import PositionedCache

__all__ = [
    "FittedHead",
    "HeadSystem",
    "Match",
    "MatchSettings",
    "Matched",
    "fit_head",
    "match_document",
    "output_errors",
]

_LOGITS = 1 << 22  # attention logits that are written out at once
_LEAST, _MOST = 1e-2, 1e2  # of an entry's weight, e to its bias
_AT_ONCE = 2048  # entries of a head that are fitted together
_STAGE_RIDGES = (1e-2, 1e-1)  # of the fits of stages, which need not be the best
_REFIT_RIDGE = 1e-2  # of refit errors, in mean diagonals; of 1e-3 to 1e-1 the results were the same
_TINY = 1e-12  # of a mean diagonal
_HELD_OUT = 4  # of so many rows one is held out of the choice of the ridge


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """How entries are chosen and fitted; part of the fingerprint.

    Attributes:
        score: What entries are chosen by: `output`, see `output_errors`; or `attention`, the highest that any row pays.
        stages: Multiples of the budget that are kept on the way, each fitted and scored anew; none for one choice.
        fit: Whether what is kept is fitted; without it the stages have no effect.
        weight_ridge: How strongly weights are pulled to 1, in mean diagonals of their system.
        value_ridges: How strongly values are pulled to what they were, in mean diagonals; the best on held-out rows.
        part_tokens: Length of the parts in which the document is repeated.
        max_rows: Queries of a head that stages are fitted to, at most; of a longer document evenly spread ones.
        max_final_rows: The same for the last fit.
    """

    score: Literal["output", "attention"] = "output"
    stages: tuple[float, ...] = (4.0, 2.0, 1.4)
    fit: bool = True
    weight_ridge: float = 1e-2
    value_ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 100.0)
    part_tokens: int = 1024
    max_rows: int = 4096
    max_final_rows: int = 8192

    def __post_init__(self) -> None:
        checks = {
            "stages": (all(1 < stage < math.inf for stage in self.stages), "numbers above 1"),
            "weight_ridge": (0 < self.weight_ridge < math.inf, "above 0"),
            "value_ridges": (all(0 < v < math.inf for v in self.value_ridges) and self.value_ridges, "numbers above 0"),
            "part_tokens": (self.part_tokens >= 1, "at least 1"),
            "max_rows": (self.max_rows >= 1, "at least 1"),
            "max_final_rows": (self.max_final_rows >= 1, "at least 1"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}", where=name)

    @property
    def name(self) -> str:
        """For the fingerprint."""
        stages = ",".join(f"{stage:g}" for stage in self.stages) if self.fit else "score"
        ridges = ",".join(f"{ridge:g}" for ridge in self.value_ridges)
        sizes = f"{self.part_tokens}:{self.max_rows}:{self.max_final_rows}"
        return f"matched:{self.score}:{stages}:{self.weight_ridge:g}:{ridges}:{sizes}"


@dataclass(frozen=True, eq=False)
class Match:
    """What is kept of a document.

    Attributes:
        selected: Bool `(num_layers, num_kv_heads, n)`.
        values: `(n_entries, head_dim)`, layer by layer and head by head, float32.
        bias: `(n_entries,)`, float32.
    """

    selected: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


def match_document(
    backbone: Backbone,
    ids: torch.Tensor,
    cache: PositionedCache,
    *,
    n_kept: int,
    forced: torch.Tensor,
    settings: MatchSettings,
) -> Match:
    """Score, prune and fit the entries of one document.

    Args:
        backbone: The model.
        ids: `(1, n)`, the document.
        cache: Prefix and document, as they were prefilled, with room for `reference_rows`.
        n_kept: Entries to keep, on average over layers and heads.
        forced: Bool `(n,)`; these are kept whatever their score, and neither moved nor biased.
        settings: See `MatchSettings`.
    """
    document = _Document(backbone, ids, cache, settings)
    scores = document.scores()
    check_finite(backbone, scores)
    lengths, budget = torch.tensor([ids.shape[1]]), n_kept
    fixed = forced.to(ids.device)
    stages = [stage for stage in settings.stages if round(budget * stage) < ids.shape[1]] if settings.fit else []
    for index, stage in enumerate((*stages, 1.0)):
        most = max(budget, round(budget * stage))
        chosen = choose(scores[:, None], lengths, torch.tensor([most]), budget="model", forced=forced[None])[:, 0]
        scores = torch.full_like(scores, -1.0)
        values, biases = [], []
        for layer in range(backbone.num_layers):
            rows = document.rows(layer)
            for head in range(backbone.num_kv_heads):
                kept = chosen[layer, head].nonzero()[:, 0]
                if index < len(stages):
                    scores[layer, head, kept] = document.rescore(rows, layer, head, kept, fixed[kept])
                    continue
                fitted = document.fit(rows, layer, head, kept, fixed[kept])
                values.append(fitted.values)
                biases.append(fitted.bias)
    return Match(chosen, torch.cat(values), torch.cat(biases))


class Matched:
    """The selector: `match` chooses and fits; as a `Selector` it only scores."""

    budget: Budget = "model"

    def __init__(self, settings: MatchSettings | None = None) -> None:
        self.settings = settings or MatchSettings()
        self.name = self.settings.name
        request = REQUEST_TOKENS + CUE_TOKENS
        self.extra_tokens = max(self.settings.part_tokens + request, QUESTION_TOKENS)

    def watch(self, backbone: Backbone, *, n_prefix: int, n_tokens: int) -> None:
        """Needs to see nothing of the prefill."""

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, watched: object) -> torch.Tensor:
        """What the loss of each entry would do to the output of its layer, see `output_errors`."""
        return _Document(backbone, ids, cache, self.settings).scores()

    def match(
        self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, *, n_kept: int, forced: torch.Tensor
    ) -> Match:
        """See `match_document`."""
        return match_document(backbone, ids, cache, n_kept=n_kept, forced=forced, settings=self.settings)


@dataclass(frozen=True, eq=False)
class HeadSystem:
    """What the entries kept in one head are to stand for. A row is a query of one of the heads that share them.

    Attributes:
        weights: P of the kept entries, `(rows, kept)`.
        rest: P of all that is no document entry, `(rows,)`.
        target: What the document's entries put out together, `(rows, head_dim)`.
        values: Of the kept entries, `(kept, head_dim)`.
        scale: 1 / r, `(rows,)`.
        held_out: Bool `(rows,)`, those on which the ridge of the values is chosen.
    """

    weights: torch.Tensor
    rest: torch.Tensor
    target: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor
    held_out: torch.Tensor

    @property
    def row_scale(self) -> torch.Tensor:
        """1 / r over its mean, `(rows, 1)`."""
        return (self.scale / self.scale.mean())[:, None]

    def parts(self) -> Iterator[tuple[slice, HeadSystem]]:
        """The entries in parts that are fitted apart: a system of all entries of a long document would not fit memory.

        Of what was dropped, mass and output, each part stands for the share that its entries have of the kept mass.
        """
        n = len(self.values)
        if n <= _AT_ONCE:
            yield slice(0, n), self
            return
        kept = self.weights.sum(1, keepdim=True).clamp_min(_TINY)
        missing = self.target - self.weights @ self.values
        for start in range(0, n, _AT_ONCE):
            own = slice(start, start + _AT_ONCE)
            share = self.weights[:, own].sum(1, keepdim=True) / kept
            target = self.weights[:, own] @ self.values[own] + share * missing
            rest = 1 - share[:, 0] * (1 - self.rest)
            yield own, replace(self, weights=self.weights[:, own], rest=rest, target=target, values=self.values[own])

    def shares(self, weight: torch.Tensor) -> torch.Tensor:
        """What each entry's value counts for in each row when its attention is `weight` times as much, scaled."""
        shares = self.weights * weight
        return shares.mul_(self.row_scale / (self.rest[:, None] + shares.sum(1, keepdim=True)).clamp_min(1e-6))


@dataclass(frozen=True, eq=False)
class FittedHead:
    """The entries kept in one head: `values` `(kept, head_dim)` and `bias` `(kept,)`."""

    values: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one layer as they are used: `(num_kv_heads, group, m)` of everything."""

    rows: ReferenceRows
    total: torch.Tensor  # logsumexp over prefix, document and own row
    output: torch.Tensor  # (num_kv_heads, group, m, head_dim), o
    metric: torch.Tensor  # (num_heads, head_dim, head_dim), W_g^T W_g


class _Document:
    """One document with its reference rows."""

    def __init__(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, settings: MatchSettings) -> None:
        self._backbone = backbone
        self._settings = settings
        self._n = ids.shape[1]
        self._cache = cache
        self._n_prefix = int(cache.next_positions[0]) - self._n
        self._group = backbone.num_heads // backbone.num_kv_heads
        self._reference = record_rows(backbone, ids, cache, part_tokens=settings.part_tokens)
        self._rows: list[_Rows] = []

    def rows(self, layer: int) -> _Rows:
        return self._rows[layer]

    def _metric(self, layer: int) -> torch.Tensor:
        module: Any = self._backbone.layers[layer]
        weight: torch.Tensor = module.self_attn.o_proj.weight.float()  # (hidden_size, num_heads * head_dim)
        parts: torch.Tensor = weight.reshape(len(weight), self._backbone.num_heads, -1).transpose(0, 1)
        return parts.transpose(1, 2) @ parts

    def _entries(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of prefix and document in one head, `(n_prefix + n, head_dim)`, float32."""
        keys, values = self._cache.layer(layer)
        end = self._n_prefix + self._n
        return keys[0, head, :end].float(), values[0, head, :end].float()

    def _blocks(self, n_keys: int, m: int) -> Iterator[slice]:
        size = max(1, _LOGITS // (n_keys * self._group))
        for start in range(0, m, size):
            yield slice(start, min(start + size, m))

    def scores(self) -> torch.Tensor:
        """What the loss of each entry would do: `(num_layers, num_kv_heads, n)`, float32."""
        device = self._reference[0].query.device
        scores = torch.zeros(self._backbone.num_layers, self._backbone.num_kv_heads, self._n, device=device)
        for layer, rows in enumerate(self._reference):
            m = rows.positions.shape[1]
            metric = self._metric(layer)
            total, output = (
                torch.empty(self._backbone.num_heads, m, device=device),
                torch.empty(self._backbone.num_heads, m, self._backbone.head_dim, device=device),
            )
            for head in range(self._backbone.num_kv_heads):
                keys, values = self._entries(layer, head)
                places = torch.arange(len(keys), device=device)
                own = slice(head * self._group, (head + 1) * self._group)
                for block in self._blocks(len(keys), m):
                    logits = rows.logits(keys, places, own, block)
                    highest = torch.maximum(logits.amax(-1), rows.own[own, block])[..., None]
                    weights = logits.sub_(highest).exp_()
                    sums = weights.sum(-1, keepdim=True) + (rows.own[own, block, None] - highest).exp()
                    weights = weights.div_(sums)
                    total[own, block] = (sums.log() + highest)[..., 0]
                    output[own, block] = weights @ values
                    inside = weights[..., self._n_prefix :]
                    if self._settings.score == "attention":
                        scores[layer, head] = torch.maximum(scores[layer, head], inside.amax((0, 1)))
                        continue
                    scores[layer, head] += output_errors(
                        inside, values[self._n_prefix :], output[own, block], metric[own], rows.scale[own, block]
                    )
            shape = (self._backbone.num_kv_heads, self._group)
            self._rows.append(_Rows(rows, total.unflatten(0, shape), output.unflatten(0, shape), metric))
        return scores

    def fit(self, rows: _Rows, layer: int, head: int, kept: torch.Tensor, fixed: torch.Tensor) -> FittedHead:
        """Fit the entries `kept` of one head; those that are `fixed` stay as they are."""
        _, values = self._entries(layer, head)
        start = values[self._n_prefix + kept]
        if not len(kept) or not self._settings.fit:
            return FittedHead(start, start.new_zeros(len(kept)))
        system = self._system(rows, layer, head, kept, self._settings.max_final_rows)
        return _joined([fit_head(part, fixed[own], self._settings) for own, part in system.parts()])

    def rescore(self, rows: _Rows, layer: int, head: int, kept: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """What the loss of each entry `kept` would do when all others are fitted again, `(kept,)`."""
        if not len(kept):
            return torch.zeros(0, device=kept.device)
        system = self._system(rows, layer, head, kept, self._settings.max_rows)
        metric, errors = rows.metric[head * self._group : (head + 1) * self._group], []
        quick = replace(self._settings, value_ridges=_STAGE_RIDGES)
        for own, part in system.parts():
            errors.append(refit_errors(part, fit_head(part, fixed[own], quick), metric))
        return torch.cat(errors)

    def _system(self, of_layer: _Rows, layer: int, head: int, kept: torch.Tensor, most: int) -> HeadSystem:
        keys, values = self._entries(layer, head)
        rows, own = of_layer.rows, slice(head * self._group, (head + 1) * self._group)
        m = rows.positions.shape[1]
        picked = self._picked(m, most)
        thin = rows.pick(own, picked)
        total, output = of_layer.total[head].flatten()[picked], of_layer.output[head].flatten(0, 1)[picked]

        def weights(where: torch.Tensor) -> torch.Tensor:
            return (thin.logits(keys[where], where, slice(0, 1), slice(None))[0] - total[:, None]).exp()

        before = weights(torch.arange(self._n_prefix, device=keys.device))
        return HeadSystem(
            weights=weights(kept + self._n_prefix),
            rest=before.sum(-1) + (thin.own[0] - total).exp(),
            target=output - before @ values[: self._n_prefix],
            values=values[self._n_prefix + kept],
            scale=thin.scale[0],
            # One position in four is held out, with all its heads, which look alike.
            held_out=picked % m % _HELD_OUT == _HELD_OUT - 1,
        )

    def _picked(self, m: int, most: int) -> torch.Tensor:
        """Which of a head's `group * m` rows are used: all, or evenly spread ones of which every position has some."""
        rows = torch.arange(self._group * m, device=self._reference[0].query.device)
        step = -(-len(rows) // most)
        return rows[(rows // m + rows % m) % step == 0]


def output_errors(
    weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """What removing each entry alone, and renormalising, does to the layer's output relative to the residual stream.

    `sum over queries and heads of (P / (1 - P))^2 (v - o)^T M (v - o) / r^2`, with 1 - P held at 0.01 or more.

    Args:
        weights: P, `(group, m, n)`.
        values: v, `(n, head_dim)`.
        output: o, `(group, m, head_dim)`.
        metric: M, `(group, head_dim, head_dim)`.
        scale: 1 / r, `(group, m)`.

    Returns:
        `(n,)`.
    """
    projected = values @ metric  # (group, n, head_dim)
    squares = scale.square()[..., None]  # (group, m, 1)
    of_values = (projected * values).sum(-1)[:, None]  # (group, 1, n)
    of_output = ((output @ metric) * output).sum(-1, keepdim=True)  # (group, m, 1)
    # (v - o)^T M (v - o) / r^2 for all pairs as one product: as sums of three it took twice the time.
    left = torch.cat([output * (-2 * squares), squares, of_output * squares], -1)
    right = torch.cat([projected.transpose(1, 2), of_values, torch.ones_like(of_values)], 1)
    odds = weights / (1 - weights).clamp_min_(0.01)
    return odds.square_().mul_(left @ right).sum((0, 1)).clamp_min(0)


def _joined(parts: Sequence[FittedHead]) -> FittedHead:
    return FittedHead(torch.cat([part.values for part in parts]), torch.cat([part.bias for part in parts]))


def fit_head(system: HeadSystem, fixed: torch.Tensor, settings: MatchSettings) -> FittedHead:
    """Weights and values of the entries kept in one head, so that they stand for all of the document's.

    Args:
        system: The entries and the rows.
        fixed: Bool `(kept,)`; these are neither moved nor biased.
        settings: See `MatchSettings`.

    Returns:
        The start (no bias, the values given) where nothing is closer to the target on the rows held out.
    """
    values, held_out, learned = system.values, system.held_out, ~system.held_out
    target = system.target * system.row_scale
    # 1. Weights that restore the mass which the rows paid to the whole document.
    scaled = system.weights[learned] * system.row_scale[learned]
    mass = ((1 - system.rest) * system.row_scale[:, 0])[learned]
    weight = bounded_ridge(scaled.T @ scaled, scaled.T @ mass, settings, fixed)
    del scaled
    # 2. Values that restore the output, for each ridge, from the rows learned; the best on those held out.
    shares = system.shares(weight)
    residual = target - shares @ values
    gram, right = _normal(shares[learned], residual[learned], fixed)
    gram_out, right_out = _normal(shares[held_out], residual[held_out], fixed)
    before = residual[held_out].square().sum()
    errors: dict[float, float] = {}
    for ridge in settings.value_ridges:
        move = _solve(gram, right, ridge)
        errors[ridge] = float(before + (move * (gram_out @ move - 2 * right_out)).sum())
    best = min(errors, key=lambda ridge: (not math.isfinite(errors[ridge]), errors[ridge]))
    plain = system.shares(torch.ones_like(weight))[held_out]
    at_start = float((plain @ values - target[held_out]).square().sum())
    # 3. From all rows, unless the start was better.
    fitted = values + _solve(gram + gram_out, right + right_out, best)
    if errors[best] < at_start and bool(fitted.isfinite().all() and weight.isfinite().all()):
        return FittedHead(fitted, weight.log())
    return FittedHead(values, torch.zeros_like(weight))


def refit_errors(system: HeadSystem, fitted: FittedHead, metric: torch.Tensor) -> torch.Tensor:
    """What removing each entry does to the layer's output when the values of all others are fitted again.

    Of a least squares fit with the system G, losing the j-th value v costs `v^2 / (G^-1)[j, j]` (Optimal Brain Surgeon,
    Hassibi and Stork, 1993): nothing where the others can stand for it.

    Args:
        system: The entries and the rows.
        fitted: The entries as they are.
        metric: M, `(group, head_dim, head_dim)`; the heads' mean is taken.

    Returns:
        `(kept,)`, on the scale of `output_errors`; 0 where it cannot be told.
    """
    shares = system.shares(fitted.bias.exp())
    gram = shares.T @ shares
    inverse = torch.linalg.inv_ex(gram + _ridge(gram, _REFIT_RIDGE)).inverse.diagonal().clamp_min(_TINY)
    loss = ((fitted.values @ metric.mean(0)) * fitted.values).sum(-1) / inverse
    errors: torch.Tensor = (loss * system.scale.mean().square()).nan_to_num(0.0, 0.0, 0.0)
    return errors


def _normal(x: torch.Tensor, y: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The system and the right side of a least squares fit in which the entries that are `fixed` have no part."""
    gram, right = x.T @ x, x.T @ y
    gram[fixed], gram[:, fixed], right[fixed] = 0.0, 0.0, 0.0
    return gram, right


def _ridge(gram: torch.Tensor, strength: float) -> torch.Tensor:
    return torch.eye(len(gram), device=gram.device) * (strength * gram.diagonal().mean().clamp_min(_TINY))


def _solve(gram: torch.Tensor, right: torch.Tensor, strength: float) -> torch.Tensor:
    """`(G + ridge)^-1 b`; not a number where G is not."""
    solution: torch.Tensor = torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram + _ridge(gram, strength)).L)
    return solution


def bounded_ridge(
    gram: torch.Tensor, right: torch.Tensor, settings: MatchSettings, fixed: torch.Tensor
) -> torch.Tensor:
    """The weights w in [0.01, 100] that make `w^T G w - 2 b^T w + ridge |w - 1|^2` smallest.

    Block principal pivoting: weights beyond a bound are held there, those that want back are let go.

    Args:
        gram: G, `(n, n)`.
        right: b, `(n,)`.
        settings: For the ridge, in mean diagonals of G.
        fixed: Bool `(n,)`; these stay 1.
    """
    ridge = _ridge(gram, settings.weight_ridge)
    system, wanted = gram + ridge, right + ridge.diagonal()
    weight = torch.ones_like(right)
    free = ~fixed
    for _ in range(20):
        held = torch.where(free, 0.0, weight)
        masked = torch.where(free[:, None] & free, system, 0.0) + torch.diag((~free).float())
        found = torch.linalg.solve_ex(masked, torch.where(free, wanted - system @ held, weight)).result
        slope = system @ found - wanted
        low, high = free & (found < _LEAST), free & (found > _MOST)
        back = ~free & ~fixed & (((found <= _LEAST) & (slope < 0)) | ((found >= _MOST) & (slope > 0)))
        weight = found.clamp(_LEAST, _MOST)
        if not bool((low | high | back).any()):
            break
        free = (free & ~low & ~high) | back
    return torch.where(fixed, 1.0, weight)
