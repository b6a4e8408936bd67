"""Gradient descent on keys, biases and values of kept entries, against the reference rows.

The fit in closed form (`fitting`) leaves keys unchanged. Here all three move, which brings the output of the entries
nearer to that of the whole document (KVSculpt, arXiv 2603.27819, does so from all rows, with L-BFGS). It needs no pass
of the model: rows and targets are those of the fit. Each step uses a part of the rows, a different one each time: all
rows in every step cost more and did no better, and fewer rows in total did worse. Heads of similar size are moved
together, because the arrays of one head are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kv_memory.compress.fitting import FittedHeads, HeadSystem, value_moves
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows

_BETAS = (0.9, 0.95)
_WEIGHTS = 1 << 19  # attention weights of one step, over all heads that are moved together
_ON_A_GPU = 16  # times as many on a GPU, where kernel launches dominate small arrays
_UNEVEN = 1.5  # size of the largest head of a group relative to the smallest, at most


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one kind, the entries they keep, and the rows that these are fitted to.

    Attributes:
        rows: Reference rows, with one query head for each head of the group.
        total: Logsumexp of each row over everything it sees, `(heads, rows)`.
        system: System of the fit for the same rows.
        where: Positions of the entries, `(heads, kept)`.
        keys: Keys of the entries, `(heads, kept, head_dim)`, rotated.
    """

    rows: ReferenceRows
    total: torch.Tensor
    system: HeadSystem
    where: torch.Tensor
    keys: torch.Tensor

    def parts(self) -> Iterator[HeadGroup]:
        """Split heads that keep many entries into parts of their entries; see `HeadSystem.parts`."""
        for own, system in self.system.parts():
            yield replace(self, system=system, where=self.where[:, own], keys=self.keys[:, own])


@dataclass(frozen=True, eq=False)
class MovedHeads:
    """Entries after the fit and the descent.

    Attributes:
        keys: Keys `(..., kept, head_dim)`, rotated.
        values: Values `(..., kept, head_dim)`.
        bias: Biases `(..., kept)`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    def of(self, head: int, real: torch.Tensor) -> MovedHeads:
        """Entries of one of several heads, without its padding; `real` is a bool `(kept,)`."""
        return MovedHeads(self.keys[head, real], self.values[head, real], self.bias[head, real])

    @staticmethod
    def joined(parts: Sequence[MovedHeads]) -> MovedHeads:
        """Concatenate the entries of several heads, or of parts of one head."""
        return MovedHeads(*(torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias")))


def alike(
    sizes: Sequence[int], kinds: Sequence[object], rows_per_step: int, *, device: torch.device
) -> Iterator[list[int]]:
    """Yield indices of heads to fit and move together: of one kind, of similar size, and not too many.

    Args:
        sizes: Number of entries that each head keeps.
        kinds: Properties that heads must share, such as `ReferenceRows.kind`.
        rows_per_step: Most queries in a step, see `MatchSettings`.
        device: Device of the fit.
    """
    most = _WEIGHTS * (1 if device.type == "cpu" else _ON_A_GPU)
    group: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (repr(kinds[i]), sizes[i], i)):
        too_large = (len(group) + 1) * sizes[index] * rows_per_step > most
        uneven = bool(group) and sizes[index] > _UNEVEN * max(8, sizes[group[0]])
        if group and (too_large or uneven or kinds[index] != kinds[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def descend(heads: HeadGroup, fitted: FittedHeads, settings: MatchSettings) -> MovedHeads:
    """Move the entries of several heads, each as if it were alone.

    Args:
        heads: Entries and rows of the heads.
        fitted: Fitted values and biases of the entries.
        settings: Settings with the number of steps and their size.

    Returns:
        Moved entries; a head keeps its start unless its held-out rows are closer to their targets afterwards.
    """
    system, rows, n = heads.system, heads.rows, heads.system.n_learned
    start = MovedHeads(heads.keys, fitted.values, fitted.bias)
    if n == 0 or settings.key_steps == 0:
        return start
    # 1. Start and units: keys and values move in standard deviations of their head, biases in nats.
    scale, free = system.row_scale, system.real & ~system.fixed  # (heads, rows, 1), (heads, kept)
    target = system.target * scale
    bias = start.bias.masked_fill(~system.real, -torch.inf)  # padding gets no attention
    begin = [start.keys, start.values, bias]
    units = [_size(part, system.real)[:, None, None] for part in (start.keys, start.values)]
    masks = [unit * free[..., None] for unit in units] + [free.to(scale.dtype)]
    # 2. Turns: each takes every n_parts-th row. Its error is divided by its number of real rows times the mean square
    # of the targets.
    n_parts = -(-n // settings.rows_per_step)
    turns = [slice(first, n, n_parts) for first in range(n_parts)]
    used = [system.used[:, turn].sum(1) for turn in turns]
    means = target[:, :n].square().sum((1, 2)) / system.used[:, :n].sum(1)
    sizes = [means.clamp_min(1e-12 * target.shape[2]) * count.clamp_min(1) for count in used]

    def error(moves: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
        some = turns[turn]
        keys, values, bias = (b + move * mask for b, move, mask in zip(begin, moves, masks, strict=True))
        weights = rows.logits(keys, heads.where, some)  # (heads, rows, kept)
        weights = weights.sub_(heads.total[:, some, None]).add_(bias[:, None]).exp_()
        # The sum of the weights is one more column of the product, and the product is divided instead of the weights,
        # which are the large array.
        output = weights @ torch.cat([values, torch.ones_like(values[..., :1])], -1)  # (heads, rows, head_dim + 1)
        output = output[..., :-1] / (system.rest[:, some, None] + output[..., -1:]).clamp_min(1e-6)
        return (output * scale[:, some] - target[:, some]).square().sum((1, 2)) / sizes[turn]  # (heads,)

    # 3. Steps of Adam, one turn each; the rate falls linearly to 0.
    with torch.enable_grad():
        moves = [torch.zeros_like(part, requires_grad=True) for part in begin]
        adam = torch.optim.Adam(moves, betas=_BETAS, fused=True)
        for step in range(settings.key_steps):
            adam.param_groups[0]["lr"] = settings.key_rate * (1 - step / settings.key_steps)
            adam.zero_grad()
            error(moves, step % n_parts).sum().backward()
            adam.step()
    moved = MovedHeads(*(b + move.detach() * mask for b, move, mask in zip(begin, moves, masks, strict=True)))
    # 4. Final values, and the start where they are no better.
    return _judged(heads, replace(start, bias=bias), moved)


def _judged(heads: HeadGroup, start: MovedHeads, moved: MovedHeads) -> MovedHeads:
    """Refit values behind moved keys and biases on all rows; a head keeps its start if held-out rows are no better."""
    system, held_out = heads.system, slice(heads.system.n_learned, None)
    target = system.target * system.row_scale

    def shares(one: MovedHeads, some: slice) -> torch.Tensor:
        logits = heads.rows.logits(one.keys, heads.where, some) - heads.total[:, some, None]
        weights = logits.add_(one.bias[:, None]).exp_()
        total = (system.rest[:, some, None] + weights.sum(2, keepdim=True)).clamp_min(1e-6)
        return weights.mul_(system.row_scale[:, some] / total)

    def error(of: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (of @ values - target[:, held_out]).square().sum((1, 2))

    every = shares(moved, slice(None))  # (heads, rows, kept)
    values = moved.values + value_moves(system, every, target - every @ moved.values)
    closer = error(every[:, held_out], values) < error(shares(start, held_out), start.values)  # False for NaN
    for part in (moved.keys, values, moved.bias.masked_fill(~system.real, 0.0)):
        closer &= part.isfinite().flatten(1).all(1)
    return MovedHeads(
        torch.where(closer[:, None, None], moved.keys, start.keys),
        torch.where(closer[:, None, None], values, start.values),
        torch.where(closer[:, None], moved.bias, start.bias),
    )


def _size(part: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each head's entries `(heads, kept, head_dim)`, padding aside: `(heads,)`."""
    n, mask = real.sum(1) * part.shape[2], real[..., None].to(part.dtype)
    mean = (part * mask).sum((1, 2)) / n
    squares = ((part - mean[:, None, None]) * mask).square().sum((1, 2))
    return (squares / (n - 1).clamp_min(1)).sqrt().clamp_min(1e-6)
