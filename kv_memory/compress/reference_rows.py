"""Reference rows: queries of the model while it repeats a document and answers questions about no document.

A compressor that fits entries needs queries to fit them to. The real ones are unknown when a document is compressed,
so a pass behind the document replaces them. It consists of requests: one to repeat the document (as in KVzip, arXiv
2505.23416), with queries that look for every token once, and short questions with answers, with queries that look for
what answers are made of. The very questions asked later did not serve better than these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kv_memory.compress.kept import pad
from kv_memory.compress.refine.batching import gather_entries
from kv_memory.model.attention import AttentionKind, ForwardContext, soft_capped
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

REPEAT = "\n\nRepeat the previous text exactly.\n"
REPEAT_FROM = "\n\nRepeat the previous text exactly, from here on: "
_REQUEST_TOKENS, _CUE_TOKENS = 48, 8
EXTRA_TOKENS = _REQUEST_TOKENS + _CUE_TOKENS  # most tokens before a part that the model is asked to repeat
QUESTION_TOKENS = 64  # most tokens of a question with its wrapper and its answer
_QUESTIONS = (
    ("Who built the tower?", "Jan Novak"),
    ("When did the war begin?", "in 1914"),
    ("How many people live there?", "about 40,000"),
    ("Where was it first used?", "in northern Italy"),
    ("What is the main cause?", "a lack of rain"),
    ("Why did they leave?", "because of the storm"),
    ("Which company made it?", "Siemens"),
    ("What is the name of the river?", "the Danube"),
)
_COPIED_ENTRIES = 4096  # of each document's cache at once, for questions run side by side
_RECORDED = 4096  # most document tokens with a recorded query, per head: memory stays that of a prefill
_BLOCK = 256  # queries with their attention to their own request in memory at once


@dataclass(frozen=True, eq=False)
class ReferenceRows:
    """Recorded queries of one layer behind a document."""

    query: torch.Tensor  # `(num_heads, m, head_dim)`, rotated, in the model's dtype
    own: torch.Tensor  # `(num_heads, m)`, float32, logsumexp of each query's logits over the keys of its own request
    positions: torch.Tensor  # `(num_heads, m)`
    scale: torch.Tensor  # `(num_heads, m)`, float32, 1 over the norm of the hidden state that enters the layer
    kind: AttentionKind  # rule of the layer; layers may differ in their windows

    @staticmethod
    def merged(
        several: Sequence[ReferenceRows], merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    ) -> ReferenceRows:
        """Make one of several rows of the same kind; `merge` gets each of their tensors in turn."""
        names = ("query", "own", "positions", "scale")
        return ReferenceRows(**{n: merge([getattr(r, n) for r in several]) for n in names}, kind=several[0].kind)

    def logits(self, keys: torch.Tensor, where: torch.Tensor, rows: slice) -> torch.Tensor:
        """Attention logits towards document keys, `(query heads, rows, n)`, float32; -inf behind a sliding window.

        Args:
            keys: Keys, float32, rotated: `(n, head_dim)` of one KV head, or `(query heads, n, head_dim)`.
            where: Positions of the keys, `(n,)` or `(query heads, n)`.
            rows: Range of queries.
        """
        logits = soft_capped((self.query[:, rows].float() * self.kind.scaling) @ keys.mT, self.kind.softcap)
        if self.kind.window is not None:
            logits.masked_fill_(where[..., None, :] <= self.positions[:, rows, None] - self.kind.window, -torch.inf)
        return logits


def repeat_rows(backbone: Backbone, ids: torch.Tensor, part_tokens: int) -> Iterator[list[int]]:
    """Yield requests to repeat a document `(1, n)` part by part, each with the part it requests."""
    for start in range(0, ids.shape[1], part_tokens):
        request = backbone.encode(REPEAT if start == 0 else REPEAT_FROM)[:_REQUEST_TOKENS]
        cue = ids[0, max(0, start - _CUE_TOKENS) : start].tolist()
        yield [*request, *cue, *ids[0, start : start + part_tokens].tolist()]


@torch.no_grad()
def record_rows(
    backbone: Backbone, documents: Sequence[torch.Tensor], cache: PositionedCache, *, part_tokens: int
) -> list[list[ReferenceRows]]:
    """Run the reference rows behind each document of a batch: the rows of each layer, for each document.

    Args:
        backbone: The model.
        documents: Token ids of each document, `(n_tokens,)`. Several documents must be short: each is repeated in one
            part, and its requests get the rotary frequencies of its prefill.
        cache: Cache of prefix and documents, as prefilled, with room for a part and its request. It is restored
            afterwards, except for the frequencies of a rope that depends on the length.
        part_tokens: Length of the repeated parts, in tokens.
    """
    # 1. Requests: some questions side by side, on copies of a short document's cache; parts of the document one by one.
    recorder = _Recorder(backbone, step=-(-max(map(len, documents)) // _RECORDED))
    questions = [(backbone.encode_question(q) + backbone.encode(f" {a}"))[-QUESTION_TOKENS:] for q, a in _QUESTIONS]
    at_once = max(1, _COPIED_ENTRIES // cache.layer(0)[0].shape[2])
    parts = [list(repeat_rows(backbone, ids[None], part_tokens)) for ids in documents]
    # 2. Run them and record queries.
    n_positions = [
        recorder.ask([questions[start : start + at_once]] * len(documents), cache)
        for start in range(0, len(questions), at_once)
    ]
    n_positions += [recorder.ask([[row] for row in rows], cache) for rows in zip(*parts, strict=True)]
    # 3. Rows of each document, with the same rotary frequencies for all of them.
    found = [recorder.layers(document) for document in range(len(documents))]
    if backbone.rope.varies and len({backbone.rope.regime(n) for n in n_positions}) > 1:
        found = [
            _in_one_regime(backbone, layers, [sizes[i] for sizes in recorder.sizes], n_positions, cache.n_positions)
            for i, layers in enumerate(found)
        ]
    return found


class _Recorder:
    """Records queries while requests are prefilled behind several documents; an `AttentionObserver`."""

    def __init__(self, backbone: Backbone, *, step: int) -> None:
        self._backbone = backbone
        self._step = step  # heads record every `step`-th token, with different offsets, to cover all
        self._parts: list[list[ReferenceRows]] = [[] for _ in range(backbone.num_layers)]  # by layer and pass
        self._real = torch.empty(0, 0, dtype=torch.bool)  # (rows, n), for the current pass
        self._positions = torch.empty(0)  # (real tokens,)
        self._picked = torch.empty(0)  # (num_heads, recorded), indices of real tokens
        self._scales: dict[int, torch.Tensor] = {}
        self.sizes: list[list[int]] = []  # by pass: queries of a head behind each document

    def layers(self, document: int) -> list[ReferenceRows]:
        """Rows of each layer recorded behind one document."""
        ends = [sum(sizes[: document + 1]) for sizes in self.sizes]
        spans = [slice(end - sizes[document], end) for end, sizes in zip(ends, self.sizes, strict=True)]

        def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([tensor[:, own] for tensor, own in zip(tensors, spans, strict=True)], 1)

        return [ReferenceRows.merged(parts, joined) for parts in self._parts]

    def ask(self, rows: Sequence[Sequence[Sequence[int]]], cache: PositionedCache) -> int:
        """Prefill rows of tokens behind each document, equally many; return the length of their longest sequence."""
        # 1. Real tokens of all rows, and their positions.
        ids, lengths = pad([row for own in rows for row in own], device=self._backbone.device)
        many, device, before = len(rows[0]), ids.device, cache.next_positions
        places = torch.arange(ids.shape[1], device=device)
        self._real = places < lengths[:, None]
        self._positions = (before.repeat_interleave(many)[:, None] + places)[self._real]
        # 2. Tokens to record: indices of real tokens, for each head.
        self.sizes.append([])
        heads, picked, start = torch.arange(self._backbone.num_heads, device=device), [], 0
        for own in rows:
            n = sum(map(len, own))
            first = torch.arange(start, start + n - self._step + 1, self._step, device=device)  # as many for each head
            picked.append(first + heads[:, None] % self._step)
            self.sizes[-1].append(len(first))
            start += n
        self._picked = torch.cat(picked, 1)
        # 3. Prefill, on copies if a document has several rows. Hooks record 1 / r of the states that enter each layer.
        behind, ragged = cache, lengths if len(ids) > 1 else None
        if many > 1:
            entries = gather_entries(self._backbone, cache)
            behind = entries.cache(torch.arange(len(rows), device=device).repeat_interleave(many))
        with self._backbone.lock, ExitStack() as hooks:  # locked: hooks would also see other threads' passes
            for index, module in enumerate(self._backbone.layers):
                note = partial(self._note, index)
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            self._backbone.prefill(ids, behind, lengths=ragged, context=ForwardContext(observer=self))
        if many == 1:
            cache.rewind(ids.shape[1])
            cache.next_positions = before  # `rewind` assumes rows of equal length
        return behind.n_positions

    def _note(self, layer: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._scales[layer] = 1 / hidden.float().norm(dim=-1).clamp_min(1e-6)

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> None:
        """Record one layer's queries; see `AttentionObserver`."""
        # 1. Logsumexp of each query over its own request, block by block.
        batch, heads, new, dim = query.shape
        own = key[:, :, -new:].float()  # (batch, num_kv_heads, new, dim)
        sums = torch.empty(batch, heads, new, device=query.device)
        places = torch.arange(new, device=query.device)
        for start in range(0, new, _BLOCK):
            rows = slice(start, min(start + _BLOCK, new))
            block = query[:, :, rows].float().unflatten(1, (own.shape[1], -1))  # (batch, kv_heads, group, block, dim)
            logits = block @ own[:, :, None, : rows.stop].transpose(-1, -2) * kind.scaling
            logits = soft_capped(logits, kind.softcap)
            hidden = places[: rows.stop] > places[rows, None]
            if kind.window is not None:
                hidden |= places[: rows.stop] <= places[rows, None] - kind.window
            sums[:, :, rows] = logits.masked_fill_(hidden, -torch.inf).logsumexp(-1).flatten(1, 2)
        # 2. Picked queries of the real tokens.
        real, picked = self._real, self._picked
        self._parts[layer].append(
            ReferenceRows(
                query=query.transpose(1, 2)[real].transpose(0, 1).gather(1, picked[..., None].expand(-1, -1, dim)),
                own=sums.transpose(1, 2)[real].transpose(0, 1).gather(1, picked),
                positions=self._positions[picked],
                scale=self._scales[layer].expand(batch, -1)[real][picked],
                kind=kind,
            )
        )


def _in_one_regime(
    backbone: Backbone, layers: Sequence[ReferenceRows], sizes: Sequence[int], n_positions: Sequence[int], wanted: int
) -> list[ReferenceRows]:
    """Rotate queries from sequences of different lengths again, as those of a sequence of length `wanted`."""
    query, where = torch.stack([rows.query for rows in layers]), layers[0].positions
    parts = []
    for part, at, length in zip(query.split(list(sizes), 2), where.split(list(sizes), 1), n_positions, strict=True):
        every = at.expand(part.shape[:3])
        free = backbone.rope.unrotate(part, every, n_positions=length)
        parts.append(backbone.rope.rotate(free, every, n_positions=max(wanted, int(at.max()) + 1)).to(query.dtype))
    return [replace(rows, query=turned) for rows, turned in zip(layers, torch.cat(parts, 2), strict=True)]
