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

from kv_memory.compress.fitting import FittedHead, HeadSystem, value_moves
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows

__all__ = ["MovedHead", "MovingHead", "alike", "descend"]

_BETAS = (0.9, 0.95)
_WEIGHTS = 1 << 19  # of all heads that are moved together, in one step
_UNEVEN = 1.5  # by how much the largest of them may exceed the smallest


@dataclass(frozen=True, eq=False)
class MovingHead:
    """A head, and where its entries begin.

    Attributes:
        rows: Its rows, as those of one head.
        total: Logsumexp of each row over all that it sees, `(rows,)`.
        system: The same rows, and what the entries are to put out.
        where: Positions of the entries, `(kept,)`.
        keys: Of the entries, `(kept, head_dim)`, rotated.
        fitted: Their values and biases.
        fixed: Bool `(kept,)`; these do not move.
    """

    rows: ReferenceRows
    total: torch.Tensor
    system: HeadSystem
    where: torch.Tensor
    keys: torch.Tensor
    fitted: FittedHead
    fixed: torch.Tensor


@dataclass(frozen=True, eq=False)
class MovedHead:
    """Entries of one head: `keys` `(kept, head_dim)`, rotated; `values` `(kept, head_dim)`; `bias` `(kept,)`."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    @staticmethod
    def joined(parts: Sequence[MovedHead]) -> MovedHead:
        """Entries of several heads, or of parts of one, behind each other."""
        return MovedHead(*(torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values", "bias")))


def alike(sizes: Sequence[int], kinds: Sequence[object], rows_per_step: int) -> Iterator[list[int]]:
    """Indices of heads that are moved together: of one kind and of like size, and not too many.

    Args:
        sizes: How many entries each keeps.
        kinds: See `ReferenceRows.kind`.
        rows_per_step: See `MatchSettings`.
    """
    group: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (repr(kinds[i]), sizes[i], i)):
        too_large = (len(group) + 1) * sizes[index] * rows_per_step > _WEIGHTS
        uneven = bool(group) and sizes[index] > _UNEVEN * max(8, sizes[group[0]])
        if group and (too_large or uneven or kinds[index] != kinds[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def descend(heads: Sequence[MovingHead], settings: MatchSettings) -> list[MovedHead]:
    """Move the entries of several heads, each as if it were alone.

    Args:
        heads: With as many rows each, of one kind.
        settings: For the number of steps and their size.

    Returns:
        For each head its start, where the rows held out are not closer to their targets afterwards.
    """
    starts = [MovedHead(head.keys, head.fitted.values, head.fitted.bias) for head in heads]
    n = heads[0].system.n_learned
    if n == 0 or settings.key_steps == 0:
        return starts
    width = max(len(head.keys) for head in heads)
    rows = replace(
        heads[0].rows,
        query=torch.cat([head.rows.query for head in heads]),  # (heads, rows, head_dim)
        positions=torch.cat([head.rows.positions for head in heads]),
    )
    total, rest, scale, target = (
        torch.stack(parts)
        for parts in zip(
            *((h.total, h.system.rest, h.system.row_scale, h.system.target * h.system.row_scale) for h in heads),
            strict=True,
        )
    )
    where, free = (_padded(parts, width, 0) for parts in ([h.where for h in heads], [~h.fixed for h in heads]))
    begin = [_padded([getattr(start, name) for start in starts], width, 0.0) for name in ("keys", "values")]
    begin.append(_padded([start.bias for start in starts], width, -torch.inf))  # what is padded gets no attention
    units = [
        torch.stack([_size(getattr(start, name)) for start in starts])[:, None, None] for name in ("keys", "values")
    ]
    masks = [unit * free[..., None] for unit in units] + [free.to(total.dtype)]
    sizes = target[:, :n].square().mean((1, 2), keepdim=True).clamp_min(1e-12)

    def error(moves: Sequence[torch.Tensor], some: slice) -> torch.Tensor:
        keys, values, bias = (b + move * mask for b, move, mask in zip(begin, moves, masks, strict=True))
        weights = rows.logits(keys, where, slice(None), some)  # (heads, rows, width)
        weights = weights.sub_(total[:, some, None]).add_(bias[:, None]).exp_()
        # Their sum is a column more of the product, and the product is divided, not they: they are what is large.
        output = weights @ torch.cat([values, torch.ones_like(values[..., :1])], -1)
        output = output[..., :-1] / (rest[:, some, None] + output[..., -1:]).clamp_min(1e-6)
        return ((output * scale[:, some] - target[:, some]).square() / sizes).mean((1, 2))

    with torch.enable_grad():
        moves = [torch.zeros_like(part, requires_grad=True) for part in begin]
        adam = torch.optim.Adam(moves, betas=_BETAS, fused=True)
        n_parts = -(-n // settings.rows_per_step)
        for step in range(settings.key_steps):
            adam.param_groups[0]["lr"] = settings.key_rate * (1 - step / settings.key_steps)
            adam.zero_grad()
            error(moves, slice(step % n_parts, n, n_parts)).sum().backward()
            adam.step()
    moved = [b + move.detach() * mask for b, move, mask in zip(begin, moves, masks, strict=True)]
    found = []
    for index, (head, start) in enumerate(zip(heads, starts, strict=True)):
        found.append(_judged(head, start, MovedHead(*(part[index, : len(head.keys)] for part in moved))))
    return found


def _judged(head: MovingHead, start: MovedHead, moved: MovedHead) -> MovedHead:
    """With the best values for its keys and biases, from all rows, as those of the fit are; the start if no better."""
    system, held_out = head.system, slice(head.system.n_learned, None)
    target = system.target * system.row_scale

    def shares(one: MovedHead) -> torch.Tensor:
        logits = head.rows.logits(one.keys, head.where, slice(0, 1), slice(None))[0] - head.total[:, None]
        weights = (logits + one.bias).exp()
        return weights * (system.row_scale / (system.rest[:, None] + weights.sum(1, keepdim=True)).clamp_min(1e-6))

    def error(of: torch.Tensor, values: torch.Tensor) -> float:
        return float((of[held_out] @ values - target[held_out]).square().sum())

    every = shares(moved)
    values = moved.values + value_moves(every, target - every @ moved.values, head.fixed)
    moved = replace(moved, values=values)
    closer = error(every, values) < error(shares(start), start.values)  # False where either is no number
    finite = all(bool(part.isfinite().all()) for part in (moved.keys, values, moved.bias))
    return moved if closer and finite else start


def _padded(parts: Sequence[torch.Tensor], width: int, fill: float) -> torch.Tensor:
    """Tensors of `(kept, ...)` as one of `(heads, width, ...)`."""
    padded = parts[0].new_full((len(parts), width, *parts[0].shape[1:]), fill)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def _size(part: torch.Tensor) -> torch.Tensor:
    return part.std().clamp_min(1e-6)
