"""Arithmetic of `matching` for the entries of several heads, in float32: output errors, and the fit in closed form.

Heads are fitted side by side, each as if it were alone, because the arrays of one head are small. Heads keep different
numbers of entries, so those that keep fewer are padded with entries that get no attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows

_LEAST, _MOST = 1e-2, 1e2  # bounds of an entry's weight, e to its bias
_AT_ONCE = 2048  # entries of a head that are fitted together
_MOVED_RIDGE = 1e-2  # ridge of the values behind moved keys, in mean diagonals
_REFIT_RIDGE = 1e-2  # ridge of refit errors, in mean diagonals; 1e-3 to 1e-1 gave the same results
_TINY = 1e-12  # lower bound of mean diagonals and divisors


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Kept entries of heads of one kind, and the attention and output of the whole document that they are fitted to.

    A row is a query of one of the query heads that share a KV head. Rows from `n_learned` on are held out, to choose
    the ridge of the values; they stand last so that either part is a view.
    """

    rows: ReferenceRows  # one query head for each head; a padded row has the scale 0, and contributes nothing
    total: torch.Tensor  # `(heads, rows)`, logsumexp of each row over everything it sees
    rest: torch.Tensor  # `(heads, rows)`, P of everything but the document's entries
    target: torch.Tensor  # `(heads, rows, head_dim)`, output of the document's entries together
    n_learned: int  # rows that are not held out
    where: torch.Tensor  # `(heads, kept)`, positions of the kept entries
    keys: torch.Tensor  # `(heads, kept, head_dim)`, rotated
    values: torch.Tensor  # `(heads, kept, head_dim)`
    bias: torch.Tensor  # `(heads, kept)`, biases of the entries before the fit, 0 for all but restore tokens
    weights: torch.Tensor  # `(heads, rows, kept)`, P of the kept entries with their biases; 0 for padding
    real: torch.Tensor  # bool `(heads, kept)`; False for padding
    fixed: torch.Tensor  # bool `(heads, kept)`; entries that are neither moved nor biased

    @property
    def used(self) -> torch.Tensor:
        """Mask of the real rows, bool `(heads, rows)`; False for padding."""
        return self.rows.scale != 0

    @property
    def mean_scale(self) -> torch.Tensor:
        """Mean of 1 / r over the real rows, `(heads, 1)`."""
        return self.rows.scale.sum(1, keepdim=True) / self.used.sum(1, keepdim=True).clamp_min(1)

    @property
    def row_scale(self) -> torch.Tensor:
        """1 / r divided by its mean, `(heads, rows, 1)`."""
        return (self.rows.scale / self.mean_scale)[..., None]

    @property
    def n_real(self) -> torch.Tensor:
        """Number of entries of each head, `(heads,)`; 1 for a head without entries."""
        return self.real.sum(1).clamp_min(1)

    def parts(self) -> Iterator[HeadGroup]:
        """Split the entries into parts fitted apart: one system for a long document would not fit in memory.

        Each part stands in for a share of the dropped attention and output: the share that its entries have of the
        kept attention.
        """
        n = self.values.shape[1]
        if n <= _AT_ONCE:
            yield self
            return
        kept = self.weights.sum(2, keepdim=True).clamp_min(_TINY)
        missing = self.target - self.weights @ self.values  # output of the dropped entries, (heads, rows, head_dim)
        for start in range(0, n, _AT_ONCE):
            own = slice(start, start + _AT_ONCE)
            weights, values = self.weights[..., own], self.values[:, own]
            share = weights.sum(2, keepdim=True) / kept
            yield replace(
                self,
                rest=1 - share[..., 0] * (1 - self.rest),
                target=weights @ values + share * missing,
                weights=weights,
                values=values,
                **{name: getattr(self, name)[:, own] for name in ("where", "keys", "bias", "real", "fixed")},
            )

    def moved_weights(self, keys: torch.Tensor, bias: torch.Tensor, some: slice) -> torch.Tensor:
        """P of the entries in some rows, with other keys and biases: `(heads, some, kept)`."""
        logits = self.rows.logits(keys, self.where, some)
        return logits.sub_(self.total[:, some, None]).add_(bias[:, None]).exp_()

    def shares(self, weights: torch.Tensor, some: slice = slice(None)) -> torch.Tensor:
        """X: scaled coefficients of the entries' values in some rows, from their `weights`, which are overwritten."""
        total = (self.rest[:, some, None] + weights.sum(2, keepdim=True)).clamp_min(1e-6)
        return weights.mul_(self.row_scale[:, some] / total)


@dataclass(frozen=True, eq=False)
class FittedHeads:
    """Fitted entries of several heads, side by side or one behind the other."""

    keys: torch.Tensor  # `(..., kept, head_dim)`, rotated
    values: torch.Tensor  # `(..., kept, head_dim)`
    bias: torch.Tensor  # `(..., kept)`
    gram: torch.Tensor | None = None  # `(heads, kept, kept)`, X^T X over all rows, see `shares`; None if unknown

    def of(self, head: int, real: torch.Tensor) -> FittedHeads:
        """Entries of one of several heads, without its padding; `real` is a bool `(kept,)`."""
        return FittedHeads(self.keys[head, real], self.values[head, real], self.bias[head, real])

    @staticmethod
    def joined(parts: Sequence[FittedHeads]) -> FittedHeads:
        """Concatenate the entries of several heads, or of parts of one head."""
        return FittedHeads(*(torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias")))


def output_errors(
    weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor, metric: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Error of the layer's output relative to the residual stream when one entry is removed and the rest renormalised.

    `sum over queries and heads of (P / (1 - P))^2 (v - o)^T M (v - o) / r^2`, with 1 - P held at 0.01 or more.

    Args:
        weights: P, `(group, m, n)`.
        values: v, `(n, head_dim)`.
        output: o, output of prefix and document, `(group, m, head_dim)`.
        metric: M of each query head, `(group, head_dim, head_dim)`.
        scale: 1 / r, `(group, m)`.

    Returns:
        Errors `(n,)`.
    """
    projected = values @ metric  # (group, n, head_dim)
    squares = scale.square()[..., None]  # (group, m, 1)
    of_values = (projected * values).sum(-1)[:, None]  # (group, 1, n)
    of_output = ((output @ metric) * output).sum(-1, keepdim=True)  # (group, m, 1)
    # (v - o)^T M (v - o) / r^2 for all pairs as one product: a sum of three products took twice the time.
    left = torch.cat([output * (-2 * squares), squares, of_output * squares], -1)  # (group, m, head_dim + 2)
    right = torch.cat([projected.transpose(1, 2), of_values, torch.ones_like(of_values)], 1)  # (group, head_dim + 2, n)
    odds = weights / (1 - weights).clamp_min_(0.01)
    return odds.square_().mul_(left @ right).sum((0, 1)).clamp_min(0)


def fit_heads(heads: HeadGroup, settings: MatchSettings) -> FittedHeads:
    """Fit weights and values of the entries kept in some heads, so that they stand in for the whole document.

    A head keeps its start (the given biases and values) unless the fit is closer on its held-out rows.
    """
    values, n, n_real, fixed = heads.values, heads.n_learned, heads.n_real, heads.fixed
    row_scale = heads.row_scale
    target = heads.target * row_scale
    # 1. Weights that restore the attention of the rows to the whole document.
    scaled = heads.weights[:, :n] * row_scale[:, :n]  # (heads, learned, kept)
    mass = ((1 - heads.rest)[..., None] * row_scale)[:, :n]  # (heads, learned, 1)
    weight = bounded_ridge(scaled.mT @ scaled, (scaled.mT @ mass)[..., 0], settings, fixed, n_real)  # (heads, kept)
    del scaled
    # 2. Systems of the values that restore the output, for the learned rows and for those held out.
    shares = heads.shares(heads.weights * weight[:, None])  # (heads, rows, kept)
    residual, parts = target - shares @ values, (slice(0, n), slice(n, None))  # (heads, rows, head_dim)
    gram, gram_out = (shares[:, rows].mT @ shares[:, rows] for rows in parts)  # (heads, kept, kept)
    every, before = gram + gram_out, residual[:, n:].square().sum((1, 2))  # (heads, kept, kept), (heads,)
    no_part = fixed[:, :, None] | fixed[:, None]  # fixed entries are left out of the systems
    right, right_out = (
        (shares[:, rows].mT @ residual[:, rows]).masked_fill(fixed[..., None], 0.0) for rows in parts
    )  # (heads, kept, head_dim)
    gram, whole = gram.masked_fill(no_part, 0.0), every.masked_fill(no_part, 0.0)
    # 3. Values from the learned rows for each ridge; the best ridge by the squared error on the held-out rows.
    found = []
    for ridge in settings.value_ridges:
        move = _solve(gram, right, ridge, n_real)  # (heads, kept, head_dim)
        found.append(before + (move * (gram_out @ move - 2 * right_out)).sum((1, 2)))
    errors, best = torch.stack(found).nan_to_num(torch.inf, torch.inf).min(0)  # (heads,)
    plain = heads.shares(heads.weights[:, n:].clone(), slice(n, None))
    at_start = (plain @ values - target[:, n:]).square().sum((1, 2))
    # 4. Values from all rows with the best ridge, unless the start is better.
    ridges = torch.tensor(settings.value_ridges, device=values.device)
    fitted = values + _solve(whole, right + right_out, ridges[best], n_real)
    better = (errors < at_start) & fitted.isfinite().all(2).all(1) & weight.isfinite().all(1)
    return FittedHeads(
        heads.keys,
        torch.where(better[:, None, None], fitted, values),
        heads.bias + torch.where(better[:, None], weight.log(), 0.0),
        every if bool(better.all()) else None,
    )


def value_moves(heads: HeadGroup, shares: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Changes of the values, `(heads, kept, head_dim)`, that take up a residual `(heads, rows, head_dim)`.

    Found by ridge regression with X in `shares`; fixed values and padding do not change.
    """
    still = heads.fixed | ~heads.real
    gram = (shares.mT @ shares).masked_fill(still[:, :, None] | still[:, None], 0.0)
    return _solve(gram, (shares.mT @ residual).masked_fill(still[..., None], 0.0), _MOVED_RIDGE, heads.n_real)


def refit_errors(heads: HeadGroup, fitted: FittedHeads, metric: torch.Tensor) -> torch.Tensor:
    """Error in the layer's output when one entry is removed and the values of all others are fitted again.

    In a least-squares fit with the system G, losing the j-th value v costs `v^2 / (G^-1)[j, j]` (Optimal Brain
    Surgeon, Hassibi and Stork, 1993): nothing where the others can stand in for it.

    `metric` is M, mean over the query heads that share a KV head, `(heads, head_dim, head_dim)`. Errors are
    `(heads, kept)`, on the scale of `output_errors`; 0 where they are not finite.
    """
    gram = fitted.gram
    if gram is None:
        shares = heads.shares(heads.weights * (fitted.bias - heads.bias).exp()[:, None])
        gram = shares.mT @ shares
    lower = torch.linalg.cholesky_ex(gram + _ridge(gram, _REFIT_RIDGE, heads.n_real)).L
    inverse = torch.cholesky_inverse(lower).diagonal(dim1=1, dim2=2).clamp_min(_TINY)
    loss = ((fitted.values @ metric) * fitted.values).sum(2) / inverse
    errors: torch.Tensor = (loss * heads.mean_scale.square()).nan_to_num(0.0, 0.0, 0.0)
    return errors


def _ridge(gram: torch.Tensor, strength: float | torch.Tensor, n_real: torch.Tensor) -> torch.Tensor:
    """Diagonal matrix: `strength` times the mean diagonal of `(heads, n, n)`, padding aside."""
    mean = gram.diagonal(dim1=1, dim2=2).sum(1) / n_real
    return torch.eye(gram.shape[1], device=gram.device) * (strength * mean.clamp_min(_TINY))[:, None, None]


def _solve(
    gram: torch.Tensor, right: torch.Tensor, strength: float | torch.Tensor, n_real: torch.Tensor
) -> torch.Tensor:
    """`(G + ridge)^-1 b` for each head; not a number where G is not a number."""
    lower = torch.linalg.cholesky_ex(gram + _ridge(gram, strength, n_real)).L
    solution: torch.Tensor = torch.cholesky_solve(right, lower)
    return solution


def bounded_ridge(
    gram: torch.Tensor, right: torch.Tensor, settings: MatchSettings, fixed: torch.Tensor, n_real: torch.Tensor
) -> torch.Tensor:
    """Weights w in [0.01, 100] that minimise `w^T G w - 2 b^T w + ridge |w - 1|^2`, for each head: `(heads, n)`.

    Block principal pivoting: weights beyond a bound are held at it, and released when their slope points back inside.

    Args:
        gram: G, `(heads, n, n)`; 0 for padding, which gets weight 1.
        right: b, `(heads, n)`.
        settings: Settings with the ridge, in mean diagonals of G.
        fixed: Bool `(heads, n)`; entries with weight 1.
        n_real: Number of entries of each head, `(heads,)`.
    """
    ridge = _ridge(gram, settings.weight_ridge, n_real)
    system, wanted = gram + ridge, right + ridge.diagonal(dim1=1, dim2=2)
    weight = torch.ones_like(right)
    free = ~fixed
    for _ in range(20):
        # 1. Solve for the free weights, with the others held.
        held = torch.where(free, 0.0, weight)
        masked = torch.where(free[:, :, None] & free[:, None], system, 0.0) + torch.diag_embed((~free).float())
        right = torch.where(free, wanted - (system @ held[..., None])[..., 0], weight)
        found = torch.cholesky_solve(right[..., None], torch.linalg.cholesky_ex(masked).L)[..., 0]  # (heads, n)
        # 2. Hold weights beyond a bound, and release held ones if the slope points back inside.
        slope = (system @ found[..., None])[..., 0] - wanted
        low, high = free & (found < _LEAST), free & (found > _MOST)
        back = ~free & ~fixed & (((found <= _LEAST) & (slope < 0)) | ((found >= _MOST) & (slope > 0)))
        weight = found.clamp(_LEAST, _MOST)
        if not bool((low | high | back).any()):
            break
        free = (free & ~low & ~high) | back
    return torch.where(fixed, 1.0, weight)
