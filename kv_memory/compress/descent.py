"""Keys, biases and values of entries, moved by gradient descent on the reference rows.

The fit in closed form (`fitting`) leaves the keys where they are. Here all three move, which brings what the entries
put out nearer to what the whole document did (KVSculpt, arXiv 2603.27819, does so from all rows, with L-BFGS). It takes
no pass of the model: rows and targets are those of the fit.
Each step looks at a part of the rows, another one each time: all of them at every step cost more and did no better,
and to see fewer of them in all did worse. Heads of like size are moved together, because the arrays of one are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kv_memory.compress.fitting import FittedHeads, HeadSystem, value_moves
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows

__all__ = ["HeadGroup", "MovedHeads", "alike", "descend"]

_BETAS = (0.9, 0.95)
_WEIGHTS = 1 << 19  # of all heads that are moved together, in one step
_ON_A_GPU = 16  # times as many, where small arrays wait for their kernels
_UNEVEN = 1.5  # by how much the largest of them may exceed the smallest


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one kind, the entries they keep, and the rows these are fitted to.

    Attributes:
        rows: Their rows, as of one query head each.
        total: Logsumexp of each row over all that it sees, `(heads, rows)`.
        system: The same rows, and what the entries are to put out.
        where: Positions of the entries, `(heads, kept)`.
        keys: Of the entries, `(heads, kept, head_dim)`, rotated.
        fixed: Bool `(heads, kept)`; these are neither moved nor biased.
    """

    rows: ReferenceRows
    total: torch.Tensor
    system: HeadSystem
    where: torch.Tensor
    keys: torch.Tensor
    fixed: torch.Tensor

    def parts(self) -> Iterator[HeadGroup]:
        """Of heads that keep many entries, some of them at a time; see `HeadSystem.parts`."""
        for own, system in self.system.parts():
            where, keys, fixed = self.where[:, own], self.keys[:, own], self.fixed[:, own]
            yield replace(self, system=system, where=where, keys=keys, fixed=fixed)


@dataclass(frozen=True, eq=False)
class MovedHeads:
    """Entries: `keys` `(..., kept, head_dim)`, rotated; `values` `(..., kept, head_dim)`; `bias` `(..., kept)`."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    def of(self, head: int, real: torch.Tensor) -> MovedHeads:
        """The entries of one of several heads, without its padding; `real` is a bool `(kept,)`."""
        return MovedHeads(self.keys[head, real], self.values[head, real], self.bias[head, real])

    @staticmethod
    def joined(parts: Sequence[MovedHeads]) -> MovedHeads:
        """Entries of several heads, or of parts of one, behind each other."""
        return MovedHeads(*(torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias")))


def alike(
    sizes: Sequence[int], kinds: Sequence[object], rows_per_step: int, *, device: torch.device
) -> Iterator[list[int]]:
    """Indices of heads that are fitted and moved together: of one kind and of like size, and not too many.

    Args:
        sizes: How many entries each keeps.
        kinds: What heads must have in common, such as `ReferenceRows.kind`.
        rows_per_step: See `MatchSettings`.
        device: Where they are fitted.
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
        heads: The entries and the rows.
        fitted: Their values and biases.
        settings: For the number of steps and their size.

    Returns:
        Of a head its start, where the rows held out are not closer to their targets afterwards.
    """
    system, rows, n = heads.system, heads.rows, heads.system.n_learned
    start = MovedHeads(heads.keys, fitted.values, fitted.bias)
    if n == 0 or settings.key_steps == 0:
        return start
    scale, free = system.row_scale, system.real & ~heads.fixed
    target = system.target * scale
    bias = start.bias.masked_fill(~system.real, -torch.inf)  # what is padded gets no attention
    begin = [start.keys, start.values, bias]
    units = [_size(part, system.real)[:, None, None] for part in (start.keys, start.values)]
    masks = [unit * free[..., None] for unit in units] + [free.to(scale.dtype)]
    # 1. What an error is divided by: of each turn through the rows the number of real ones, times their mean square.
    n_parts = -(-n // settings.rows_per_step)
    turns = [slice(first, n, n_parts) for first in range(n_parts)]
    used = [system.used[:, turn].sum(1) for turn in turns]
    means = target[:, :n].square().sum((1, 2)) / system.used[:, :n].sum(1)
    sizes = [means.clamp_min(1e-12 * target.shape[2]) * count.clamp_min(1) for count in used]

    def error(moves: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
        some = turns[turn]
        keys, values, bias = (b + move * mask for b, move, mask in zip(begin, moves, masks, strict=True))
        weights = rows.logits(keys, heads.where, slice(None), some)  # (heads, rows, kept)
        weights = weights.sub_(heads.total[:, some, None]).add_(bias[:, None]).exp_()
        # Their sum is a column more of the product, and the product is divided, not they: they are what is large.
        output = weights @ torch.cat([values, torch.ones_like(values[..., :1])], -1)
        output = output[..., :-1] / (system.rest[:, some, None] + output[..., -1:]).clamp_min(1e-6)
        return (output * scale[:, some] - target[:, some]).square().sum((1, 2)) / sizes[turn]

    # 2. Steps.
    with torch.enable_grad():
        moves = [torch.zeros_like(part, requires_grad=True) for part in begin]
        adam = torch.optim.Adam(moves, betas=_BETAS, fused=True)
        for step in range(settings.key_steps):
            adam.param_groups[0]["lr"] = settings.key_rate * (1 - step / settings.key_steps)
            adam.zero_grad()
            error(moves, step % n_parts).sum().backward()
            adam.step()
    moved = MovedHeads(*(b + move.detach() * mask for b, move, mask in zip(begin, moves, masks, strict=True)))
    return _judged(heads, replace(start, bias=bias), moved)


def _judged(heads: HeadGroup, start: MovedHeads, moved: MovedHeads) -> MovedHeads:
    """With the best values for its keys and biases, from all rows, as those of the fit are; the start if no better."""
    system, held_out = heads.system, slice(heads.system.n_learned, None)
    target = system.target * system.row_scale

    def shares(one: MovedHeads, some: slice) -> torch.Tensor:
        logits = heads.rows.logits(one.keys, heads.where, slice(None), some) - heads.total[:, some, None]
        weights = logits.add_(one.bias[:, None]).exp_()
        total = (system.rest[:, some, None] + weights.sum(2, keepdim=True)).clamp_min(1e-6)
        return weights.mul_(system.row_scale[:, some] / total)

    def error(of: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (of @ values - target[:, held_out]).square().sum((1, 2))

    every, fixed = shares(moved, slice(None)), heads.fixed | ~system.real
    values = moved.values + value_moves(every, target - every @ moved.values, fixed, system.n_real)
    closer = error(every[:, held_out], values) < error(shares(start, held_out), start.values)  # False if no number
    for part in (moved.keys, values, moved.bias.masked_fill(~system.real, 0.0)):
        closer &= part.isfinite().flatten(1).all(1)
    return MovedHeads(
        torch.where(closer[:, None, None], moved.keys, start.keys),
        torch.where(closer[:, None, None], values, start.values),
        torch.where(closer[:, None], moved.bias, start.bias),
    )


def _size(part: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the entries `(heads, kept, head_dim)` of each head, padding aside: `(heads,)`."""
    n, mask = real.sum(1) * part.shape[2], real[..., None].to(part.dtype)
    mean = (part * mask).sum((1, 2)) / n
    squares = ((part - mean[:, None, None]) * mask).square().sum((1, 2))
    return (squares / (n - 1).clamp_min(1)).sqrt().clamp_min(1e-6)
