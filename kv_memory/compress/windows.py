"""WindowCompressor: chooses the entries to keep of windows, the stretches of documents that are prefilled at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.combined import combined_scores
from kv_memory.compress.kept import Kept, check_finite, extract, pad, top_k_mask
from kv_memory.compress.matching import Matched, MatchedDocument
from kv_memory.compress.prefill import prefill_documents
from kv_memory.compress.selectors import Selector
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache


class Window(NamedTuple):
    """A stretch of a document.

    Attributes:
        ids: Token ids.
        n_kept: Number of entries to keep, on average over layers and heads.
        forced: Bool `(n_tokens,)`; tokens that are kept whatever their score.
    """

    ids: Sequence[int]
    n_kept: int
    forced: torch.Tensor


class PrefilledWindow(NamedTuple):
    """Windows prefilled side by side, before any entry is dropped.

    Attributes:
        cache: Cache of prefix and windows.
        scored: Scores `(num_layers or 1, 1, num_kv_heads or 1, n_tokens)`; for `matched`, the documents to match.
    """

    cache: PositionedCache
    scored: torch.Tensor | list[MatchedDocument]


class WindowCompressor:
    """Prefills windows, selects the entries to keep, and extracts them.

    Several windows are prefilled side by side, each as if it were alone. Only an adapter by itself, and `matched`,
    take more than one; `batch_kind` says which ones.

    Args:
        backbone: Model that prefills the windows.
        selector: Training-free selector; with an adapter, the one whose scores join the adapter's, or None.
        adapter: Adapter attached to the same backbone.
        routed: True to use the adapter's LoRA; False uses only its selection.
    """

    def __init__(self, backbone: Backbone, selector: Selector | None, adapter: Adapter | None, *, routed: bool) -> None:
        self._backbone = backbone
        self._selector = selector
        self._adapter = adapter
        self._routed = routed
        self.extra_tokens = 0 if selector is None else selector.extra_tokens  # run behind a window at most

    def batch_kind(self, n_tokens: int) -> object | None:
        """Properties that windows of a batch must share; None for a window that is compressed alone."""
        n, regime = len(self._backbone.prefix_ids) + n_tokens, self._backbone.rope.regime
        if self._adapter is not None:
            return regime(n) if self._selector is None else None
        if not isinstance(self._selector, Matched) or n_tokens > self._selector.settings.part_tokens:
            return None
        return regime(n) if regime(n) == regime(n + self.extra_tokens) else None

    def compress(self, windows: Sequence[Window], prefilled: PrefilledWindow | None = None) -> list[Kept]:
        """Compress windows side by side, or in halves where memory does not hold them together.

        Args:
            windows: Windows of one `batch_kind`.
            prefilled: The same windows, as `prefill` returned them; None to prefill them here.

        Raises:
            OutOfMemoryError: Memory does not hold a single one of them.
        """
        try:
            return self._compress(windows, prefilled)
        except torch.OutOfMemoryError:
            if len(windows) == 1:
                raise
        # Outside the handler: its traceback keeps the tensors of the failed batch alive.
        half = len(windows) // 2
        return [*self.compress(windows[:half]), *self.compress(windows[half:])]

    def _compress(self, windows: Sequence[Window], prefilled: PrefilledWindow | None) -> list[Kept]:
        backbone = self._backbone
        # 1. Keep a window in full: nothing is selected and nothing is routed.
        if len(windows) == 1 and windows[0].n_kept == len(windows[0].ids):
            cache = backbone.prefixed_cache(windows[0].n_kept)
            backbone.prefill(torch.tensor([windows[0].ids]), cache)
            whole = torch.ones(1, 1, windows[0].n_kept, dtype=torch.bool, device=backbone.device)
            return [extract(backbone, cache, whole)]
        # 2. Prefill and score; `matched` selects and fits by itself.
        n_kept = torch.tensor([window.n_kept for window in windows])  # (batch,)
        forced = pad_sequence([window.forced for window in windows], batch_first=True)  # (batch, n_tokens)
        if self._adapter is not None:
            cache, selected = self._adapted(self._adapter, windows, n_kept, forced)
        else:
            cache, scored = prefilled or self.prefill(windows)
            if isinstance(scored, list):
                assert isinstance(self._selector, Matched)
                found = self._selector.match(scored, n_kept.tolist(), [window.forced for window in windows])
                return [extract(backbone, cache, own, row=i, fitted=fitted) for i, (own, fitted) in enumerate(found)]
            assert self._selector is not None
            n_tokens = torch.tensor([len(window.ids) for window in windows])
            selected = top_k_mask(scored, n_tokens, n_kept, budget=self._selector.budget, forced=forced)
        # 3. Extract; `selected` is (num_layers or 1, batch, num_kv_heads or 1, n_tokens).
        return [
            extract(backbone, cache, selected[:, i, :, : len(window.ids)], row=i) for i, window in enumerate(windows)
        ]

    def prefill(self, windows: Sequence[Window]) -> PrefilledWindow:
        """Prefill windows without an adapter, and let the selector score; `n_kept` and `forced` do not matter."""
        assert self._selector is not None
        backbone, selector = self._backbone, self._selector
        ids, lengths = pad([window.ids for window in windows], device=backbone.device)  # (batch, n_tokens), (batch,)
        cache = backbone.prefixed_cache(ids.shape[1], room=self.extra_tokens, batch_size=len(windows))
        if isinstance(selector, Matched):
            ragged = lengths if len(windows) > 1 else None
            backbone.prefill(ids, cache, lengths=ragged)
            return PrefilledWindow(cache, selector.documents(backbone, ids, cache, lengths=ragged))
        scores = selector.score(backbone, ids, cache).to(ids.device)
        check_finite(backbone, scores)
        return PrefilledWindow(cache, (scores[None, None] if scores.ndim == 1 else scores)[:, None])

    def _adapted(
        self, adapter: Adapter, windows: Sequence[Window], n_kept: torch.Tensor, forced: torch.Tensor
    ) -> tuple[PositionedCache, torch.Tensor]:
        """Prefill with the adapter, which scores, selects and routes; return the cache and the selection."""
        device = self._backbone.device
        ids, lengths = pad([window.ids for window in windows], device=device)
        reading = prefill_documents(
            adapter,
            ids,
            lengths,
            n_kept.to(device),
            forced=forced.to(device),
            routed=self._routed,
            room=self.extra_tokens,
        )
        if self._selector is None:
            return reading.cache, reading.selected
        assert isinstance(self._selector, Matched)
        scores = combined_scores(self._backbone, self._selector, ids, reading)
        return reading.cache, top_k_mask(scores, lengths, n_kept, budget=adapter.config.budget, forced=forced)
