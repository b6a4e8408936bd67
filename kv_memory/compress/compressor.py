"""Compressor: a document in, a distilled cache out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from kv_memory.attention import ForwardContext
from kv_memory.backbone import Backbone
from kv_memory.cache import DistilledCache
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.combined import check_combinable, combined_selection
from kv_memory.compress.matching import Matched, MatchSettings
from kv_memory.compress.reading import check_finite, choose, read_documents
from kv_memory.compress.refine import refine_batch
from kv_memory.compress.refine_settings import RefineSettings
from kv_memory.compress.selectors import Selector, make_selector
from kv_memory.config import SelectorName, check_keep_ratio, n_kept_for
from kv_memory.errors import ConfigError, EmptyDocumentError
from kv_memory.fingerprint import Fingerprint
from kv_memory.keep import Keep, windows_of
from kv_memory.positioned import PositionedCache

__all__ = ["Compressor", "Span"]

Span = tuple[int, int]  # start and end, end excluded


class Compressor:
    """Reads documents and keeps what matters of them.

    With an adapter: score, select, and read with the adapter's tokens routed through the LoRA (KV-Distill, arXiv
    2503.10337). Without one: read, let a training-free selector score, select, and with `matched` fit what is kept.

    Args:
        backbone: The model that reads.
        selector: A training-free selector or its name. Not used with an adapter, but for `combined`: the adapter and
            the change of the output choose together, and a document is read twice.
        adapter: Attached to the same backbone.
        routed: False uses the adapter's selection without its LoRA, to see what each is worth.
        refine: How the kept entries of each document are refined (see `refine_batch`), offline and for as long as a
            few dozen to a few hundred prefills; None to keep them as they were read.
        window_tokens: Longest stretch read at once, in tokens; as much as the context window holds if None. Longer
            documents are read window by window behind the same prefix, and joined.

    Raises:
        ConfigError: The adapter belongs to another backbone, or `combined` needs another one; or the window is larger
            than the model's.
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
        self._together: Matched | None = None  # has a say beside the adapter
        if selector == "combined":
            check_combinable(adapter)
            self._together = Matched(MatchSettings(part_tokens=min(1024, backbone.context_window // 4), fit=False))
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
                f"the prompt form's {len(backbone.prefix_ids):,} tokens before the document leave nothing of a context "
                f"window of {backbone.context_window:,}",
                where="prompt",
                next_step="Use a shorter prompt form, or a model with a longer context window.",
            )
        most = room - extra
        if most < 1:  # a tiny context window: ask in smaller parts, or not at all
            raise ConfigError(
                f"selector {self.selector.name!r} needs {extra} tokens of a context window of "
                f"{backbone.context_window}",
                where="selector",
                next_step="Use a selector that asks less, e.g. Reconstruction(part_tokens=64) or `attention`.",
            )
        if window_tokens is not None and not 1 <= window_tokens <= most:
            raise ConfigError(
                f"window_tokens must lie in 1 to {most:,} for this model, got {window_tokens}", where="window_tokens"
            )
        self.window_tokens = window_tokens or most
        self._adapter_sha256 = adapter.sha256 if adapter is not None else ""  # hashing megabytes: once

    def fingerprint(self, *, keep_spans: str = "") -> Fingerprint:
        """The fingerprint of the caches this compressor makes."""
        window = f"window:{self.window_tokens}" + ("" if self.refine is None else f"|{self.refine.name}")
        matched = self.adapter is None and isinstance(self.selector, Matched)
        version = 1 if self.refine is None and not matched else 2  # with biases
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
        """Distil one document.

        Args:
            text: The document, without any wrapper; the prompt form's own is put around it.
            keep_ratio: Share of the tokens to keep, in (0, 1]. At 1 nothing is selected and nothing routed: the
                result is the document's plain cache.
            keep_spans: Character spans of `text` whose tokens are all kept; `keep_ratio` applies to the rest.
            unasked_spans: Character spans that refinement does not ask about, for measurements on them afterwards.

        Raises:
            EmptyDocumentError: The text is blank.
            ConfigError: keep_ratio or a span is out of range.
        """
        ids, offsets, n_before = self._encode(text)
        kept, unasked = (
            [(start + n_before, end + n_before) for start, end in _token_spans(offsets, spans, len(text), where)]
            for spans, where in ((keep_spans, "keep_spans"), (unasked_spans, "unasked_spans"))
        )
        return self.compress_ids(ids, keep_ratio=keep_ratio, keep_spans=kept, unasked_spans=unasked)

    def ratio_for(self, text: str, keep: float | Keep, *, keep_spans: Sequence[Span] = ()) -> float:
        """The keep_ratio at which `compress` keeps a text within a budget.

        Args:
            text: The document.
            keep: A budget; a keep_ratio is returned as it is.
            keep_spans: As in `compress`; what they hold counts too.

        Raises:
            BudgetError: The budget is too small for this text; names the smallest that works.
            EmptyDocumentError: The text is blank.
            ConfigError: A span is out of range.
        """
        if not isinstance(keep, Keep):
            return check_keep_ratio(keep)
        ids, offsets, n_before = self._encode(text)
        held = {
            i + n_before for span in _token_spans(offsets, keep_spans, len(text), "keep_spans") for i in range(*span)
        }
        n_held = [len(held & set(range(*window))) for window in windows_of(len(ids), self.window_tokens)]
        return keep.ratio_for(len(ids), self.fingerprint(), n_held=n_held)

    def _encode(self, text: str) -> tuple[list[int], list[Span], int]:
        """Token ids with the prompt form's own around them; the text's offsets; how many tokens stand before it."""
        if not text.strip():
            raise EmptyDocumentError("the document is empty", next_step="Pass text that holds at least one word.")
        form = self.backbone.prompt
        before, after = self.backbone.encode(form.document_before), self.backbone.encode(form.document_after)
        ids, offsets = self.backbone.encode_with_offsets(text)
        return [*before, *ids, *after], list(offsets), len(before)

    @torch.no_grad()
    def compress_many(self, texts: Sequence[str], *, keep_ratio: float | Sequence[float]) -> list[DistilledCache]:
        """Distil several documents, as one batch where that can be done: for GPUs, which one passage does not fill.

        Batched are documents of one window that an adapter alone reads, without refinement, with the same rotary
        frequencies; the others are compressed one by one. Texts of like length waste the least. In a batch the same
        text may come out different in the last bits, because sums are added up in another order.

        Args:
            texts: The documents, as in `compress`. Where memory does not hold them together, in halves.
            keep_ratio: As in `compress`, for all of them or one for each.

        Raises:
            EmptyDocumentError: A text is blank.
            ConfigError: keep_ratio is out of range.
        """
        given = keep_ratio if isinstance(keep_ratio, Sequence) else [keep_ratio] * len(texts)
        ratios = [check_keep_ratio(ratio) for ratio in given]
        rows = [self._encode(text)[0] for text in texts]
        made: dict[int, DistilledCache] = {}
        if self.adapter is not None and self.refine is None and self._together is None:
            n_prefix, groups = len(self.backbone.prefix_ids), dict[object, list[int]]()
            for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True)):
                if n_kept_for(len(ids), ratio) < len(ids) <= self.window_tokens:
                    groups.setdefault(self.backbone.rope.regime(n_prefix + len(ids)), []).append(i)
            for fit in groups.values():
                if len(fit) > 1:
                    batch = self._compress_batch([rows[i] for i in fit], [ratios[i] for i in fit])
                    made |= zip(fit, batch, strict=True)
        return [
            made[i] if i in made else self.compress_ids(ids, keep_ratio=ratio)
            for i, (ids, ratio) in enumerate(zip(rows, ratios, strict=True))
        ]

    def _compress_batch(self, rows: list[list[int]], ratios: list[float]) -> list[DistilledCache]:
        assert self.adapter is not None
        device = self.backbone.device
        lengths = torch.tensor([len(ids) for ids in rows])
        n_kept = torch.tensor([n_kept_for(len(ids), ratio) for ids, ratio in zip(rows, ratios, strict=True)])
        padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        try:
            reading = read_documents(
                self.adapter, padded.to(device), lengths.to(device), n_kept.to(device), routed=self.routed
            )
            kept = [
                self._extract(reading.cache, reading.selected[:, row, :, : len(ids)], row=row, offset=0)
                for row, ids in enumerate(rows)
            ]
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            kept = []
        if not kept:  # outside of the handler: its traceback holds what is to be freed
            half = len(rows) // 2
            halves = (rows[:half], ratios[:half]), (rows[half:], ratios[half:])
            return [made for part in halves for made in self._compress_batch(*part)]
        fingerprint = self.fingerprint()
        return [
            DistilledCache(
                keys=part.keys,
                values=part.values,
                positions=part.positions,
                counts=part.counts,
                n_tokens=len(ids),
                keep_ratio=ratio,
                fingerprint=fingerprint,
            )
            for part, ids, ratio in zip(kept, rows, ratios, strict=True)
        ]

    @torch.no_grad()
    def compress_ids(
        self,
        ids: Sequence[int],
        *,
        keep_ratio: float,
        keep_spans: Sequence[Span] = (),
        unasked_spans: Sequence[Span] = (),
    ) -> DistilledCache:
        """Distil a document given as token ids; spans are of tokens. See `compress`."""
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
            self._compress_window(tokens[:, start:end], keep_ratio, forced[start:end], offset=start)
            for start, end in windows
        ]
        steps: list[int] = []
        fidelities: list[float] = []  # times tokens
        if self.refine is not None:
            for index, (start, end) in enumerate(windows):  # apart, as they were read: one at a time holds memory down
                unasked = [(max(a, start) - start, min(b, end) - start) for a, b in unasked_spans]
                unasked = [(a, b) for a, b in unasked if a < b]
                cache = self._refine_window(
                    parts[index], ids[start:end], keep_ratio, forced[start:end], unasked, offset=start
                )
                parts[index] = parts[index]._replace(keys=cache.keys, values=cache.values, bias=cache.bias)
                steps.append(cache.refined_steps)
                fidelities += [] if cache.fidelity is None else [cache.fidelity * (end - start)]
        kept = _join(parts)
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
        kept: _Kept,
        ids: Sequence[int],
        keep_ratio: float,
        forced: torch.Tensor,
        unasked: Sequence[Span],
        *,
        offset: int,
    ) -> DistilledCache:
        """A window as a document of its own, refined. What is held out of compression is not moved either."""
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

    def _compress_window(self, ids: torch.Tensor, keep_ratio: float, forced: torch.Tensor, *, offset: int) -> _Kept:
        n_tokens, n_forced = ids.shape[1], int(forced.sum())
        n_kept = n_forced + (n_kept_for(n_tokens - n_forced, keep_ratio) if n_tokens > n_forced else 0)
        if n_kept == n_tokens:
            cache = self.backbone.prefixed_cache(n_tokens)
            self.backbone.read(ids, cache)
            selected = torch.ones(1, 1, n_tokens, dtype=torch.bool, device=ids.device)
        elif self.adapter is None and isinstance(self.selector, Matched):
            cache = self.backbone.prefixed_cache(n_tokens, room=self.selector.extra_tokens)
            self.backbone.read(ids, cache)
            match = self.selector.match(self.backbone, ids, cache, n_kept=n_kept, forced=forced)
            kept = self._extract(cache, match.selected, offset=offset)
            return kept._replace(
                values=match.values.to(kept.values).view_as(kept.values),
                bias=match.bias.to(torch.float16).view(kept.keys.shape[:-1]),
            )
        elif self.adapter is not None:
            cache, selected = self._distil(ids, n_kept, forced)
        else:
            cache, selected = self._pick(ids, n_kept, forced)
        return self._extract(cache, selected, offset=offset)

    def _pick(self, ids: torch.Tensor, n_kept: int, forced: torch.Tensor) -> tuple[PositionedCache, torch.Tensor]:
        """Read the document once and let the selector choose."""
        n_tokens = ids.shape[1]
        cache = self.backbone.prefixed_cache(n_tokens, room=self.selector.extra_tokens)
        watched = self.selector.watch(self.backbone, n_prefix=len(self.backbone.prefix_ids), n_tokens=n_tokens)
        self.backbone.read(ids, cache, context=ForwardContext(observer=watched))
        scores = self.selector.score(self.backbone, ids, cache, watched).to(ids.device)
        check_finite(self.backbone, scores)
        scores = scores[None, None] if scores.ndim == 1 else scores
        lengths, most = torch.tensor([n_tokens]), torch.tensor([n_kept])
        selected = choose(scores[:, None], lengths, most, budget=self.selector.budget, forced=forced[None])
        return cache, selected[:, 0]

    def _distil(self, ids: torch.Tensor, n_kept: int, forced: torch.Tensor) -> tuple[PositionedCache, torch.Tensor]:
        """Read with the adapter, which scores, selects and routes."""
        assert self.adapter is not None
        reading = read_documents(
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

    def _extract(self, cache: PositionedCache, selected: torch.Tensor, *, row: int = 0, offset: int) -> _Kept:
        """The selected entries, positions taken off their keys.

        Args:
            cache: Prefix and window, as read.
            selected: Bool `(num_layers or 1, num_kv_heads or 1, n_tokens)`.
            row: Of the cache's batch.
            offset: Of the window inside the document.
        """
        backbone, n_prefix, n_tokens = self.backbone, len(self.backbone.prefix_ids), selected.shape[-1]
        mask = selected.expand(backbone.num_layers, backbone.num_kv_heads, -1)
        counts = mask.sum(-1)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for index in range(backbone.num_layers):
            for kept, tensor in zip((keys, values), cache.layer(index), strict=True):
                kept.append(tensor[row, :, n_prefix : n_prefix + n_tokens][mask[index]])  # head by head
        check_finite(backbone, *keys, *values)
        inside = torch.arange(n_tokens, device=mask.device).expand_as(mask)[mask]
        per_layer = counts.sum(1).tolist()
        free = backbone.rope.take_off_flat(torch.cat(keys), inside + n_prefix, per_layer, n_positions=cache.n_positions)
        free, flat_values = free.to(backbone.dtype), torch.cat(values)
        positions = (inside + offset).to(torch.int32)
        if int(counts.min()) != int(counts.max()):
            return _Kept(free, flat_values, positions, counts)
        shape = (backbone.num_layers, backbone.num_kv_heads, int(counts[0, 0]))
        shared = selected.shape[0] == selected.shape[1] == 1
        rows = positions.view(shape)[0, 0] if shared else positions.view(shape)
        return _Kept(free.view(*shape, -1), flat_values.view(*shape, -1), rows, None)


class _Kept(NamedTuple):
    """What is kept of a window, in either form of `DistilledCache`."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor | None
    bias: torch.Tensor | None = None


def _join(parts: Sequence[_Kept]) -> _Kept:
    """Windows one behind the other, in every head."""
    if len(parts) == 1:
        return parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        parts = [part if part.bias is not None else _unbiased(part) for part in parts]
        sizes = [_counts(part).flatten().tolist() for part in parts]
        of_heads = [part.bias.flatten().split(n) for part, n in zip(parts, sizes, strict=True) if part.bias is not None]
        bias = torch.cat([piece for of_head in zip(*of_heads, strict=True) for piece in of_head])
    if all(part.counts is None for part in parts):
        rows = [part.positions for part in parts]
        if any(row.ndim == 3 for row in rows):  # a window held out of compression keeps the same row for all heads
            rows = [row.expand(*parts[0].keys.shape[:2], -1) for row in rows]
        keys, values = torch.cat([part.keys for part in parts], 2), torch.cat([part.values for part in parts], 2)
        return _Kept(keys, values, torch.cat(rows, -1), None, None if bias is None else bias.view(keys.shape[:-1]))
    split = [_by_head(part) for part in parts]
    heads = [[torch.cat(pieces) for pieces in zip(*of_head, strict=True)] for of_head in zip(*split, strict=True)]
    flat = [torch.cat(column) for column in zip(*heads, strict=True)]
    counts = torch.stack([_counts(part) for part in parts]).sum(0)
    return _Kept(flat[0], flat[1], flat[2], counts, bias)


def _unbiased(part: _Kept) -> _Kept:
    return part._replace(bias=part.keys.new_zeros(part.keys.shape[:-1], dtype=torch.float16))


def _counts(part: _Kept) -> torch.Tensor:
    if part.counts is not None:
        return part.counts
    return torch.full(part.keys.shape[:2], part.keys.shape[2], device=part.keys.device)


def _by_head(part: _Kept) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys, values and positions of every head, layer by layer."""
    sizes = _counts(part).flatten().tolist()
    if part.counts is not None:
        keys, values, positions = part.keys, part.values, part.positions
    else:
        keys, values = part.keys.flatten(0, 2), part.values.flatten(0, 2)
        positions = part.positions.expand(part.keys.shape[:3]).flatten()
    return list(zip(keys.split(sizes), values.split(sizes), positions.split(sizes), strict=True))


def _token_spans(offsets: Sequence[Span], spans: Sequence[Span], n_chars: int, where: str) -> list[Span]:
    """Spans of tokens that touch the given spans of characters."""
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
