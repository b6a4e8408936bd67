"""Fits the kept entries of many heads side by side; `matching` decides which entries stay.

The arrays of one head are small, so heads of similar size are stacked, whichever document they belong to. They differ
in their number of entries, and heads of different documents also in their number of rows. Both are padded so that each
head comes out as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kv_memory.compress.descent import descend
from kv_memory.compress.fitting import FittedHeads, HeadGroup, fit_heads, refit_errors
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows

_STAGE_RIDGES = (1e-2, 1e-1)  # ridges tried in the fits of stages, which need not be the best
_HELD_OUT = 4  # one position in four is held out, to choose the ridge
_WEIGHTS = 1 << 19  # attention weights of one step of the descent, over all heads that are moved together
_ON_A_GPU = 16  # times as many on a GPU, where kernel launches dominate small arrays
_UNEVEN = 1.5  # size of the largest head of a group relative to the smallest, at most


@dataclass(frozen=True, eq=False)
class HeadRows:
    """One KV head of one document, and the rows of the `group` query heads that share it."""

    keys: torch.Tensor  # of prefix, document and restore tokens, `(n_prefix + n_tokens, head_dim)`, rotated
    values: torch.Tensor  # in the same shape
    n_prefix: int
    rows: ReferenceRows  # with `m` rows for each query head
    total: torch.Tensor  # `(group, m)`, logsumexp over prefix, document and own request
    rest: torch.Tensor  # `(group, m)`, attention to prefix and own request
    target: torch.Tensor  # `(group, m, head_dim)`, output of the document's entries together
    metric: torch.Tensor  # `(head_dim, head_dim)`, M, mean over the query heads, times the weight of the layer
    bias: torch.Tensor  # `(n_tokens,)`, 0 for all but restore tokens


class KeptHead(NamedTuple):
    """A head and the entries it keeps."""

    of: HeadRows
    kept: torch.Tensor  # positions in the document, `(kept,)`, in order
    fixed: torch.Tensor  # bool `(kept,)`; entries that are neither moved nor biased

    def entries(self, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at these positions of the sequence, `(n, head_dim)` each, float32."""
        return self.of.keys[where].float(), self.of.values[where].float()


def refitted_errors(heads: Sequence[KeptHead], settings: MatchSettings) -> list[torch.Tensor]:
    """Error of losing each kept entry when all others are fitted again, `(kept,)` for each head."""
    found = [head.of.target.new_zeros(0) for head in heads]
    quick = replace(settings, value_ridges=_STAGE_RIDGES)
    for indices, group in _groups(heads, settings.max_rows, settings.rows_per_step):
        metric = torch.stack([heads[i].of.metric for i in indices])
        errors = [refit_errors(part, fit_heads(part, quick), metric) for part in group.parts()]
        for i, own in zip(indices, torch.cat(errors, 1), strict=True):
            found[i] = own[: len(heads[i].kept)]
    return found


def fitted_entries(heads: Sequence[KeptHead], settings: MatchSettings) -> list[FittedHeads]:
    """Fit and move the entries of each head; they stay unchanged without a fit, or where a head keeps nothing."""
    found = []
    for head in heads:
        keys, values = head.entries(head.of.n_prefix + head.kept)
        found.append(FittedHeads(keys, values, head.of.bias[head.kept]))
    for indices, group in _groups(heads, settings.max_final_rows, settings.rows_per_step) if settings.fit else ():
        parts = [(part.real, descend(part, fit_heads(part, settings), settings)) for part in group.parts()]
        for row, i in enumerate(indices):
            found[i] = FittedHeads.joined([fitted.of(row, real[row]) for real, fitted in parts])
    return found


def _groups(heads: Sequence[KeptHead], most: int, rows_per_step: int) -> Iterator[tuple[list[int], HeadGroup]]:
    """Yield heads with entries that are fitted together, from at most `most` rows each, and their indices."""
    filled = [i for i, head in enumerate(heads) if len(head.kept)]
    used = {shape: _picked(shape[0], shape[1], most) for shape in {heads[i].of.total.shape for i in filled}}
    picked = {i: used[heads[i].of.total.shape] for i in filled}
    # Descent goes through the rows in turns. Heads of a group must have the same number, or padding would change them.
    kinds = [(heads[i].of.rows.kind, -(-picked[i][1] // rows_per_step)) for i in filled]
    device = heads[0].of.total.device
    for group in alike([len(heads[i].kept) for i in filled], kinds, rows_per_step, device=device):
        indices = [filled[i] for i in group]
        yield indices, _group_of([heads[i] for i in indices], [picked[i] for i in indices])


def alike(
    sizes: Sequence[int], kinds: Sequence[object], rows_per_step: int, *, device: torch.device
) -> Iterator[list[int]]:
    """Yield indices of heads to fit and move together: of one kind, of similar `sizes` (kept entries), not too many."""
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


def _group_of(heads: Sequence[KeptHead], picked: Sequence[tuple[torch.Tensor, int]]) -> HeadGroup:
    """Stack heads side by side.

    Padded rows have scale 0 and an infinite total, so nothing is learned from them.
    """
    # 1. Rows: learned ones padded to the most of any head, then those held out.
    device = heads[0].of.total.device
    sizes = [(n_learned, len(rows) - n_learned) for rows, n_learned in picked]
    n_learned, n_held_out = (max(column) for column in zip(*sizes, strict=True))
    chosen = [rows.to(device) for rows, _ in picked]

    def laid(parts: Sequence[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
        """Lay `(group, m, ...)` of each head out as `(heads, rows, ...)`, held-out rows behind all learned rows."""
        rows = [part.flatten(0, 1)[own] for part, own in zip(parts, chosen, strict=True)]
        if len(set(sizes)) == 1:
            return torch.stack(rows)
        out = rows[0].new_full((len(rows), n_learned + n_held_out, *rows[0].shape[1:]), fill)
        for one, part, (n, _) in zip(out, rows, sizes, strict=True):
            one[:n], one[n_learned : n_learned + len(part) - n] = part[:n], part[n:]
        return out

    total = laid([head.of.total for head in heads], torch.inf)  # (heads, rows)
    rows = ReferenceRows.merged([head.of.rows for head in heads], laid)
    # 2. Entries, padded to the most of any head.
    counts = torch.tensor([len(head.kept) for head in heads], device=device)
    inside = pad_sequence([head.kept for head in heads], batch_first=True)  # (heads, most kept)
    real = torch.arange(inside.shape[1], device=device) < counts[:, None]  # (heads, most kept)
    where = inside + torch.tensor([head.of.n_prefix for head in heads], device=device)[:, None]
    found = [head.entries(own) for head, own in zip(heads, where, strict=True)]
    keys, values = (torch.stack(parts) for parts in zip(*found, strict=True))  # (heads, most kept, head_dim)
    # 3. Attention of the rows to the entries, relative to the full cache.
    logits = rows.logits(keys, where, slice(None))  # (heads, rows, most kept)
    bias = torch.stack([head.of.bias[own] for head, own in zip(heads, inside, strict=True)]) * real
    return HeadGroup(
        rows=rows,
        total=total,
        rest=laid([head.of.rest for head in heads], 1.0),
        target=laid([head.of.target for head in heads]),
        n_learned=n_learned,
        where=where,
        keys=keys,
        values=values * real[..., None],
        bias=bias,
        weights=logits.sub_(total[..., None]).add_(bias[:, None]).exp_().mul_(real[:, None]),
        real=real,
        fixed=pad_sequence([head.fixed for head in heads], batch_first=True),
    )


def _picked(group: int, m: int, most: int) -> tuple[torch.Tensor, int]:
    """Indices of the used rows among a head's `group * m`, held-out rows last; and the number of learned rows.

    All rows are used, or a subset spread evenly over positions and query heads. One position in four is held out, with
    all its query heads, because their queries look alike.
    """
    rows = torch.arange(group * m)
    step = -(-len(rows) // most)
    rows = rows[(rows // m + rows % m) % step == 0]
    held_out = rows % m % _HELD_OUT == _HELD_OUT - 1
    return torch.cat([rows[~held_out], rows[held_out]]), int((~held_out).sum())
