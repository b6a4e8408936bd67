"""WindowCompressor: makes the caches of windows, the stretches of documents that are prefilled at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.combined import combined_scores
from kv_memory.compress.fitting import FittedHeads
from kv_memory.compress.kept import check_finite, extract, pad, top_k_mask
from kv_memory.compress.matching import Matched, MatchedDocument
from kv_memory.compress.prefill import prefill_documents
from kv_memory.compress.selectors import Selector
from kv_memory.config import n_kept_for
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache


class Window(NamedTuple):
    """A stretch of a document."""

    ids: Sequence[int]
    forced: torch.Tensor  # bool `(n_tokens,)`; tokens that are kept whatever their score
    keep_ratio: float  # share of the other tokens to keep

    @property
    def n_kept(self) -> int:
        """Number of entries to keep, on average over layers and heads."""
        n_forced = int(self.forced.sum())
        n_free = len(self.ids) - n_forced
        return n_forced + (n_kept_for(n_free, self.keep_ratio) if n_free else 0)


class PrefilledWindow(NamedTuple):
    """Windows prefilled side by side, before any entry is dropped."""

    cache: PositionedCache  # of prefix and windows
    scored: torch.Tensor | list[MatchedDocument]  # `(num_layers or 1, 1, num_kv_heads or 1, n_tokens)`, or for `match`


class WindowCompressor:
    """Prefills windows, selects the entries to keep, and extracts them; arguments as in `Compressor`.

    Several windows are prefilled side by side, each as if it were alone. Only an adapter by itself, and `matched`,
    take more than one; `batch_kind` says which ones. With an adapter, `selector` is the one whose scores join the
    adapter's, or None; with one that has restore tokens, it is the `Matched` that selects from their entries too.
    """

    def __init__(self, backbone: Backbone, selector: Selector | None, adapter: Adapter | None, *, routed: bool) -> None:
        self._backbone = backbone
        self._selector = selector
        restores = adapter is not None and adapter.config.restore_tokens > 0
        self._restore = adapter if restores else None
        self._adapter = None if restores else adapter
        self._routed = routed
        self.extra_tokens = 0 if selector is None else selector.extra_tokens  # run behind a window at most
        if self._restore is not None:
            self.extra_tokens += self._restore.config.restore_tokens

    def batch_kind(self, n_tokens: int) -> object | None:
        """Properties that windows of a batch must share; None for a window that is compressed alone."""
        n, regime = len(self._backbone.prefix_ids) + n_tokens, self._backbone.rope.regime
        if self._adapter is not None:
            return regime(n) if self._selector is None else None
        if not isinstance(self._selector, Matched) or n_tokens > self._selector.settings.part_tokens:
            return None
        return regime(n) if regime(n) == regime(n + self.extra_tokens) else None

    def compress(
        self, windows: Sequence[Window], fingerprint: Fingerprint, prefilled: PrefilledWindow | None = None
    ) -> list[DistilledCache]:
        """Compress windows of one `batch_kind` side by side, or in halves where memory does not hold them together.

        They are prefilled here, unless `prefilled` is what `prefill` returned for them.

        Raises:
            OutOfMemoryError: Memory does not hold a single one of them.
        """
        try:
            cache, chosen = self._choose(windows, prefilled)
            make = partial(extract, self._backbone, cache, fingerprint=fingerprint)
            return [
                make(
                    selected if fitted is not None else selected[..., : len(window.ids)],
                    n_tokens=len(window.ids),
                    keep_ratio=window.keep_ratio,
                    row=row,
                    fitted=fitted,
                )
                for row, (window, (selected, fitted)) in enumerate(zip(windows, chosen, strict=True))
            ]
        except torch.OutOfMemoryError:
            if len(windows) == 1:
                raise
        # Outside the handler: its traceback keeps the tensors of the failed batch alive.
        half = len(windows) // 2
        return [*self.compress(windows[:half], fingerprint), *self.compress(windows[half:], fingerprint)]

    def _choose(
        self, windows: Sequence[Window], prefilled: PrefilledWindow | None
    ) -> tuple[PositionedCache, Sequence[tuple[torch.Tensor, FittedHeads | None]]]:
        """Cache of prefix and windows; and for each window the mask of the kept entries, and what they were fitted to.

        A mask is bool, `(num_layers or 1, num_kv_heads or 1, n_tokens or more)`; beside fitted entries, it has exactly
        the document's tokens and its restore tokens.
        """
        backbone = self._backbone
        # 1. Keep a window in full: nothing is selected and nothing is routed.
        if len(windows) == 1 and windows[0].n_kept == len(windows[0].ids):
            cache = backbone.prefixed_cache(windows[0].n_kept)
            backbone.prefill(torch.tensor([windows[0].ids]), cache)
            return cache, [(torch.ones(1, 1, windows[0].n_kept, dtype=torch.bool, device=backbone.device), None)]
        # 2. Prefill and score; `matched` selects and fits by itself.
        n_kept = torch.tensor([window.n_kept for window in windows])  # (batch,)
        forced = pad_sequence([window.forced for window in windows], batch_first=True)  # (batch, n_tokens)
        if self._adapter is not None:
            cache, selected = self._adapted(self._adapter, windows, n_kept, forced)
        else:
            assert self._selector is not None
            cache, scored = prefilled or self.prefill(windows)
            if isinstance(scored, list):
                assert isinstance(self._selector, Matched)
                return cache, self._selector.match(scored, n_kept.tolist(), [window.forced for window in windows])
            n_tokens = torch.tensor([len(window.ids) for window in windows])
            selected = top_k_mask(scored, n_tokens, n_kept, budget=self._selector.budget, forced=forced)
        return cache, [(own, None) for own in selected.unbind(1)]  # of (num_layers or 1, batch, ...)

    def prefill(self, windows: Sequence[Window]) -> PrefilledWindow:
        """Prefill windows plainly, with restore tokens behind them, and let the selector score; only `ids` matter."""
        assert self._selector is not None
        backbone, selector = self._backbone, self._selector
        ids, lengths = pad([window.ids for window in windows], device=backbone.device)  # (batch, n_tokens), (batch,)
        cache = backbone.prefixed_cache(ids.shape[1], room=self.extra_tokens, batch_size=len(windows))
        if isinstance(selector, Matched):
            ragged = lengths if len(windows) > 1 else None
            backbone.prefill(ids, cache, lengths=ragged)
            return PrefilledWindow(
                cache, selector.documents(backbone, ids, cache, lengths=ragged, restore=self._restore)
            )
        scores = selector.score(backbone, ids, cache).to(ids.device)
        check_finite(backbone, scores)
        return PrefilledWindow(cache, (scores[None, None] if scores.ndim == 1 else scores)[:, None])

    def _adapted(
        self, adapter: Adapter, windows: Sequence[Window], n_kept: torch.Tensor, forced: torch.Tensor
    ) -> tuple[PositionedCache, torch.Tensor]:
        """Prefill with the adapter, which scores, selects and routes; return the cache and the selection."""
        ids, lengths = pad([window.ids for window in windows], device=self._backbone.device)
        n_kept, forced = n_kept.to(ids.device), forced.to(ids.device)
        reading = prefill_documents(
            adapter, ids, lengths, n_kept, forced=forced, routed=self._routed, room=self.extra_tokens
        )
        if self._selector is None:
            return reading.cache, reading.selected
        assert isinstance(self._selector, Matched)
        scores = combined_scores(self._backbone, self._selector, ids, reading)
        return reading.cache, top_k_mask(scores, lengths, n_kept, budget=adapter.config.budget, forced=forced)
