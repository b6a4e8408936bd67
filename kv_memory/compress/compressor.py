"""Compressor: a document in, a distilled cache out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep, windows_of
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.combined import combined_selector
from kv_memory.compress.kept import join
from kv_memory.compress.matching import Matched
from kv_memory.compress.refine.optimize import refine_batch
from kv_memory.compress.refine.refine_settings import RefineSettings
from kv_memory.compress.selectors import Selector, make_selector
from kv_memory.compress.windows import PrefilledWindow, Window, WindowCompressor
from kv_memory.config import SelectorName, check_keep_ratio, n_kept_for
from kv_memory.errors import ConfigError, EmptyDocumentError
from kv_memory.model.backbone import Backbone

Span = tuple[int, int]  # start and end, end excluded


class Compressor:
    """Prefills documents and keeps the entries that matter.

    With an adapter: score, select, and prefill with the adapter's tokens routed through the LoRA (KV-Distill, arXiv
    2503.10337). Without one: prefill, let a training-free selector score and select; `matched` also fits the kept
    entries. With an adapter's restore tokens: prefill, put them behind the document, and let `matched` select and fit
    entries of both.

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
            unknown, restore tokens come with another selector than `matched` or with refinement, or the context window
            is too small for the prompt form, the selector or `window_tokens`.
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
        if selector == "combined":
            self.selector: Selector = combined_selector(adapter)
        elif isinstance(selector, str):
            self.selector = make_selector(selector, context_window=backbone.context_window)
        else:
            self.selector = selector
        self._combined = selector == "combined"
        restores = adapter is not None and adapter.config.restore_tokens > 0
        if restores:
            self._check_restores()
        selects = self.selector if adapter is None or self._combined or restores else None
        self._windows = WindowCompressor(backbone, selects, adapter, routed=routed)
        extra = max(self._windows.extra_tokens, 0 if refine is None else refine.extra_tokens)
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
        self._adapter_sha256 = adapter.sha256 if adapter is not None else ""  # here, while loading: hashes megabytes

    def _check_restores(self) -> None:
        if not isinstance(self.selector, Matched) or not self.routed:
            raise ConfigError(
                "an adapter with restore tokens works only with selector 'matched' and its LoRA",
                where="selector",
                next_step="Omit the selector, or use an adapter with a scorer.",
            )
        if self.refine is not None:
            raise ConfigError(
                "the entries of restore tokens cannot be refined",
                where="refine",
                next_step="Omit the refinement, or the adapter.",
            )

    def fingerprint(self, *, keep_spans: str = "") -> Fingerprint:
        """Fingerprint of the caches that this compressor makes; `keep_spans` as in `Fingerprint`."""
        return replace(self._plain_fingerprint, keep_spans=keep_spans) if keep_spans else self._plain_fingerprint

    @cached_property  # its digest is cached with it
    def _plain_fingerprint(self) -> Fingerprint:
        method, biased, eta = self.selector.name, isinstance(self.selector, Matched), None
        if self.adapter is not None and self.adapter.config.restore_tokens:
            method = f"restore+{method}"
        elif self.adapter is not None:
            together = f"+{self.selector.name}" if self._combined else ""
            method, biased = f"{'adapter' if self.routed else 'adapter_selection'}{together}", False
            eta = self.adapter.config.eta
        refined = "" if self.refine is None else f"|{self.refine.name}"
        return self.backbone.fingerprint(
            method=f"{method}|window:{self.window_tokens}{refined}",
            adapter=self._adapter_sha256,
            eta=eta,
            format_version=2 if biased or self.refine is not None else 1,  # version 2 has biases
        )

    def compress(
        self, text: str, *, keep_ratio: float, keep_spans: Sequence[Span] = (), unasked_spans: Sequence[Span] = ()
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
        return self._encode(text).keep(keep_ratio, keep_spans=keep_spans, unasked_spans=unasked_spans)

    @torch.no_grad()
    def prefill(self, text: str) -> PrefilledDocument:
        """Prefill one document to compress it at several ratios; work that does not depend on the ratio is done once.

        With an adapter's scorer everything depends on the ratio, and nothing is saved. Otherwise the result holds the
        document's full cache in memory.

        Args:
            text: Document text, as in `compress`.

        Raises:
            EmptyDocumentError: The text is blank.
        """
        document = self._encode(text)
        if self.adapter is not None and not self.adapter.config.restore_tokens:
            return document
        windows = self._windows_of(document.ids, 1.0)
        return replace(document, windows=[self._windows.prefill([window]) for window in windows])

    def ratio_for(self, text: str, keep: float | Keep, *, keep_spans: Sequence[Span] = ()) -> float:
        """Compute the keep_ratio at which `compress` keeps a text within a budget.

        Args:
            text: Document text.
            keep: Budget; a keep_ratio is returned unchanged.
            keep_spans: Character spans as in `compress`; their tokens count towards the budget.

        Raises:
            ConfigError: The budget is too small for this text; the message names the smallest that works; A keep_ratio
                or a span is out of range.
            EmptyDocumentError: The text is blank.
        """
        if not isinstance(keep, Keep):
            return check_keep_ratio(keep)
        if keep.keep_ratio is not None:
            return keep.keep_ratio
        document = self._encode(text)
        windows = self._windows_of(document.ids, 1.0, document.spans(keep_spans, "keep_spans"))
        n_held = [int(window.forced.sum()) for window in windows]
        return keep.ratio_for(len(document.ids), self.fingerprint(), n_held=n_held)

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
        # 1. Documents that may share a batch, by their kind.
        given = keep_ratio if isinstance(keep_ratio, Sequence) else [keep_ratio] * len(texts)
        ratios = [check_keep_ratio(ratio) for ratio in given]
        rows = [self._encode(text).ids for text in texts]
        groups: dict[object, list[int]] = {}
        for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True)):
            whole = n_kept_for(len(ids), ratio) == len(ids) or len(ids) > self.window_tokens
            kind = None if whole or self.refine is not None else self._windows.batch_kind(len(ids))
            if kind is not None:
                groups.setdefault(kind, []).append(i)
        # 2. Batches, and the others one by one.
        made: dict[int, DistilledCache] = {}
        fingerprint = self.fingerprint()
        for group in groups.values():
            if len(group) > 1:
                windows = [self._windows_of(rows[i], ratios[i])[0] for i in group]
                made.update(zip(group, self._windows.compress(windows, fingerprint), strict=True))
        return [
            made[i] if i in made else self.compress_ids(ids, keep_ratio=ratio)
            for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True))
        ]

    @torch.no_grad()
    def compress_ids(
        self,
        ids: Sequence[int],
        *,
        keep_ratio: float,
        keep_spans: Sequence[Span] = (),
        unasked_spans: Sequence[Span] = (),
        prefilled: Sequence[PrefilledWindow] | None = None,
    ) -> DistilledCache:
        """Compress a document given as token ids, with spans of tokens; see `compress` and `prefill`."""
        keep_ratio = check_keep_ratio(keep_ratio)
        if not ids:
            raise EmptyDocumentError("the document has no tokens")
        # 1. Compress window by window.
        windows = self._windows_of(ids, keep_ratio, keep_spans)
        read: Sequence[PrefilledWindow | None] = prefilled or [None] * len(windows)
        spans = repr(sorted(map(tuple, keep_spans))) if keep_spans else ""
        fingerprint = self.fingerprint(keep_spans=hashlib.sha256(spans.encode()).hexdigest() if spans else "")
        parts = [
            self._windows.compress([window], fingerprint, own)[0] for window, own in zip(windows, read, strict=True)
        ]
        # 2. Refine each window as a document of its own, one at a time, as in prefill, to limit memory.
        start = 0
        for i, window in enumerate(windows if self.refine is not None else ()):
            unasked = [(max(a - start, 0), min(b - start, len(window.ids))) for a, b in unasked_spans]
            (parts[i],) = refine_batch(
                self.backbone,
                [window.ids],
                [parts[i]],
                settings=self.refine,
                fixed=[window.forced],  # entries held out of compression are not moved either
                unasked=[[(a, b) for a, b in unasked if a < b]],
            )
            start += len(window.ids)
        # 3. Join.
        fidelities = [part.fidelity * part.n_tokens for part in parts if part.fidelity is not None]
        return replace(
            parts[0] if len(parts) == 1 else join(parts),
            fingerprint=fingerprint,
            refined_steps=max(part.refined_steps for part in parts),
            fidelity=sum(fidelities) / len(ids) if len(fidelities) == len(parts) else None,
        )

    def _windows_of(self, ids: Sequence[int], keep_ratio: float, keep_spans: Sequence[Span] = ()) -> list[Window]:
        """Cut a document into windows; spans of tokens are kept in full, and the ratio applies to the rest."""
        forced = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in keep_spans:
            if not 0 <= start < end <= len(ids):
                raise ConfigError(f"span ({start}, {end}) does not lie within {len(ids)} tokens", where="keep_spans")
            forced[start:end] = True
        spans = windows_of(len(ids), self.window_tokens)
        return [Window(ids[start:end], forced[start:end], keep_ratio) for start, end in spans]

    def _encode(self, text: str) -> PrefilledDocument:
        """Encode a document in the prompt form's wrapper."""
        if not text.strip():
            raise EmptyDocumentError("the document is empty", next_step="Pass text with at least one word.")
        before, after = self.backbone.document_wrapper
        ids, offsets = self.backbone.encode_with_offsets(text)
        return PrefilledDocument(self, [*before, *ids, *after], offsets, len(before), len(text))


@dataclass(frozen=True, eq=False)
class PrefilledDocument:
    """A document as tokens, to be compressed at several ratios; `Compressor.prefill` also prefills and scores it."""

    compressor: Compressor
    ids: list[int]  # with the wrapper
    offsets: list[Span]  # span of characters of each token of the text
    n_before: int  # tokens before the text
    n_chars: int  # length of the text
    windows: Sequence[PrefilledWindow] | None = None  # None for windows to prefill at each ratio

    def spans(self, spans: Sequence[Span], where: str) -> list[Span]:
        """Spans of tokens that touch the given spans of characters."""
        result = []
        for start, end in spans:
            if not 0 <= start < end <= self.n_chars:
                raise ConfigError(
                    f"span ({start}, {end}) does not lie within the document's {self.n_chars} characters", where=where
                )
            touched = [i for i, (left, right) in enumerate(self.offsets, self.n_before) if left < end and right > start]
            if touched:
                result.append((touched[0], touched[-1] + 1))
        return result

    def keep(
        self, keep_ratio: float, *, keep_spans: Sequence[Span] = (), unasked_spans: Sequence[Span] = ()
    ) -> DistilledCache:
        """Return the cache that `Compressor.compress` makes of the text; arguments and errors are the same."""
        kept, unasked = self.spans(keep_spans, "keep_spans"), self.spans(unasked_spans, "unasked_spans")
        return self.compressor.compress_ids(
            self.ids, keep_ratio=keep_ratio, keep_spans=kept, unasked_spans=unasked, prefilled=self.windows
        )
