"""Halving a batch where the memory does not hold all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kv_memory.train.batches import Batch

__all__ = ["split_batch"]


def split_batch(batch: Batch, n_parts: int, *, by_rows: bool) -> list[Batch]:
    """Parts of a batch that together have its groups and rows, each once.

    Groups are divided first, then the rows of what is a single group; its documents are then read once a part.

    Args:
        batch: Is left as it is.
        n_parts: A power of 2. Fewer parts come back where there is nothing left to divide.
        by_rows: Parts without rows are left out, and single groups divided by their rows. False for steps that look
            at documents only.

    Returns:
        At least one part.
    """
    parts = [batch]
    for _ in range(n_parts.bit_length() - 1):
        parts = [half for part in parts for half in _halves(part, by_rows=by_rows)]
    return [part for part in parts if part.rows] if by_rows else parts


def _halves(batch: Batch, *, by_rows: bool) -> list[Batch]:
    middle = len(batch.groups) // 2
    if middle:
        n = len(batch.groups)
        return [_of_groups(batch, range(middle)), _of_groups(batch, range(middle, n))]
    middle = len(batch.rows) // 2
    if not by_rows or not middle:
        return [batch]
    return [replace(batch, rows=batch.rows[:middle]), replace(batch, rows=batch.rows[middle:])]


def _of_groups(batch: Batch, chosen: Sequence[int]) -> Batch:
    documents = [index for group in chosen for index in batch.groups[group]]
    new_index = {old: new for new, old in enumerate(documents)}
    new_group = {old: new for new, old in enumerate(chosen)}
    return replace(
        batch,
        documents=tuple(batch.documents[index] for index in documents),
        groups=tuple(tuple(new_index[index] for index in batch.groups[group]) for group in chosen),
        rows=tuple(replace(row, group=new_group[row.group]) for row in batch.rows if row.group in new_group),
    )
