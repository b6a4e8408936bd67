"""What tokens that follow a document see of it: entries in every layer and head, and rows of tokens behind them.

Training and refinement ask many things about one document; each is a row of a batch, and the rows of one document
share its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from kv_memory.compress.prefill import pad
from kv_memory.model.attention import ForwardContext
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER, PositionedCache

__all__ = ["Entries", "Row", "RowBatch", "batch_rows", "gather_entries", "join_entries"]


@dataclass(frozen=True)
class Entries:
    """Keys and values of several documents on their positions, the shared prefix included.

    Attributes:
        keys: `(num_layers, documents, num_kv_heads, n, head_dim)`, rotated.
        values: The same shape.
        positions: `(num_layers or 1, documents, num_kv_heads or 1, n)`, int32; `NEVER` for padding.
        next_positions: `(documents,)`, where what follows each document begins.
        n_positions: The length of the sequence for which the keys were rotated.
        bias: `(num_layers, documents, num_kv_heads, n)`, added to the attention logits; None for none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    next_positions: torch.Tensor
    n_positions: int
    bias: torch.Tensor | None = None

    def cache(self, rows: torch.Tensor) -> PositionedCache:
        """A cache of one row for each of `rows`, the documents to be followed."""
        cache = PositionedCache(
            self.keys[:, rows],
            self.values[:, rows],
            positions=self.positions[:, rows],
            next_position=0,
            n_positions=self.n_positions,
            bias=None if self.bias is None else self.bias[:, rows],
        )
        cache.next_positions = self.next_positions[rows]
        return cache

    def ask(
        self,
        backbone: Backbone,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        rows: torch.Tensor,
        wanted: torch.Tensor,
        *,
        outputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits at some places of what follows the documents.

        Args:
            backbone: The model.
            ids: `(rows, n)`, padded on the right.
            lengths: `(rows,)`.
            rows: `(rows,)`, which document each row follows.
            wanted: Bool `(rows, n)`: the tokens whose successors are to be predicted.
            outputs: Where every layer's attention output at those tokens is put, `(number of wanted, num_heads *
                head_dim)`; None for nowhere.

        Returns:
            `(number of wanted, vocab_size)`, row by row; of the model's dtype.
        """
        cache = self.cache(rows)
        every: list[torch.Tensor] | None = None if outputs is None else []
        hidden = backbone.read(ids, cache, lengths=lengths, context=ForwardContext(outputs=every))
        if outputs is not None and every is not None:
            outputs += [out[wanted].flatten(1) for out in every[: backbone.num_layers]]
        logits: torch.Tensor = backbone.head(hidden[wanted])
        return logits


def gather_entries(
    backbone: Backbone,
    cache: PositionedCache,
    lengths: torch.Tensor,
    selected: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> Entries:
    """The entries of documents that were read: all of them, or those selected.

    What is not selected stays in its place as padding, seen by nothing: heads keep different numbers, and gradients
    need no gathering.

    Args:
        backbone: The model that read them.
        cache: Prefix and documents, from `prefixed_cache`.
        lengths: `(documents,)`, tokens of each.
        selected: Bool `(num_layers or 1, documents, num_kv_heads or 1, n_tokens)`; None for all.
        scores: `(num_layers, documents, num_kv_heads or 1, n_tokens)`; entries are biased by `s - stop_gradient(s)`:
            by nothing, but with a path on which the gradient reaches the scorer (the paper's straight-through).
    """
    n_prefix = len(backbone.prefix_ids)
    layers = [cache.layer(index) for index in range(backbone.num_layers)]
    keys, values = torch.stack([key for key, _ in layers]), torch.stack([value for _, value in layers])
    device, n_tokens = keys.device, keys.shape[3] - n_prefix
    inside = torch.arange(n_tokens, device=device, dtype=torch.int32)
    seen = (inside < lengths.to(device)[:, None])[None, :, None]
    if selected is not None:
        seen = seen & selected
    where = torch.where(seen, inside + n_prefix, NEVER)
    prefix = torch.arange(n_prefix, device=device, dtype=torch.int32)
    bias = None
    if scores is not None:
        straight = torch.nn.functional.pad(scores - scores.detach(), (n_prefix, 0))
        bias = straight.expand(*keys.shape[:3], -1)
    return Entries(
        keys=keys,
        values=values,
        positions=torch.cat([prefix.expand(*where.shape[:3], -1), where], dim=-1),
        next_positions=lengths.to(device) + n_prefix,
        n_positions=cache.n_positions,
        bias=bias,
    )


def join_entries(
    backbone: Backbone, entries: Entries, lengths: torch.Tensor, groups: Sequence[Sequence[int]]
) -> Entries:
    """Documents that were read apart, one behind the other: each keeps the span of its length (layout `source`).

    Args:
        backbone: The model that read them.
        entries: Of all documents.
        lengths: `(documents,)`, tokens of each.
        groups: For each result the documents it is joined from, in order.

    Returns:
        Entries whose documents are the groups.
    """
    if [list(group) for group in groups] == [[index] for index in range(len(lengths))]:
        return entries
    n_prefix, spans = len(backbone.prefix_ids), lengths.tolist()
    longest = n_prefix + max(sum(spans[index] for index in group) for group in groups)
    keys, values, positions, biases = [], [], [], []
    for group in groups:
        offset = 0
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for index in group:
            start = 0 if not parts else n_prefix  # the prefix comes once
            where = entries.positions[:, index, :, start:]
            part = entries.keys[:, index, :, start:]
            if offset:
                real = where.masked_fill(where == NEVER, 0).expand(*part.shape[:3])
                free = backbone.rope.take_off(part, real, n_positions=entries.n_positions)
                part = backbone.rope.put_on(free, real + offset, n_positions=longest).to(part.dtype)
                where = torch.where(where == NEVER, NEVER, where + offset)
            bias = None if entries.bias is None else entries.bias[:, index, :, start:]
            parts.append((part, entries.values[:, index, :, start:], where, bias))
            offset += spans[index]
        keys.append(torch.cat([part[0] for part in parts], 2))
        values.append(torch.cat([part[1] for part in parts], 2))
        positions.append(torch.cat([part[2] for part in parts], 2))
        if entries.bias is not None:
            biases.append(torch.cat([part[3] for part in parts if part[3] is not None], 2))
    most = max(key.shape[2] for key in keys)
    ends = [n_prefix + sum(spans[index] for index in group) for group in groups]
    return Entries(
        keys=torch.stack([_widen(key.transpose(2, 3), most, 0).transpose(2, 3) for key in keys], 1),
        values=torch.stack([_widen(value.transpose(2, 3), most, 0).transpose(2, 3) for value in values], 1),
        positions=torch.stack([_widen(where, most, NEVER) for where in positions], 1),
        next_positions=torch.tensor(ends, device=entries.keys.device),
        n_positions=longest,
        bias=torch.stack([_widen(bias, most, 0) for bias in biases], 1) if biases else None,
    )


def _widen(tensor: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """The tensor padded on the right of its last dimension."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=fill)


UNEVEN = 1.5  # a row more than this much longer than the shortest of a batch begins a new one
CPU_TOKENS, GPU_TOKENS = 256, 1024  # of one batch: what lies in memory for the backward pass


@dataclass(frozen=True)
class Row:
    """Tokens that follow a document.

    Attributes:
        document: Its index.
        ids: The tokens.
        n_given: How many are only read; those behind are to be predicted. At least 1.
    """

    document: int
    ids: tuple[int, ...]
    n_given: int

    @property
    def n_wanted(self) -> int:
        """Predictions asked for."""
        return len(self.ids) - self.n_given


@dataclass(frozen=True)
class RowBatch:
    """Rows as tensors.

    Attributes:
        index: Which rows they are, in the order of the list they come from.
        ids: `(rows, n)`, padded on the right.
        lengths: `(rows,)`.
        documents: `(rows,)`.
        wanted: Bool `(rows, n)`, tokens whose successors are predicted.
    """

    index: list[int]
    ids: torch.Tensor
    lengths: torch.Tensor
    documents: torch.Tensor
    wanted: torch.Tensor


def batch_rows(
    rows: Sequence[Row],
    *,
    at_once: int,
    device: torch.device | str,
    max_tokens: int | None = None,
    kind: Callable[[Row], Hashable] | None = None,
) -> list[RowBatch]:
    """Rows in batches of similar length, so that little of what is computed is padding.

    Args:
        rows: In any order.
        at_once: Most rows of a batch.
        device: Of the tensors.
        max_tokens: Most tokens of a batch, padding included; a single row may be longer. None: as many as keep the
            device busy.
        kind: Rows of different kinds do not share a batch; those of a kind follow each other in order of length.
    """
    if max_tokens is None:
        max_tokens = CPU_TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        n = len(rows[index].ids)
        last = batches[-1] if batches else None
        if (
            last is None
            or len(last) == at_once
            or n * (len(last) + 1) > max_tokens
            or n > UNEVEN * len(rows[last[0]].ids)
            or (kind is not None and kind(rows[index]) != kind(rows[last[0]]))
        ):
            batches.append([])
        batches[-1].append(index)
    return [_as_tensors(rows, batch, device) for batch in batches]


def _as_tensors(rows: Sequence[Row], index: list[int], device: torch.device | str) -> RowBatch:
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
