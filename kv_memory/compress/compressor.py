"""Compressor: a document in, a distilled cache out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from kv_memory.attention import ForwardContext, PositionedCache
from kv_memory.backbone import Backbone
from kv_memory.cache import DistilledCache
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.reading import read_documents
from kv_memory.compress.selectors import Selector, make_selector, select
from kv_memory.config import SelectorName, check_keep_ratio, n_kept_for
from kv_memory.errors import ConfigError, EmptyDocumentError
from kv_memory.fingerprint import Fingerprint

__all__ = ["Compressor", "Span"]

Span = tuple[int, int]  # start and end, end excluded


class Compressor:
    """Reads documents and keeps what matters of them.

    With an adapter: score, select, and read with the adapter's tokens routed through the LoRA (KV-Distill, arXiv
    2503.10337). Without one: read, let a training-free selector score, select.

    Args:
        backbone: The model that reads.
        selector: A training-free selector or its name. Not used with an adapter.
        adapter: Attached to the same backbone.
        routed: False uses the adapter's selection without its LoRA, to see what each is worth.
        window_tokens: Longest stretch read at once, in tokens; as much as the context window holds if None. Longer
            documents are read window by window behind the same prefix, and joined.

    Raises:
        ConfigError: The adapter belongs to another backbone, or the window is larger than the model's.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        selector: SelectorName | Selector = "reconstruction",
        adapter: Adapter | None = None,
        routed: bool = True,
        window_tokens: int | None = None,
    ) -> None:
        if adapter is not None and adapter.backbone is not backbone:
            raise ConfigError("the adapter is attached to another backbone", where="adapter")
        self.backbone = backbone
        self.adapter = adapter
        self.routed = routed
        self.selector: Selector = make_selector(selector) if isinstance(selector, str) else selector
        extra = 0 if adapter is not None else self.selector.extra_tokens
        most = backbone.context_window - len(backbone.prefix_ids) - extra
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
        window = f"window:{self.window_tokens}"
        if self.adapter is None:
            return self.backbone.fingerprint(method=f"{self.selector.name}|{window}", keep_spans=keep_spans)
        return self.backbone.fingerprint(
            method=f"{'adapter' if self.routed else 'adapter_selection'}|{window}",
            adapter=self._adapter_sha256,
            eta=self.adapter.config.eta,
            keep_spans=keep_spans,
        )

    def compress(self, text: str, *, keep_ratio: float, keep_spans: Sequence[Span] = ()) -> DistilledCache:
        """Distil one document.

        Args:
            text: The document, without any wrapper; the prompt form's own is put around it.
            keep_ratio: Share of the tokens to keep, in (0, 1]. At 1 nothing is selected and nothing routed: the
                result is the document's plain cache.
            keep_spans: Character spans of `text` whose tokens are all kept; `keep_ratio` applies to the rest.

        Raises:
            EmptyDocumentError: The text is blank.
            ConfigError: keep_ratio or a span is out of range.
        """
        if not text.strip():
            raise EmptyDocumentError("the document is empty", next_step="Pass text that holds at least one word.")
        form = self.backbone.prompt
        before, after = self.backbone.encode(form.document_before), self.backbone.encode(form.document_after)
        ids, offsets = self.backbone.encode_with_offsets(text)
        spans = _token_spans(offsets, keep_spans, len(text))
        shifted = [(start + len(before), end + len(before)) for start, end in spans]
        return self.compress_ids([*before, *ids, *after], keep_ratio=keep_ratio, keep_spans=shifted)

    @torch.no_grad()
    def compress_ids(self, ids: Sequence[int], *, keep_ratio: float, keep_spans: Sequence[Span] = ()) -> DistilledCache:
        """Distil a document given as token ids; `keep_spans` are spans of tokens. See `compress`."""
        keep_ratio = check_keep_ratio(keep_ratio)
        if not ids:
            raise EmptyDocumentError("the document has no tokens")
        tokens = torch.tensor([list(ids)], device=self.backbone.device)
        forced = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in keep_spans:
            if not 0 <= start < end <= len(ids):
                raise ConfigError(f"span ({start}, {end}) does not lie within {len(ids)} tokens", where="keep_spans")
            forced[start:end] = True
        parts = [
            self._compress_window(tokens[:, start:end], keep_ratio, forced[start:end], offset=start)
            for start, end in _windows(len(ids), self.window_tokens)
        ]
        keys = torch.cat([part[0] for part in parts], dim=2)
        values = torch.cat([part[1] for part in parts], dim=2)
        rows = [part[2] for part in parts]
        if any(row.ndim == 3 for row in rows):  # a window held out of compression keeps the same row for all heads
            rows = [row.expand(*keys.shape[:2], -1) for row in rows]
        positions = torch.cat(rows, dim=-1)
        spans = repr(sorted(map(tuple, keep_spans))) if keep_spans else ""
        return DistilledCache(
            keys=keys,
            values=values,
            positions=positions,
            n_tokens=len(ids),
            keep_ratio=keep_ratio,
            fingerprint=replace(
                self.fingerprint(), keep_spans=hashlib.sha256(spans.encode()).hexdigest() if spans else ""
            ),
        )

    def _compress_window(
        self, ids: torch.Tensor, keep_ratio: float, forced: torch.Tensor, *, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n_tokens, n_forced = ids.shape[1], int(forced.sum())
        n_kept = n_forced + (n_kept_for(n_tokens - n_forced, keep_ratio) if n_tokens > n_forced else 0)
        if n_kept == n_tokens:
            cache = self.backbone.prefixed_cache(n_tokens)
            self.backbone.read(ids, cache)
            positions = torch.arange(n_tokens, device=ids.device)
        elif self.adapter is not None:
            cache, positions = self._distil(ids, n_kept, forced)
        else:
            cache, positions = self._pick(ids, n_kept, forced)
        keys, values = self._extract(cache, positions, n_tokens)
        return keys, values, (positions + offset).to(torch.int32)

    def _pick(self, ids: torch.Tensor, n_kept: int, forced: torch.Tensor) -> tuple[PositionedCache, torch.Tensor]:
        """Read the document once and let the selector choose."""
        n_tokens = ids.shape[1]
        cache = self.backbone.prefixed_cache(n_tokens, room=self.selector.extra_tokens)
        watched = self.selector.watch(self.backbone, n_prefix=len(self.backbone.prefix_ids), n_tokens=n_tokens)
        self.backbone.read(ids, cache, context=ForwardContext(observer=watched))
        scores = self.selector.score(self.backbone, ids, cache, watched)
        return cache, select(scores, n_kept, forced=forced).to(ids.device)

    def _distil(self, ids: torch.Tensor, n_kept: int, forced: torch.Tensor) -> tuple[PositionedCache, torch.Tensor]:
        """Read with the adapter, which scores, selects and routes."""
        assert self.adapter is not None
        n = torch.tensor([ids.shape[1]], device=ids.device)
        reading = read_documents(
            self.adapter,
            ids,
            n,
            torch.tensor([n_kept], device=ids.device),
            forced=forced[None].to(ids.device),
            routed=self.routed,
        )
        positions = reading.positions[:, 0]
        # The paper's form keeps the same tokens everywhere: one row says it.
        return reading.cache, positions[0, 0] if self.adapter.config.scorer == "token" else positions

    def _extract(
        self, cache: PositionedCache, positions: torch.Tensor, n_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept keys, positions taken off, and values: `(num_layers, num_kv_heads, n_kept, head_dim)` each."""
        n_prefix = len(self.backbone.prefix_ids)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for index in range(self.backbone.num_layers):
            here = positions if positions.ndim == 1 else positions[index]
            for kept, tensor in zip((keys, values), cache.layer(index), strict=True):
                document = tensor[0, :, n_prefix : n_prefix + n_tokens]
                rows = here.expand(document.shape[0], -1)[..., None].expand(-1, -1, document.shape[-1])
                kept.append(document.gather(1, rows))
        free = self.backbone.rope.take_off(torch.stack(keys), positions + n_prefix, n_positions=cache.n_positions)
        return free.to(self.backbone.dtype), torch.stack(values)


def _windows(n_tokens: int, window: int) -> list[Span]:
    """Cut `n_tokens` into the fewest windows, of nearly equal length: a short last one would lack context."""
    n_windows = -(-n_tokens // window)
    edges = [round(i * n_tokens / n_windows) for i in range(n_windows + 1)]
    return list(pairwise(edges))


def _token_spans(offsets: Sequence[Span], spans: Sequence[Span], n_chars: int) -> list[Span]:
    """Spans of tokens that touch the given spans of characters."""
    result = []
    for start, end in spans:
        if not 0 <= start < end <= n_chars:
            raise ConfigError(
                f"span ({start}, {end}) does not lie within the document's {n_chars} characters", where="keep_spans"
            )
        touched = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
        if touched:
            result.append((touched[0], touched[-1] + 1))
    return result
