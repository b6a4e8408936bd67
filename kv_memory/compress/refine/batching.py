"""Entries of documents as the tokens behind them see them, and rows of such tokens in batches.

Training and refinement run many rows behind one document; each is a row of a batch, and the rows of one document share
its entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_memory.compress.kept import pad
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER, PositionedCache


@dataclass(frozen=True)
class Entries:
    """Keys and values of several documents on their positions, the shared prefix included, layer by layer."""

    keys: Sequence[torch.Tensor]  # `(documents, num_kv_heads, n, head_dim)` each, rotated; layers may differ in `n`
    values: Sequence[torch.Tensor]
    positions: Sequence[torch.Tensor]  # int32 `(documents, num_kv_heads or 1, n)`, or one for all; `NEVER` for padding
    next_positions: torch.Tensor  # `(documents,)`, position of the first token behind each document
    n_positions: int  # length of the sequence for which the keys were rotated
    bias: Sequence[torch.Tensor] | None = None  # added to attention logits, `(documents, num_kv_heads, n)` each

    def cache(self, rows: torch.Tensor) -> PositionedCache:
        """Build a cache with one row for each of `rows`, the indices of the documents to follow."""
        cache = PositionedCache(
            [key[rows] for key in self.keys],
            [value[rows] for value in self.values],
            positions=[where[rows] for where in self.positions],
            next_position=0,
            n_positions=self.n_positions,
            bias=None if self.bias is None else [bias[rows] for bias in self.bias],
        )
        cache.next_positions = self.next_positions[rows]
        return cache

    def ask(self, backbone: Backbone, batch: RowBatch) -> torch.Tensor:
        """Logits at the wanted tokens of a batch, `(number of wanted, vocab_size)`, in the model's dtype."""
        logits: torch.Tensor = backbone.head(batch.hidden(backbone, self.cache(batch.documents)))
        return logits


def gather_entries(
    backbone: Backbone, cache: PositionedCache, selected: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> Entries:
    """Collect the entries of prefilled documents: all of them, or those selected.

    Entries that are not selected stay in place as padding that no token sees: heads keep different numbers, and
    gradients need no gathering.

    Args:
        backbone: Model that prefilled them.
        cache: Cache of prefix and documents, from `prefixed_cache`.
        selected: Bool `(num_layers or 1, documents, num_kv_heads or 1, n_tokens)`; None for all.
        bias: Biases of the documents' entries, `(num_layers, documents, num_kv_heads or 1, n_tokens)`; None for none.
    """
    n_prefix = len(backbone.prefix_ids)
    layers = [cache.layer(index) for index in range(backbone.num_layers)]
    shape = layers[0][0].shape
    prefix, where = cache.key_positions(0)[None].split([n_prefix, shape[2] - n_prefix], -1)
    if selected is not None:
        where = torch.where(selected, where, NEVER)  # the shape of `selected`
    padded = None if bias is None else torch.nn.functional.pad(bias, (n_prefix, 0)).expand(-1, *shape[:2], -1)
    return Entries(
        keys=[key for key, _ in layers],
        values=[value for _, value in layers],
        positions=list(torch.cat([prefix.expand(*where.shape[:3], -1), where], dim=-1)),
        next_positions=cache.next_positions,
        n_positions=cache.n_positions,
        bias=None if padded is None else list(padded),
    )


def join_entries(
    backbone: Backbone, entries: Entries, lengths: torch.Tensor, groups: Sequence[Sequence[int]]
) -> Entries:
    """Join documents that were prefilled apart; each keeps the span of its full length (layout `source`).

    Args:
        backbone: Model that prefilled them.
        entries: Entries of all documents.
        lengths: `(documents,)`, tokens of each document.
        groups: Indices of the documents that each document of the result is joined from, in order.
    """
    if [list(group) for group in groups] == [[index] for index in range(len(lengths))]:
        return entries
    n_prefix, spans = len(backbone.prefix_ids), lengths.tolist()
    ends = [n_prefix + sum(spans[index] for index in group) for group in groups]
    # 1. Entries of each document in its place: the prefix comes once, and later documents are rotated on.
    parts: list[list[tuple[torch.Tensor, ...]]] = []  # by group: (num_layers, num_kv_heads, n, ...) each
    for group in groups:
        offset = 0
        own: list[tuple[torch.Tensor, ...]] = []
        for index in group:
            start = n_prefix if own else 0
            key, value, where = (
                torch.stack([layer[index, :, start:] for layer in layers])
                for layers in (entries.keys, entries.values, entries.positions)
            )
            if offset:
                real = where.masked_fill(where == NEVER, 0).expand(*key.shape[:3])
                free = backbone.rope.unrotate(key, real, n_positions=entries.n_positions)
                key = backbone.rope.rotate(free, real + offset, n_positions=max(ends)).to(key.dtype)
                where = torch.where(where == NEVER, NEVER, where + offset)
            bias = [] if entries.bias is None else [torch.stack([b[index, :, start:] for b in entries.bias])]
            own.append((key, value, where, *bias))
            offset += spans[index]
        parts.append(own)

    # 2. Groups side by side, padded to the longest.
    def joined(which: int, fill: int = 0) -> list[torch.Tensor]:
        rows = [torch.cat([part[which] for part in own], 2) for own in parts]
        most = max(row.shape[2] for row in rows)
        rooms = [row.new_full((*row.shape[:2], most - row.shape[2], *row.shape[3:]), fill) for row in rows]
        rows = [torch.cat(pair, 2) for pair in zip(rows, rooms, strict=True)]
        return list(torch.stack(rows, 1))  # (groups, num_kv_heads, most, ...) for each layer

    return Entries(
        keys=joined(0),
        values=joined(1),
        positions=joined(2, NEVER),
        next_positions=torch.tensor(ends, device=entries.next_positions.device),
        n_positions=max(ends),
        bias=None if entries.bias is None else joined(3),
    )


UNEVEN = 1.5  # a row more than this many times as long as the shortest of a batch begins a new one
CPU_TOKENS, GPU_TOKENS = 256, 1024  # of one batch, with its activations in memory for the backward pass


@dataclass(frozen=True)
class Row:
    """Tokens that follow a document."""

    document: int  # index of the document
    ids: tuple[int, ...]
    n_given: int  # given tokens, at least 1; the tokens behind them are to be predicted

    @property
    def n_wanted(self) -> int:
        """Number of tokens to predict."""
        return len(self.ids) - self.n_given


@dataclass(frozen=True)
class RowBatch:
    """Rows as tensors."""

    index: list[int]  # of the rows in the list they come from
    ids: torch.Tensor  # `(rows, n)`, token ids, padded on the right
    lengths: torch.Tensor  # `(rows,)`, real tokens of each row
    documents: torch.Tensor  # `(rows,)`, index of each row's document
    wanted: torch.Tensor  # bool `(rows, n)`; tokens with a next token to predict

    def hidden(self, backbone: Backbone, cache: PositionedCache) -> torch.Tensor:
        """Inputs of the head at the wanted tokens behind a cache of as many rows: `(number of wanted, hidden_size)`."""
        return backbone.prefill(self.ids, cache, lengths=self.lengths)[self.wanted]


def batch_rows(
    backbone: Backbone, rows: Sequence[Row], ends: Sequence[int], *, at_once: int, max_tokens: int | None = None
) -> list[RowBatch]:
    """Group rows into batches of similar length, so that little of what is computed is padding.

    Args:
        backbone: The model.
        rows: Rows in any order.
        ends: Position of the first token behind each document.
        at_once: Most rows of a batch.
        max_tokens: Most tokens of a batch, padding included, unless it is a single row. None: what keeps the device
            busy.
    """
    if max_tokens is None:
        max_tokens = CPU_TOKENS if backbone.device.type == "cpu" else GPU_TOKENS
    # Padding could lengthen a row into other rotary frequencies, so rows of different ones do not share a batch.
    kinds = [backbone.rope.regime(ends[row.document] + len(row.ids)) if backbone.rope.varies else () for row in rows]
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        n = len(rows[index].ids)
        last = batches[-1] if batches else None
        if (
            last is None
            or len(last) == at_once
            or n * (len(last) + 1) > max_tokens
            or n > UNEVEN * len(rows[last[0]].ids)
            or kinds[index] != kinds[last[0]]
        ):
            batches.append([])
        batches[-1].append(index)
    return [_as_tensors(rows, batch, backbone.device) for batch in batches]


def _as_tensors(rows: Sequence[Row], index: list[int], device: torch.device) -> RowBatch:
    ids, lengths = pad([rows[i].ids for i in index], device=device)
    place = torch.arange(ids.shape[1], device=device)
    given = torch.tensor([rows[i].n_given for i in index], device=device)[:, None]
    return RowBatch(
        index=index,
        ids=ids,
        lengths=lengths,
        documents=torch.tensor([rows[i].document for i in index], device=device),
        wanted=(place >= given - 1) & (place < lengths[:, None] - 1),
    )
