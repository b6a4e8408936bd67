"""Matched: keep what the layers' outputs need, and fit what is kept.

Four steps, without training. Entries are *scored* by what their loss would do to the output of their layer (an entry
whose value is close to what its head puts out anyway can go, however much attention it gets). They are pruned in
*stages*, because what one entry is worth depends on which others are left. What is kept is *fitted* in closed form so
that it stands for what was dropped: each entry gets a bias, for the attention of the dropped ones, and another value.
At last keys, values and biases are moved by some steps of gradient descent (`descent`).

The score of the first choice is DropKV's (openreview MqfNzH3TVH), behind the output projection and over the norm of the
layer's input. The fit follows Attention Matching (arXiv 2602.16284), but that residuals are relative to the whole
softmax, that ridges pull to the original values and to no bias, and that their strength is chosen on rows held out.

For a query i of query head g, P[i, j] is its attention to entry j with the full cache (prefix and its own row in the
denominator), o[i] what prefix and document put out together, W_g the head's part of the output projection, M[g] is
W_g^T W_g, and r[i] the norm of the hidden state that enters the layer. Of these relative errors one in a late layer
counts more than one in an early layer (`depth_weight`). All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kv_memory.backbone import Backbone
from kv_memory.compress.descent import HeadGroup, MovedHeads, alike, descend
from kv_memory.compress.fitting import HeadSystem, fit_heads, output_errors, refit_errors
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reading import check_finite, choose
from kv_memory.compress.reference_rows import (
    CUE_TOKENS,
    QUESTION_TOKENS,
    REQUEST_TOKENS,
    ReferenceRows,
    record_rows,
)
from kv_memory.config import Budget
from kv_memory.positioned import PositionedCache

__all__ = ["Match", "MatchSettings", "Matched", "MatchedDocument"]

_LOGITS = 1 << 22  # attention logits that are written out at once
_STAGE_RIDGES = (1e-2, 1e-1)  # of the fits of stages, which need not be the best
_HELD_OUT = 4  # one position in four is held out, to choose the ridge on


@dataclass(frozen=True, eq=False)
class Match:
    """What is kept of a document.

    Attributes:
        selected: Bool `(num_layers, num_kv_heads, n)`.
        keys: `(n_entries, head_dim)`, layer by layer and head by head, rotated, float32.
        values: The same shape and order.
        bias: `(n_entries,)`, float32.
    """

    selected: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class Matched:
    """The selector: `match` chooses and fits; as a `Selector` it only scores."""

    budget: Budget = "model"

    def __init__(self, settings: MatchSettings | None = None) -> None:
        self.settings = settings or MatchSettings()
        self.name = self.settings.name
        request = REQUEST_TOKENS + CUE_TOKENS
        self.extra_tokens = max(self.settings.part_tokens + request, QUESTION_TOKENS)

    def watch(self, backbone: Backbone, *, n_prefix: int, n_tokens: int) -> None:
        """Needs to see nothing of the prefill."""

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, watched: object) -> torch.Tensor:
        """What the loss of each entry would do to the output of its layer, see `output_errors`."""
        return self.document(backbone, ids, cache).scores

    def document(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> MatchedDocument:
        """Ask the reference rows about a document that has been read, and score its entries."""
        return MatchedDocument(backbone, ids, cache, self.settings)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one layer as they are used: `(num_kv_heads, group, m)` of everything."""

    rows: ReferenceRows
    total: torch.Tensor  # logsumexp over prefix, document and own row
    rest: torch.Tensor  # attention to prefix and own row
    target: torch.Tensor  # (num_kv_heads, group, m, head_dim), what the document's entries put out together
    metric: torch.Tensor  # (num_heads, head_dim, head_dim), W_g^T W_g times what the layer counts


class MatchedDocument:
    """One document with its reference rows and its scores: what `match` needs at whatever number of entries kept.

    Args:
        backbone: The model.
        ids: `(1, n)`, the document.
        cache: Prefix and document, as they were prefilled, with room for `reference_rows`.
        settings: See `MatchSettings`.

    Attributes:
        scores: What the loss of each entry would do, `(num_layers, num_kv_heads, n)`, float32.

    Raises:
        ModelError: Scores are not finite.
    """

    def __init__(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, settings: MatchSettings) -> None:
        self._backbone = backbone
        self._settings = settings
        self._n = ids.shape[1]
        self._cache = cache
        self._n_prefix = int(cache.next_positions[0]) - self._n
        self._group = backbone.num_heads // backbone.num_kv_heads
        self._reference = record_rows(backbone, ids, cache, part_tokens=settings.part_tokens)
        self._rows: list[_Rows] = []
        self.scores = self._scores()
        check_finite(backbone, self.scores)

    def match(self, *, n_kept: int, forced: torch.Tensor) -> Match:
        """Prune in stages, and fit what is kept.

        Args:
            n_kept: Entries to keep, on average over layers and heads.
            forced: Bool `(n,)`; these are kept whatever their score, and neither moved nor biased.
        """
        scores, settings = self.scores, self._settings
        lengths, fixed = torch.tensor([self._n]), forced.to(scores.device)
        stages = [stage for stage in settings.stages if round(n_kept * stage) < self._n] if settings.fit else []
        for index, stage in enumerate((*stages, 1.0)):
            most = torch.tensor([max(n_kept, round(n_kept * stage))])
            chosen = choose(scores[:, None], lengths, most, budget="model", forced=forced[None])[:, 0]
            kept = [chosen[layer, head].nonzero()[:, 0] for layer, head in self._heads()]
            if index < len(stages):
                scores = self._rescored(kept, fixed)
        found = self._fitted(kept, fixed)
        return Match(chosen, found.keys, found.values, found.bias)

    def _heads(self) -> list[tuple[int, int]]:
        """Layer and KV head of each, layer by layer."""
        return list(product(range(self._backbone.num_layers), range(self._backbone.num_kv_heads)))

    def _metric(self, layer: int) -> torch.Tensor:
        """M of each query head, times what an error in this layer counts, see `depth_weight`."""
        module: Any = self._backbone.layers[layer]
        weight: torch.Tensor = module.self_attn.o_proj.weight.float()  # (hidden_size, num_heads * head_dim)
        parts: torch.Tensor = weight.reshape(len(weight), self._backbone.num_heads, -1).transpose(0, 1)
        counts = math.exp(self._settings.depth_weight * layer / max(1, self._backbone.num_layers - 1))
        return parts.transpose(1, 2) @ parts * counts

    def _entries(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of prefix and document in one head, `(n_prefix + n, head_dim)`, float32."""
        keys, values = self._cache.layer(layer)
        end = self._n_prefix + self._n
        return keys[0, head, :end].float(), values[0, head, :end].float()

    def _blocks(self, n_keys: int, m: int) -> Iterator[slice]:
        size = max(1, _LOGITS // (n_keys * self._group))
        for start in range(0, m, size):
            yield slice(start, min(start + size, m))

    def _scores(self) -> torch.Tensor:
        device = self._reference[0].query.device
        scores = torch.zeros(self._backbone.num_layers, self._backbone.num_kv_heads, self._n, device=device)
        for layer, rows in enumerate(self._reference):
            m = rows.positions.shape[1]
            metric = self._metric(layer)
            total, rest = (torch.empty(self._backbone.num_heads, m, device=device) for _ in range(2))
            target = torch.empty(self._backbone.num_heads, m, self._backbone.head_dim, device=device)
            for head in range(self._backbone.num_kv_heads):
                keys, values = self._entries(layer, head)
                places = torch.arange(len(keys), device=device)
                own = self._queries_of(head)
                for block in self._blocks(len(keys), m):
                    logits = rows.logits(keys, places, own, block)
                    highest = torch.maximum(logits.amax(-1), rows.own[own, block])[..., None]
                    weights = logits.sub_(highest).exp_()
                    sums = weights.sum(-1, keepdim=True) + (rows.own[own, block, None] - highest).exp()
                    weights = weights.div_(sums)
                    total[own, block] = (sums.log() + highest)[..., 0]
                    before, inside = weights[..., : self._n_prefix], weights[..., self._n_prefix :]
                    rest[own, block] = before.sum(-1) + (rows.own[own, block] - total[own, block]).exp()
                    target[own, block] = inside @ values[self._n_prefix :]
                    if self._settings.score == "attention":
                        scores[layer, head] = torch.maximum(scores[layer, head], inside.amax((0, 1)))
                        continue
                    output = target[own, block] + before @ values[: self._n_prefix]
                    scores[layer, head] += output_errors(
                        inside, values[self._n_prefix :], output, metric[own], rows.scale[own, block]
                    )
            shape = (self._backbone.num_kv_heads, self._group)
            total, rest, target = (part.unflatten(0, shape) for part in (total, rest, target))
            self._rows.append(_Rows(rows, total, rest, target, metric))
        return scores

    def _rescored(self, kept: Sequence[torch.Tensor], fixed: torch.Tensor) -> torch.Tensor:
        """What the loss of each entry kept would do when all others are fitted again; -1 of those that are not kept.

        Args:
            kept: For each head the entries it keeps, in order.
            fixed: Bool `(n,)`, see `match`.

        Returns:
            `(num_layers, num_kv_heads, n)`.
        """
        scores = torch.full_like(self.scores, -1.0)
        quick = replace(self._settings, value_ridges=_STAGE_RIDGES)
        for indices, group in self._groups(kept, fixed, self._settings.max_rows):
            of_heads = [self._heads()[i] for i in indices]
            metric = torch.stack([self._rows[layer].metric[self._queries_of(head)].mean(0) for layer, head in of_heads])
            errors = [
                refit_errors(part.system, fit_heads(part.system, part.fixed, quick), metric) for part in group.parts()
            ]
            for i, own in zip(indices, torch.cat(errors, 1), strict=True):
                scores.view(-1, self._n)[i, kept[i]] = own[: len(kept[i])]
        return scores

    def _fitted(self, kept: Sequence[torch.Tensor], fixed: torch.Tensor) -> MovedHeads:
        """The entries kept, fitted and moved, head by head; arguments as in `_rescored`."""
        settings, found = self._settings, dict[int, MovedHeads]()
        for i, (layer, head) in enumerate(self._heads()):
            keys, values = (tensor[self._n_prefix + kept[i]] for tensor in self._entries(layer, head))
            found[i] = MovedHeads(keys, values, values.new_zeros(len(keys)))
        for indices, group in self._groups(kept, fixed, settings.max_final_rows) if settings.fit else ():
            parts = [
                (part.system.real, descend(part, fit_heads(part.system, part.fixed, settings), settings))
                for part in group.parts()
            ]
            for row, i in enumerate(indices):
                found[i] = MovedHeads.joined([moved.of(row, real[row]) for real, moved in parts])
        return MovedHeads.joined([found[i] for i in range(len(found))])

    def _groups(
        self, kept: Sequence[torch.Tensor], fixed: torch.Tensor, most: int
    ) -> Iterator[tuple[list[int], HeadGroup]]:
        """Heads that are fitted together, none of those that keep nothing; and which they are.

        Args:
            kept: See `_rescored`.
            fixed: See `_rescored`.
            most: Rows of a head, at most.
        """
        filled = [i for i, own in enumerate(kept) if len(own)]
        kinds = [self._rows[self._heads()[i][0]].rows.kind for i in filled]
        for group in alike([len(kept[i]) for i in filled], kinds, self._settings.rows_per_step):
            indices = [filled[i] for i in group]
            yield indices, self._group_of([self._heads()[i] for i in indices], [kept[i] for i in indices], fixed, most)

    def _group_of(
        self, heads: Sequence[tuple[int, int]], kept: Sequence[torch.Tensor], fixed: torch.Tensor, most: int
    ) -> HeadGroup:
        device = self.scores.device
        picked, n_learned = self._picked(self._rows[0].rows.positions.shape[1], most)
        rows = ReferenceRows.joined(
            [self._rows[layer].rows.pick(self._queries_of(head), picked) for layer, head in heads]
        )
        total, rest, target = (
            torch.stack([getattr(self._rows[layer], name)[head].flatten(0, 1)[picked] for layer, head in heads])
            for name in ("total", "rest", "target")
        )
        counts = torch.tensor([len(own) for own in kept], device=device)
        inside = pad_sequence(list(kept), batch_first=True)  # (heads, most kept), positions in the document
        real = torch.arange(inside.shape[1], device=device) < counts[:, None]
        where = inside + self._n_prefix
        found = [[part[own] for part in self._entries(*head)] for head, own in zip(heads, where, strict=True)]
        keys, values = (torch.stack(parts) for parts in zip(*found, strict=True))  # (heads, most kept, head_dim)
        logits = rows.logits(keys, where, slice(None), slice(None))
        system = HeadSystem(
            weights=logits.sub_(total[..., None]).exp_().mul_(real[:, None]),
            rest=rest,
            target=target,
            values=values * real[..., None],
            scale=rows.scale,
            real=real,
            n_learned=n_learned,
        )
        return HeadGroup(rows, total, system, where, keys, fixed[inside] & real)

    def _queries_of(self, head: int) -> slice:
        """The query heads that share a KV head."""
        return slice(head * self._group, (head + 1) * self._group)

    def _picked(self, m: int, most: int) -> tuple[torch.Tensor, int]:
        """Which of a head's `group * m` rows are used, and how many of them are learned from; those held out are last.

        All rows, or evenly spread ones of which every position has some. One position in four is held out, with all
        its heads, which look alike.
        """
        rows = torch.arange(self._group * m, device=self._reference[0].query.device)
        step = -(-len(rows) // most)
        rows = rows[(rows // m + rows % m) % step == 0]
        held_out = rows % m % _HELD_OUT == _HELD_OUT - 1
        return torch.cat([rows[~held_out], rows[held_out]]), int((~held_out).sum())
