"""The arithmetic of `matching`, for the entries of several heads: their errors, and the fit in closed form; in float32.

Heads are fitted side by side, each as if it were alone, because the arrays of one are small. They keep different
numbers of entries, so those that keep fewer are padded with entries that get no attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kv_memory.compress.match_settings import MatchSettings

__all__ = ["FittedHeads", "HeadSystem", "bounded_ridge", "fit_heads", "output_errors", "refit_errors", "value_moves"]

_LEAST, _MOST = 1e-2, 1e2  # of an entry's weight, e to its bias
_AT_ONCE = 2048  # entries of a head that are fitted together
_MOVED_RIDGE = 1e-2  # of values behind moved keys, in mean diagonals
_REFIT_RIDGE = 1e-2  # of refit errors, in mean diagonals; of 1e-3 to 1e-1 the results were the same
_TINY = 1e-12  # of a mean diagonal


@dataclass(frozen=True, eq=False)
class HeadSystem:
    """What the entries kept in some heads are to stand for. A row is a query of one of the heads that share them.

    The ridge of the values is chosen on the rows from `n_learned` on, which stand last so that either part is a view.

    Attributes:
        weights: P of the kept entries, `(heads, rows, kept)`; 0 of padding.
        rest: P of all that is no document entry, `(heads, rows)`.
        target: What the document's entries put out together, `(heads, rows, head_dim)`.
        values: Of the kept entries, `(heads, kept, head_dim)`.
        scale: 1 / r, `(heads, rows)`; 0 of a row that is padding, which gets and gives nothing.
        real: Bool `(heads, kept)`; what else is there is padding.
        n_learned: How many rows are not held out.
    """

    weights: torch.Tensor
    rest: torch.Tensor
    target: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor
    real: torch.Tensor
    n_learned: int

    @property
    def used(self) -> torch.Tensor:
        """Bool `(heads, rows)`: which rows are no padding."""
        return self.scale != 0

    @property
    def mean_scale(self) -> torch.Tensor:
        """The mean of 1 / r, `(heads, 1)`."""
        return self.scale.sum(1, keepdim=True) / self.used.sum(1, keepdim=True).clamp_min(1)

    @property
    def row_scale(self) -> torch.Tensor:
        """1 / r over its mean, `(heads, rows, 1)`."""
        return (self.scale / self.mean_scale)[..., None]

    @property
    def n_real(self) -> torch.Tensor:
        """How many entries each head has, `(heads,)`; 1 of one that has none."""
        return self.real.sum(1).clamp_min(1)

    def parts(self) -> Iterator[tuple[slice, HeadSystem]]:
        """The entries in parts that are fitted apart: a system of all entries of a long document would not fit memory.

        Of what was dropped, mass and output, each part stands for the share that its entries have of the kept mass.
        """
        n = self.values.shape[1]
        if n <= _AT_ONCE:
            yield slice(0, n), self
            return
        kept = self.weights.sum(2, keepdim=True).clamp_min(_TINY)
        missing = self.target - self.weights @ self.values
        for start in range(0, n, _AT_ONCE):
            own = slice(start, start + _AT_ONCE)
            weights, values = self.weights[..., own], self.values[:, own]
            share = weights.sum(2, keepdim=True) / kept
            target, rest = weights @ values + share * missing, 1 - share[..., 0] * (1 - self.rest)
            yield own, replace(self, weights=weights, rest=rest, target=target, values=values, real=self.real[:, own])

    def shares(self, weight: torch.Tensor, *, start: int = 0) -> torch.Tensor:
        """X, what each entry's value counts for in each row when its attention is `weight` times as much, scaled.

        Args:
            weight: `(heads, kept)`.
            start: The first row.

        Returns:
            `(heads, rows from start on, kept)`.
        """
        shares = self.weights[:, start:] * weight[:, None]
        total = (self.rest[:, start:, None] + shares.sum(2, keepdim=True)).clamp_min(1e-6)
        return shares.mul_(self.row_scale[:, start:] / total)


@dataclass(frozen=True, eq=False)
class FittedHeads:
    """The entries kept in some heads.

    Attributes:
        values: `(heads, kept, head_dim)`.
        bias: `(heads, kept)`.
        gram: X^T X over all rows, `(heads, kept, kept)`, where the fit had to make it; see `HeadSystem.shares`.
    """

    values: torch.Tensor
    bias: torch.Tensor
    gram: torch.Tensor | None = None


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


def fit_heads(system: HeadSystem, fixed: torch.Tensor, settings: MatchSettings) -> FittedHeads:
    """Weights and values of the entries kept in some heads, so that they stand for all of the document's.

    Args:
        system: The entries and the rows.
        fixed: Bool `(heads, kept)`; these are neither moved nor biased.
        settings: See `MatchSettings`.

    Returns:
        Of a head its start (no bias, the values given) where nothing is closer to the target on the rows held out.
    """
    values, n, n_real = system.values, system.n_learned, system.n_real
    row_scale = system.row_scale
    target = system.target * row_scale
    # 1. Weights that restore the mass which the rows paid to the whole document.
    scaled = system.weights[:, :n] * row_scale[:, :n]  # (heads, learned, kept)
    mass = ((1 - system.rest)[..., None] * row_scale)[:, :n]
    weight = bounded_ridge(scaled.mT @ scaled, (scaled.mT @ mass)[..., 0], settings, fixed, n_real)
    del scaled
    # 2. Values that restore the output, for each ridge, from the rows learned; the best on those held out.
    shares = system.shares(weight)
    residual, parts = target - shares @ values, (slice(0, n), slice(n, None))
    gram, gram_out = (shares[:, rows].mT @ shares[:, rows] for rows in parts)  # (heads, kept, kept)
    every, before = gram + gram_out, residual[:, n:].square().sum((1, 2))
    no_part = fixed[:, :, None] | fixed[:, None]  # an entry that is fixed has no part in a system
    right, right_out = (
        (shares[:, rows].mT @ residual[:, rows]).masked_fill(fixed[..., None], 0.0) for rows in parts
    )  # (heads, kept, head_dim)
    gram, whole = gram.masked_fill(no_part, 0.0), every.masked_fill(no_part, 0.0)
    found = []
    for ridge in settings.value_ridges:
        move = _solve(gram, right, ridge, n_real)
        found.append(before + (move * (gram_out @ move - 2 * right_out)).sum((1, 2)))
    errors, best = torch.stack(found).nan_to_num(torch.inf, torch.inf).min(0)  # (heads,)
    plain = system.shares(torch.ones_like(weight), start=n)
    at_start = (plain @ values - target[:, n:]).square().sum((1, 2))
    # 3. From all rows, unless the start was better.
    ridges = torch.tensor(settings.value_ridges, device=values.device)
    fitted = values + _solve(whole, right + right_out, ridges[best], n_real)
    better = (errors < at_start) & fitted.isfinite().all(2).all(1) & weight.isfinite().all(1)
    return FittedHeads(
        torch.where(better[:, None, None], fitted, values),
        torch.where(better[:, None], weight.log(), 0.0),
        every if bool(better.all()) else None,
    )


def value_moves(
    shares: torch.Tensor, residual: torch.Tensor, fixed: torch.Tensor, n_real: torch.Tensor
) -> torch.Tensor:
    """How values move to take up a residual, by ridge regression; those that are `fixed` stay.

    Args:
        shares: X, `(heads, rows, kept)`.
        residual: What is to be added, `(heads, rows, head_dim)`.
        fixed: Bool `(heads, kept)`.
        n_real: How many entries each head has, `(heads,)`.

    Returns:
        `(heads, kept, head_dim)`.
    """
    gram = (shares.mT @ shares).masked_fill(fixed[:, :, None] | fixed[:, None], 0.0)
    return _solve(gram, (shares.mT @ residual).masked_fill(fixed[..., None], 0.0), _MOVED_RIDGE, n_real)


def refit_errors(system: HeadSystem, fitted: FittedHeads, metric: torch.Tensor) -> torch.Tensor:
    """What removing each entry does to the layer's output when the values of all others are fitted again.

    Of a least squares fit with the system G, losing the j-th value v costs `v^2 / (G^-1)[j, j]` (Optimal Brain Surgeon,
    Hassibi and Stork, 1993): nothing where the others can stand for it.

    Args:
        system: The entries and the rows.
        fitted: The entries as they are.
        metric: M, `(heads, head_dim, head_dim)`, the mean of the query heads that share them.

    Returns:
        `(heads, kept)`, on the scale of `output_errors`; 0 where it cannot be told.
    """
    gram = fitted.gram
    if gram is None:
        shares = system.shares(fitted.bias.exp())
        gram = shares.mT @ shares
    lower = torch.linalg.cholesky_ex(gram + _ridge(gram, _REFIT_RIDGE, system.n_real)).L
    inverse = torch.cholesky_inverse(lower).diagonal(dim1=1, dim2=2).clamp_min(_TINY)
    loss = ((fitted.values @ metric) * fitted.values).sum(2) / inverse
    errors: torch.Tensor = (loss * system.mean_scale.square()).nan_to_num(0.0, 0.0, 0.0)
    return errors


def _ridge(gram: torch.Tensor, strength: float | torch.Tensor, n_real: torch.Tensor) -> torch.Tensor:
    """`strength` times the mean diagonal of `(heads, n, n)`, padding aside, on the diagonal."""
    mean = gram.diagonal(dim1=1, dim2=2).sum(1) / n_real
    return torch.eye(gram.shape[1], device=gram.device) * (strength * mean.clamp_min(_TINY))[:, None, None]


def _solve(
    gram: torch.Tensor, right: torch.Tensor, strength: float | torch.Tensor, n_real: torch.Tensor
) -> torch.Tensor:
    """`(G + ridge)^-1 b` of each head; not a number where G is not."""
    lower = torch.linalg.cholesky_ex(gram + _ridge(gram, strength, n_real)).L
    solution: torch.Tensor = torch.cholesky_solve(right, lower)
    return solution


def bounded_ridge(
    gram: torch.Tensor, right: torch.Tensor, settings: MatchSettings, fixed: torch.Tensor, n_real: torch.Tensor
) -> torch.Tensor:
    """The weights w in [0.01, 100] that make `w^T G w - 2 b^T w + ridge |w - 1|^2` smallest, of each head.

    Block principal pivoting: weights beyond a bound are held there, those that want back are let go.

    Args:
        gram: G, `(heads, n, n)`; 0 of padding, whose weights come out as 1.
        right: b, `(heads, n)`.
        settings: For the ridge, in mean diagonals of G.
        fixed: Bool `(heads, n)`; these stay 1.
        n_real: How many entries each head has, `(heads,)`.

    Returns:
        `(heads, n)`.
    """
    ridge = _ridge(gram, settings.weight_ridge, n_real)
    system, wanted = gram + ridge, right + ridge.diagonal(dim1=1, dim2=2)
    weight = torch.ones_like(right)
    free = ~fixed
    for _ in range(20):
        held = torch.where(free, 0.0, weight)
        masked = torch.where(free[:, :, None] & free[:, None], system, 0.0) + torch.diag_embed((~free).float())
        right = torch.where(free, wanted - (system @ held[..., None])[..., 0], weight)
        found = torch.cholesky_solve(right[..., None], torch.linalg.cholesky_ex(masked).L)[..., 0]
        slope = (system @ found[..., None])[..., 0] - wanted
        low, high = free & (found < _LEAST), free & (found > _MOST)
        back = ~free & ~fixed & (((found <= _LEAST) & (slope < 0)) | ((found >= _MOST) & (slope > 0)))
        weight = found.clamp(_LEAST, _MOST)
        if not bool((low | high | back).any()):
            break
        free = (free & ~low & ~high) | back
    return torch.where(fixed, 1.0, weight)
