"""Compressor: a document in, a distilled cache out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep, windows_of
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.batch import BatchMethod, adapter_batch, in_halves, match_batch
from kv_memory.compress.combined import check_combinable, combined_selection
from kv_memory.compress.kept import Kept, extract, join
from kv_memory.compress.matching import Matched, MatchedDocument, MatchSettings
from kv_memory.compress.prefill import check_finite, prefill_documents, top_k_mask
from kv_memory.compress.refine.optimize import refine_batch
from kv_memory.compress.refine.refine_settings import RefineSettings
from kv_memory.compress.selectors import Selector, make_selector
from kv_memory.config import SelectorName, check_keep_ratio, n_kept_for
from kv_memory.errors import ConfigError, EmptyDocumentError
from kv_memory.model.attention import ForwardContext
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

__all__ = ["Compressor", "PrefilledDocument", "Span"]

Span = tuple[int, int]  # start and end, end excluded


class Compressor:
    """Prefills documents and keeps the entries that matter.

    With an adapter: score, select, and prefill with the adapter's tokens routed through the LoRA (KV-Distill, arXiv
    2503.10337). Without one: prefill, let a training-free selector score and select; `matched` also fits the kept
    entries.

    Args:
        backbone: Model that prefills the documents.
        selector: Training-free selector or its name. With an adapter only `combined` has an effect: the adapter and
            the output error select together, which takes a second pass over the document.
        adapter: Adapter attached to the same backbone.
        routed: True to use the LoRA; False uses only the adapter's selection, to measure the two apart.
        refine: Settings of the refinement of each document's kept entries (see `refine_batch`), an offline step that
            takes as long as a few dozen to a few hundred prefills; None for no refinement.
        window_tokens: Longest stretch prefilled at once, in tokens; None means as much as the context window holds.
            Longer documents are prefilled window by window behind the same prefix, and joined.

    Raises:
        ConfigError: The adapter belongs to another backbone, `combined` needs another adapter, the selector is
            unknown, or the context window is too small for the prompt form, the selector or `window_tokens`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        selector: SelectorName | Selector = "matched",
        adapter: Adapter | None = None,
        routed: bool = True,
        refine: RefineSettings | None = None,
        window_tokens: int | None = None,
    ) -> None:
        if adapter is not None and adapter.backbone is not backbone:
            raise ConfigError("the adapter is attached to another backbone", where="adapter")
        self.backbone = backbone
        self.adapter = adapter
        self.routed = routed
        self.refine = refine
        self._together: Matched | None = None  # scores beside the adapter
        if selector == "combined":
            check_combinable(adapter)
            # No depth weight: the adapter's scorer already weighs the layers.
            part_tokens = min(1024, backbone.context_window // 4)
            self._together = Matched(MatchSettings(part_tokens=part_tokens, depth_weight=0.0, fit=False))
            self.selector: Selector = self._together
        elif isinstance(selector, str):
            self.selector = make_selector(selector, context_window=backbone.context_window)
        else:
            self.selector = selector
        extra = 0 if adapter is not None and self._together is None else self.selector.extra_tokens
        extra = extra if refine is None else max(extra, refine.extra_tokens)
        room = backbone.context_window - len(backbone.prefix_ids)
        if room < 1:
            raise ConfigError(
                f"the prompt form's {len(backbone.prefix_ids):,} tokens before the document leave no room in a context "
                f"window of {backbone.context_window:,}",
                where="prompt",
                next_step="Use a shorter prompt form, or a model with a longer context window.",
            )
        most = room - extra
        if most < 1:  # a tiny context window: needs smaller parts, or a selector without requests
            raise ConfigError(
                f"selector {self.selector.name!r} needs {extra} tokens besides the document, too many for a context "
                f"window of {backbone.context_window}",
                where="selector",
                next_step="Use a selector that needs fewer tokens, e.g. Reconstruction(part_tokens=64) or `attention`.",
            )
        if window_tokens is not None and not 1 <= window_tokens <= most:
            raise ConfigError(
                f"window_tokens must be in the range 1 to {most:,} for this model, got {window_tokens}",
                where="window_tokens",
            )
        self.window_tokens = window_tokens or most
        self._adapter_sha256 = adapter.sha256 if adapter is not None else ""  # cached: it hashes megabytes

    def fingerprint(self, *, keep_spans: str = "") -> Fingerprint:
        """Fingerprint of the caches that this compressor makes."""
        window = f"window:{self.window_tokens}" + ("" if self.refine is None else f"|{self.refine.name}")
        matched = self.adapter is None and isinstance(self.selector, Matched)
        version = 1 if self.refine is None and not matched else 2  # version 2 has biases
        if self.adapter is None:
            return self.backbone.fingerprint(
                method=f"{self.selector.name}|{window}", keep_spans=keep_spans, format_version=version
            )
        together = "" if self._together is None else f"+{self._together.name}"
        return self.backbone.fingerprint(
            method=f"{'adapter' if self.routed else 'adapter_selection'}{together}|{window}",
            adapter=self._adapter_sha256,
            eta=self.adapter.config.eta,
            keep_spans=keep_spans,
            format_version=version,
        )

    def compress(
        self,
        text: str,
        *,
        keep_ratio: float,
        keep_spans: Sequence[Span] = (),
        unasked_spans: Sequence[Span] = (),
    ) -> DistilledCache:
        """Compress one document.

        Args:
            text: Document text without any wrapper; the prompt form's wrapper is added.
            keep_ratio: Share of the tokens to keep, in (0, 1]. At 1 nothing is selected and nothing is routed: the
                result is the document's plain cache.
            keep_spans: Character spans of `text` in which all tokens are kept; `keep_ratio` applies to the rest.
            unasked_spans: Character spans that refinement does not ask about, so that they can be measured afterwards.

        Raises:
            EmptyDocumentError: The text is blank.
            ConfigError: keep_ratio or a span is out of range.
        """
        return self._compress(text, None, keep_ratio, keep_spans, unasked_spans)

    @torch.no_grad()
    def prefill(self, text: str) -> PrefilledDocument:
        """Prefill one document to compress it at several ratios; work that does not depend on the ratio is done once.

        With an adapter everything depends on the ratio, and nothing is saved. Otherwise the result holds the
        document's full cache in memory.

        Args:
            text: Document text, as in `compress`.

        Raises:
            EmptyDocumentError: The text is blank.
        """
        ids = torch.tensor([self._encode(text)[0]], device=self.backbone.device)
        if self.adapter is not None:
            return PrefilledDocument(self, text, None)
        windows = windows_of(ids.shape[1], self.window_tokens)
        return PrefilledDocument(self, text, [self._read_window(ids[:, start:end]) for start, end in windows])

    def _compress(
        self,
        text: str,
        read: Sequence[_Prefilled] | None,
        keep_ratio: float,
        keep_spans: Sequence[Span],
        unasked_spans: Sequence[Span],
    ) -> DistilledCache:
        ids, offsets, n_before = self._encode(text)
        kept, unasked = (
            [(start + n_before, end + n_before) for start, end in _token_spans(offsets, spans, len(text), where)]
            for spans, where in ((keep_spans, "keep_spans"), (unasked_spans, "unasked_spans"))
        )
        return self._compress_ids(ids, read, keep_ratio, kept, unasked)

    def ratio_for(self, text: str, keep: float | Keep, *, keep_spans: Sequence[Span] = ()) -> float:
        """Compute the keep_ratio at which `compress` keeps a text within a budget.

        Args:
            text: Document text.
            keep: Budget; a keep_ratio is returned unchanged.
            keep_spans: Character spans as in `compress`; their tokens count towards the budget.

        Raises:
            BudgetError: The budget is too small for this text; the message names the smallest that works.
            EmptyDocumentError: The text is blank.
            ConfigError: A keep_ratio or a span is out of range.
        """
        if not isinstance(keep, Keep):
            return check_keep_ratio(keep)
        if keep.keep_ratio is not None:
            return keep.keep_ratio
        ids, offsets, n_before = self._encode(text)
        held = {
            i + n_before for span in _token_spans(offsets, keep_spans, len(text), "keep_spans") for i in range(*span)
        }
        n_held = [len(held & set(range(*window))) for window in windows_of(len(ids), self.window_tokens)]
        return keep.ratio_for(len(ids), self.fingerprint(), n_held=n_held)

    def _encode(self, text: str) -> tuple[list[int], list[Span], int]:
        """Token ids in the prompt form's wrapper, character offsets of the text's tokens, number of tokens before."""
        if not text.strip():
            raise EmptyDocumentError("the document is empty", next_step="Pass text with at least one word.")
        form = self.backbone.prompt
        before, after = self.backbone.encode(form.document_before), self.backbone.encode(form.document_after)
        ids, offsets = self.backbone.encode_with_offsets(text)
        return [*before, *ids, *after], list(offsets), len(before)

    @torch.no_grad()
    def compress_many(self, texts: Sequence[str], *, keep_ratio: float | Sequence[float]) -> list[DistilledCache]:
        """Compress several documents, as one batch where possible: a single passage does not fill a GPU.

        A batch takes documents of one window that are compressed without refinement by an adapter alone or by
        `matched` (for which they must also fit one part, see `MatchSettings`), with the same rotary frequencies. The
        others are compressed one by one. Texts of similar length waste the least. In a batch the same text may come
        out different in the last bits, because sums are added up in another order.

        Args:
            texts: Document texts, as in `compress`. A batch that does not fit in GPU memory is split into halves.
            keep_ratio: Share of the tokens to keep, as in `compress`: one for all texts, or one for each.

        Raises:
            EmptyDocumentError: A text is blank.
            ConfigError: keep_ratio is out of range.
        """
        given = keep_ratio if isinstance(keep_ratio, Sequence) else [keep_ratio] * len(texts)
        ratios = [check_keep_ratio(ratio) for ratio in given]
        rows = [self._encode(text)[0] for text in texts]
        made: dict[int, DistilledCache] = {}
        groups: dict[object, list[int]] = {}
        for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True)):
            if n_kept_for(len(ids), ratio) < len(ids) and (regime := self._regime(len(ids))) is not None:
                groups.setdefault(regime, []).append(i)
        for fit in groups.values():
            if len(fit) > 1:
                batch = self._compress_batch([rows[i] for i in fit], [ratios[i] for i in fit])
                made |= zip(fit, batch, strict=True)
        return [
            made[i] if i in made else self.compress_ids(ids, keep_ratio=ratio)
            for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True))
        ]

    def _regime(self, n_tokens: int) -> object | None:
        """Properties that documents of a batch must share; None for a document that is compressed alone."""
        n, regime = len(self.backbone.prefix_ids) + n_tokens, self.backbone.rope.regime
        if self.refine is not None or self._together is not None or n_tokens > self.window_tokens:
            return None
        if self.adapter is not None:
            return regime(n)
        if not isinstance(self.selector, Matched) or n_tokens > self.selector.settings.part_tokens:
            return None
        return regime(n) if regime(n) == regime(n + self.selector.extra_tokens) else None

    def _compress_batch(self, rows: list[list[int]], ratios: list[float]) -> list[DistilledCache]:
        method: BatchMethod
        if self.adapter is not None:
            method = partial(adapter_batch, self.adapter, routed=self.routed)
        else:
            assert isinstance(self.selector, Matched)
            method = partial(match_batch, self.backbone, self.selector)
        n_kept = [n_kept_for(len(ids), ratio) for ids, ratio in zip(rows, ratios, strict=True)]
        kept, fingerprint = in_halves(method, rows, n_kept, device=self.backbone.device), self.fingerprint()
        return [
            DistilledCache(**part._asdict(), n_tokens=len(ids), keep_ratio=ratio, fingerprint=fingerprint)
            for part, ids, ratio in zip(kept, rows, ratios, strict=True)
        ]

    def compress_ids(
        self,
        ids: Sequence[int],
        *,
        keep_ratio: float,
        keep_spans: Sequence[Span] = (),
        unasked_spans: Sequence[Span] = (),
    ) -> DistilledCache:
        """Compress a document given as token ids, with spans of tokens; see `compress`."""
        return self._compress_ids(ids, None, keep_ratio, keep_spans, unasked_spans)

    @torch.no_grad()
    def _compress_ids(
        self,
        ids: Sequence[int],
        read: Sequence[_Prefilled] | None,
        keep_ratio: float,
        keep_spans: Sequence[Span],
        unasked_spans: Sequence[Span],
    ) -> DistilledCache:
        keep_ratio = check_keep_ratio(keep_ratio)
        if not ids:
            raise EmptyDocumentError("the document has no tokens")
        tokens = torch.tensor([list(ids)], device=self.backbone.device)
        forced = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in keep_spans:
            if not 0 <= start < end <= len(ids):
                raise ConfigError(f"span ({start}, {end}) does not lie within {len(ids)} tokens", where="keep_spans")
            forced[start:end] = True
        windows = windows_of(len(ids), self.window_tokens)
        parts = [
            self._compress_window(
                tokens[:, start:end], None if read is None else read[i], keep_ratio, forced[start:end], offset=start
            )
            for i, (start, end) in enumerate(windows)
        ]
        steps: list[int] = []
        fidelities: list[float] = []  # of each window, times its tokens
        if self.refine is not None:
            for index, (start, end) in enumerate(windows):  # one at a time, as in prefill, to limit memory
                unasked = [(max(a, start) - start, min(b, end) - start) for a, b in unasked_spans]
                unasked = [(a, b) for a, b in unasked if a < b]
                cache = self._refine_window(
                    parts[index], ids[start:end], keep_ratio, forced[start:end], unasked, offset=start
                )
                parts[index] = parts[index]._replace(keys=cache.keys, values=cache.values, bias=cache.bias)
                steps.append(cache.refined_steps)
                fidelities += [] if cache.fidelity is None else [cache.fidelity * (end - start)]
        kept = join(parts)
        spans = repr(sorted(map(tuple, keep_spans))) if keep_spans else ""
        return DistilledCache(
            keys=kept.keys,
            values=kept.values,
            positions=kept.positions,
            counts=kept.counts,
            bias=kept.bias,
            n_tokens=len(ids),
            keep_ratio=keep_ratio,
            fingerprint=replace(
                self.fingerprint(), keep_spans=hashlib.sha256(spans.encode()).hexdigest() if spans else ""
            ),
            refined_steps=max(steps, default=0),
            fidelity=sum(fidelities) / len(ids) if len(fidelities) == len(windows) else None,
        )

    def _refine_window(
        self,
        kept: Kept,
        ids: Sequence[int],
        keep_ratio: float,
        forced: torch.Tensor,
        unasked: Sequence[Span],
        *,
        offset: int,
    ) -> DistilledCache:
        """Refine a window as a document of its own; entries held out of compression are not moved either."""
        cache = DistilledCache(
            keys=kept.keys,
            values=kept.values,
            positions=kept.positions - offset,
            counts=kept.counts,
            bias=kept.bias,
            n_tokens=len(ids),
            keep_ratio=keep_ratio,
            fingerprint=self.fingerprint(),
        )
        return refine_batch(self.backbone, [ids], [cache], settings=self.refine, fixed=[forced], unasked=[unasked])[0]

    def _compress_window(
        self, ids: torch.Tensor, read: _Prefilled | None, keep_ratio: float, forced: torch.Tensor, *, offset: int
    ) -> Kept:
        n_tokens, n_forced = ids.shape[1], int(forced.sum())
        n_kept = n_forced + (n_kept_for(n_tokens - n_forced, keep_ratio) if n_tokens > n_forced else 0)
        if n_kept == n_tokens:
            cache = self.backbone.prefixed_cache(n_tokens)
            self.backbone.prefill(ids, cache)
            selected = torch.ones(1, 1, n_tokens, dtype=torch.bool, device=ids.device)
            return extract(self.backbone, cache, selected, offset=offset)
        if self.adapter is not None:
            cache, selected = self._distil(ids, n_kept, forced)
            return extract(self.backbone, cache, selected, offset=offset)
        read = read or self._read_window(ids)
        if isinstance(read.scored, MatchedDocument):
            match = read.scored.match(n_kept=n_kept, forced=forced)
            return extract(self.backbone, read.cache, match.selected, offset=offset, match=match)
        lengths, most = torch.tensor([n_tokens]), torch.tensor([n_kept])
        selected = top_k_mask(read.scored, lengths, most, budget=self.selector.budget, forced=forced[None])[:, 0]
        return extract(self.backbone, read.cache, selected, offset=offset)

    def _read_window(self, ids: torch.Tensor) -> _Prefilled:
        """Prefill `(1, n_tokens)` once, and let the selector score."""
        n_tokens = ids.shape[1]
        cache = self.backbone.prefixed_cache(n_tokens, room=self.selector.extra_tokens)
        if isinstance(self.selector, Matched):
            self.backbone.prefill(ids, cache)
            return _Prefilled(cache, self.selector.documents(self.backbone, ids, cache)[0])
        watched = self.selector.watch(self.backbone, n_prefix=len(self.backbone.prefix_ids), n_tokens=n_tokens)
        self.backbone.prefill(ids, cache, context=ForwardContext(observer=watched))
        scores = self.selector.score(self.backbone, ids, cache, watched).to(ids.device)
        check_finite(self.backbone, scores)
        return _Prefilled(cache, (scores[None, None] if scores.ndim == 1 else scores)[:, None])

    def _distil(self, ids: torch.Tensor, n_kept: int, forced: torch.Tensor) -> tuple[PositionedCache, torch.Tensor]:
        """Prefill with the adapter, which scores, selects and routes."""
        assert self.adapter is not None
        reading = prefill_documents(
            self.adapter,
            ids,
            torch.tensor([ids.shape[1]], device=ids.device),
            torch.tensor([n_kept], device=ids.device),
            forced=forced[None].to(ids.device),
            routed=self.routed,
            room=0 if self._together is None else self._together.extra_tokens,
        )
        if self._together is None:
            return reading.cache, reading.selected[:, 0]
        selected = combined_selection(self.adapter, self._together, ids, reading, n_kept=n_kept, forced=forced)
        return reading.cache, selected[:, 0]


class _Prefilled(NamedTuple):
    """A prefilled window, before any entry is dropped.

    Attributes:
        cache: Cache of prefix and window.
        scored: Scores `(num_layers or 1, 1, num_kv_heads or 1, n_tokens)`; for `matched`, the document to match.
    """

    cache: PositionedCache
    scored: torch.Tensor | MatchedDocument


class PrefilledDocument:
    """A document prefilled and scored once, to be compressed at several ratios; made by `Compressor.prefill`."""

    def __init__(self, compressor: Compressor, text: str, windows: Sequence[_Prefilled] | None) -> None:
        self._compressor = compressor
        self._text = text
        self._windows = windows

    def keep(
        self, keep_ratio: float, *, keep_spans: Sequence[Span] = (), unasked_spans: Sequence[Span] = ()
    ) -> DistilledCache:
        """Return the cache that `Compressor.compress` makes of the text; arguments and errors are the same."""
        return self._compressor._compress(self._text, self._windows, keep_ratio, keep_spans, unasked_spans)


def _token_spans(offsets: Sequence[Span], spans: Sequence[Span], n_chars: int, where: str) -> list[Span]:
    """Token spans that touch the given character spans."""
    result = []
    for start, end in spans:
        if not 0 <= start < end <= n_chars:
            raise ConfigError(
                f"span ({start}, {end}) does not lie within the document's {n_chars} characters", where=where
            )
        touched = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
        if touched:
            result.append((touched[0], touched[-1] + 1))
    return result
