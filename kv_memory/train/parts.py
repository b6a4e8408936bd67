"""Split a batch that does not fit into memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kv_memory.train.batches import Batch

__all__ = ["split_batch"]


def split_batch(batch: Batch, n_parts: int, *, by_rows: bool) -> list[Batch]:
    """Split a batch into parts that together have its groups and rows, each row once.

    Groups are divided first, then the rows of a single group. The documents of that group are then prefilled in every
    part.

    Args:
        batch: Batch to split; unchanged.
        n_parts: Number of parts, a power of 2. The result has fewer if nothing is left to divide.
        by_rows: True divides single groups by their rows, and drops parts without rows. False is for the warm-up:
            its loss covers all documents and needs no rows.

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
