"""Rows of tokens that follow documents, batched by length."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from kv_memory.compress.prefill import pad

__all__ = ["Row", "RowBatch", "batch_rows"]

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
