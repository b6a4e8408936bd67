"""Several short documents compressed as one batch: a single passage does not fill a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import Kept, extract
from kv_memory.compress.matching import Matched, match_documents
from kv_memory.compress.prefill import prefill_documents
from kv_memory.model.backbone import Backbone

__all__ = ["BatchMethod", "adapter_batch", "in_halves", "match_batch"]

BatchMethod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[Kept]]


def in_halves(
    method: BatchMethod, rows: Sequence[Sequence[int]], n_kept: Sequence[int], *, device: torch.device
) -> list[Kept]:
    """Compress documents as one batch, or in halves where memory does not hold them together.

    Args:
        method: Function of padded token ids `(batch, n)`, lengths `(batch,)` and numbers of kept entries `(batch,)`.
        rows: Token ids of each document.
        n_kept: Number of entries to keep of each document, on average over layers and heads.
        device: Device of the model.

    Raises:
        OutOfMemoryError: Memory does not hold a single one of them.
    """
    lengths = torch.tensor([len(ids) for ids in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    try:
        return method(padded.to(device), lengths, torch.tensor(n_kept))
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    # Outside the handler: its traceback keeps the tensors of the failed batch alive.
    half = len(rows) // 2
    halves = (rows[:half], n_kept[:half]), (rows[half:], n_kept[half:])
    return [kept for part in halves for kept in in_halves(method, *part, device=device)]


def adapter_batch(
    adapter: Adapter, ids: torch.Tensor, lengths: torch.Tensor, n_kept: torch.Tensor, *, routed: bool
) -> list[Kept]:
    """Prefill documents with an adapter, which selects and routes; arguments as in `in_halves`."""
    reading = prefill_documents(adapter, ids, lengths.to(ids.device), n_kept.to(ids.device), routed=routed)
    return [
        extract(adapter.backbone, reading.cache, reading.selected[:, row, :, :n], row=row)
        for row, n in enumerate(lengths.tolist())
    ]


def match_batch(
    backbone: Backbone, selector: Matched, ids: torch.Tensor, lengths: torch.Tensor, n_kept: torch.Tensor
) -> list[Kept]:
    """Prefill documents and fit what is kept of them with `matched`; arguments as in `in_halves`."""
    cache = backbone.prefixed_cache(ids.shape[1], room=selector.extra_tokens, batch_size=len(ids))
    backbone.prefill(ids, cache, lengths=lengths)
    documents = selector.documents(backbone, ids, cache, lengths=lengths)
    none = [torch.zeros(n, dtype=torch.bool) for n in lengths.tolist()]
    matches = match_documents(documents, n_kept.tolist(), none)
    return [extract(backbone, cache, match.selected, row=row, match=match) for row, match in enumerate(matches)]
