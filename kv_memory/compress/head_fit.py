"""The heads of one or several documents, fitted side by side: which entries stay is decided elsewhere (`matching`).

The arrays of one head are small, so heads of like size are stacked, whatever document they belong to. They differ in
entries, and heads of different documents also in rows; both are padded so that each head comes out as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from kv_memory.compress.descent import HeadGroup, MovedHeads, alike, descend
from kv_memory.compress.fitting import HeadSystem, fit_heads, refit_errors
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import ReferenceRows
from kv_memory.model.kv_cache import PositionedCache

__all__ = ["HeadRows", "KeptHead", "fitted_entries", "refitted_errors"]

_STAGE_RIDGES = (1e-2, 1e-1)  # of the fits of stages, which need not be the best
_HELD_OUT = 4  # one position in four is held out, to choose the ridge on


@dataclass(frozen=True, eq=False)
class HeadRows:
    """One KV head of one document, and the rows of the query heads that share it.

    Attributes:
        cache: Prefix and document, as they were prefilled.
        row: The document's, in the batch of the cache.
        layer: The layer's index.
        head: The KV head's index.
        n_prefix: Tokens of the prefix.
        n_tokens: Tokens of the document.
        rows: Those of the query heads, `(group, m)`.
        total: Logsumexp over prefix, document and own row, `(group, m)`.
        rest: Attention to prefix and own row, `(group, m)`.
        target: What the document's entries put out together, `(group, m, head_dim)`.
        metric: M, the mean of the query heads, times what the layer counts, `(head_dim, head_dim)`.
    """

    cache: PositionedCache
    row: int
    layer: int
    head: int
    n_prefix: int
    n_tokens: int
    rows: ReferenceRows
    total: torch.Tensor
    rest: torch.Tensor
    target: torch.Tensor
    metric: torch.Tensor

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of prefix and document, `(n_prefix + n_tokens, head_dim)`, float32."""
        keys, values = self.cache.layer(self.layer)
        own = self.row, self.head, slice(self.n_prefix + self.n_tokens)
        return keys[own].float(), values[own].float()


@dataclass(frozen=True, eq=False)
class KeptHead:
    """A head and what it keeps.

    Attributes:
        of: The head.
        kept: Positions in the document, `(kept,)`, in order.
        fixed: Bool `(kept,)`; these are neither moved nor biased.
    """

    of: HeadRows
    kept: torch.Tensor
    fixed: torch.Tensor


def refitted_errors(heads: Sequence[KeptHead], settings: MatchSettings) -> list[torch.Tensor]:
    """What the loss of each entry kept would do when all others are fitted again: `(kept,)` of each head."""
    found = [head.of.target.new_zeros(0) for head in heads]
    quick = replace(settings, value_ridges=_STAGE_RIDGES)
    for indices, group in _groups(heads, settings.max_rows, settings):
        metric = torch.stack([heads[i].of.metric for i in indices])
        errors = [
            refit_errors(part.system, fit_heads(part.system, part.fixed, quick), metric) for part in group.parts()
        ]
        for i, own in zip(indices, torch.cat(errors, 1), strict=True):
            found[i] = own[: len(heads[i].kept)]
    return found


def fitted_entries(heads: Sequence[KeptHead], settings: MatchSettings) -> list[MovedHeads]:
    """The entries each head keeps, fitted and moved; as they are without a fit, or where a head keeps nothing."""
    found = []
    for head in heads:
        keys, values = (tensor[head.of.n_prefix + head.kept] for tensor in head.of.entries())
        found.append(MovedHeads(keys, values, values.new_zeros(len(keys))))
    for indices, group in _groups(heads, settings.max_final_rows, settings) if settings.fit else ():
        parts = [
            (part.system.real, descend(part, fit_heads(part.system, part.fixed, settings), settings))
            for part in group.parts()
        ]
        for row, i in enumerate(indices):
            found[i] = MovedHeads.joined([moved.of(row, real[row]) for real, moved in parts])
    return found


def _groups(heads: Sequence[KeptHead], most: int, settings: MatchSettings) -> Iterator[tuple[list[int], HeadGroup]]:
    """Heads that are fitted together, none of those that keep nothing; and which they are.

    Args:
        heads: All of them.
        most: Rows of a head, at most.
        settings: For the rows a step looks at.
    """
    filled = [i for i, head in enumerate(heads) if len(head.kept)]
    used = {shape: _picked(shape[0], shape[1], most) for shape in {heads[i].of.total.shape for i in filled}}
    picked = {i: used[heads[i].of.total.shape] for i in filled}
    # Steps go through the rows in so many turns; heads together must have the same, or padding would change the turns.
    kinds = [(heads[i].of.rows.kind, -(-picked[i][1] // settings.rows_per_step)) for i in filled]
    device = heads[0].of.total.device
    for group in alike([len(heads[i].kept) for i in filled], kinds, settings.rows_per_step, device=device):
        indices = [filled[i] for i in group]
        yield indices, _group_of([heads[i] for i in indices], [picked[i] for i in indices])


def _group_of(heads: Sequence[KeptHead], picked: Sequence[tuple[torch.Tensor, int]]) -> HeadGroup:
    """Heads side by side. Padded rows have no scale and an infinite total, so nothing is learned from them."""
    device = heads[0].of.total.device
    sizes = [(n_learned, len(rows) - n_learned) for rows, n_learned in picked]
    n_learned, n_held_out = (max(column) for column in zip(*sizes, strict=True))
    chosen = [rows.to(device) for rows, _ in picked]

    def laid(parts: Sequence[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
        """`(group, m, ...)` of each head to `(heads, rows, ...)`, rows held out behind all that are learned from."""
        rows = [part.flatten(0, 1)[own] for part, own in zip(parts, chosen, strict=True)]
        if len(set(sizes)) == 1:
            return torch.stack(rows)
        out = rows[0].new_full((len(rows), n_learned + n_held_out, *rows[0].shape[1:]), fill)
        for one, part, (n, _) in zip(out, rows, sizes, strict=True):
            one[:n], one[n_learned : n_learned + len(part) - n] = part[:n], part[n:]
        return out

    asked = [head.of.rows for head in heads]
    total = laid([head.of.total for head in heads], torch.inf)
    rows = replace(
        asked[0],
        query=laid([rows.query for rows in asked]),
        own=laid([rows.own for rows in asked]),
        positions=laid([rows.positions for rows in asked]),
        scale=laid([rows.scale for rows in asked]),
    )
    counts = torch.tensor([len(head.kept) for head in heads], device=device)
    inside = pad_sequence([head.kept for head in heads], batch_first=True)  # (heads, most kept)
    real = torch.arange(inside.shape[1], device=device) < counts[:, None]
    where = inside + torch.tensor([head.of.n_prefix for head in heads], device=device)[:, None]
    found = [[part[own] for part in head.of.entries()] for head, own in zip(heads, where, strict=True)]
    keys, values = (torch.stack(parts) for parts in zip(*found, strict=True))  # (heads, most kept, head_dim)
    logits = rows.logits(keys, where, slice(None), slice(None))
    system = HeadSystem(
        weights=logits.sub_(total[..., None]).exp_().mul_(real[:, None]),
        rest=laid([head.of.rest for head in heads], 1.0),
        target=laid([head.of.target for head in heads]),
        values=values * real[..., None],
        scale=rows.scale,
        real=real,
        n_learned=n_learned,
    )
    fixed = pad_sequence([head.fixed for head in heads], batch_first=True)
    return HeadGroup(rows, total, system, where, keys, fixed)


def _picked(group: int, m: int, most: int) -> tuple[torch.Tensor, int]:
    """Which of a head's `group * m` rows are used, and how many of them are learned from; those held out are last.

    All rows, or evenly spread ones of which every position has some. One position in four is held out, with all its
    heads, which look alike.
    """
    rows = torch.arange(group * m)
    step = -(-len(rows) // most)
    rows = rows[(rows // m + rows % m) % step == 0]
    held_out = rows % m % _HELD_OUT == _HELD_OUT - 1
    return torch.cat([rows[~held_out], rows[held_out]]), int((~held_out).sum())
