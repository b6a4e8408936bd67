"""Gradient descent on keys, biases and values of kept entries, against the reference rows.

The fit in closed form (`fitting`) leaves keys unchanged. Here all three move, which brings the output of the entries
nearer to that of the whole document (KVSculpt, arXiv 2603.27819, does so from all rows, with L-BFGS). It needs no pass
of the model: rows and targets are those of the fit. Each step uses a part of the rows, a different one each time: all
rows in every step cost more and did no better, and fewer rows in total did worse. Heads of similar size are moved
together, because the arrays of one head are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_memory.compress.fitting import FittedHeads, HeadGroup, value_moves
from kv_memory.compress.match_settings import MatchSettings

_BETAS = (0.9, 0.95)


def descend(heads: HeadGroup, start: FittedHeads, settings: MatchSettings) -> FittedHeads:
    """Move the fitted entries of several heads, each as if it were alone.

    A head keeps its start unless its held-out rows are closer to their targets afterwards.
    """
    n = heads.n_learned
    if n == 0 or settings.key_steps == 0:
        return start
    # 1. Start and units: keys and values move in standard deviations of their head, biases in nats.
    scale, free = heads.row_scale, heads.real & ~heads.fixed  # (heads, rows, 1), (heads, kept)
    target = heads.target * scale
    bias = start.bias.masked_fill(~heads.real, -torch.inf)  # padding gets no attention
    begin = [start.keys, start.values, bias]
    units = [_size(part, heads.real)[:, None, None] for part in (start.keys, start.values)]
    masks = [unit * free[..., None] for unit in units] + [free.to(scale.dtype)]
    # 2. Turns: each takes every n_parts-th row. Its error is divided by its number of real rows times the mean square
    # of the targets.
    n_parts = -(-n // settings.rows_per_step)
    turns = [slice(first, n, n_parts) for first in range(n_parts)]
    used = [heads.used[:, turn].sum(1) for turn in turns]
    means = target[:, :n].square().sum((1, 2)) / heads.used[:, :n].sum(1)
    sizes = [means.clamp_min(1e-12 * target.shape[2]) * count.clamp_min(1) for count in used]

    def error(moves: Sequence[torch.Tensor], turn: int) -> torch.Tensor:
        some = turns[turn]
        keys, values, bias = (b + move * mask for b, move, mask in zip(begin, moves, masks, strict=True))
        weights = heads.moved_weights(keys, bias, some)  # (heads, rows, kept)
        # The sum of the weights is one more column of the product, and the product is divided instead of the weights,
        # which are the large array.
        output = weights @ torch.cat([values, torch.ones_like(values[..., :1])], -1)  # (heads, rows, head_dim + 1)
        output = output[..., :-1] / (heads.rest[:, some, None] + output[..., -1:]).clamp_min(1e-6)
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
    moved = FittedHeads(*(b + move.detach() * mask for b, move, mask in zip(begin, moves, masks, strict=True)))
    # 4. Final values, and the start where they are no better.
    return _judged(heads, replace(start, bias=bias), moved)


def _judged(heads: HeadGroup, start: FittedHeads, moved: FittedHeads) -> FittedHeads:
    """Refit values behind moved keys and biases on all rows; a head keeps its start if held-out rows are no better."""
    held_out = slice(heads.n_learned, None)
    target = heads.target * heads.row_scale

    def shares(one: FittedHeads, some: slice) -> torch.Tensor:
        return heads.shares(heads.moved_weights(one.keys, one.bias, some), some)

    def error(of: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (of @ values - target[:, held_out]).square().sum((1, 2))

    every = shares(moved, slice(None))  # (heads, rows, kept)
    values = moved.values + value_moves(heads, every, target - every @ moved.values)
    closer = error(every[:, held_out], values) < error(shares(start, held_out), start.values)  # False for NaN
    for part in (moved.keys, values, moved.bias.masked_fill(~heads.real, 0.0)):
        closer &= part.isfinite().flatten(1).all(1)
    return FittedHeads(
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
