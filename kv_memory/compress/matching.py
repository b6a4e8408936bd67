"""The selector `matched`: keep the entries that the layers' outputs need, and fit them.

Four steps, without training:

1. Score each entry by the error that losing it would cause in its layer's output. An entry with a value close to what
   its head outputs anyway can go, however much attention it gets.
2. Prune in stages, because the score of an entry depends on which others are left.
3. Fit the kept entries in closed form so that they stand in for the dropped ones: each entry gets a bias, for the
   attention of dropped entries, and a new value.
4. Move keys, values and biases by some steps of gradient descent (`descent`).

The score of the first selection is DropKV's (openreview MqfNzH3TVH), taken behind the output projection and divided by
the norm of the layer's input. The fit follows Attention Matching (arXiv 2602.16284) with three differences: residuals
are relative to the whole softmax, ridges pull towards the original values and towards zero bias, and the strength of
the ridge on values is chosen on held-out rows.

For a query i of query head g, P[i, j] is its attention to entry j with the full cache (the denominator includes the
prefix and the query's own request), o[i] the output of prefix and document together, W_g the head's part of the output
projection, M[g] is W_g^T W_g, and r[i] the norm of the hidden state that enters the layer. A relative error in a late
layer counts more than the same error in an early layer (`depth_weight`). All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.fitting import FittedHeads, output_errors
from kv_memory.compress.head_fit import HeadRows, KeptHead, fitted_entries, refitted_errors
from kv_memory.compress.kept import check_finite, top_k_mask
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.reference_rows import EXTRA_TOKENS, QUESTION_TOKENS, ReferenceRows, record_rows
from kv_memory.compress.restore import prefill_restore_tokens, restore_of
from kv_memory.config import Budget
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

_LOGITS = 1 << 22  # attention logits that are held in memory at once


class MatchedDocument(NamedTuple):
    """One document with its reference rows and scores: all that matching needs for any number of entries."""

    heads: list[HeadRows]  # targets of the fit of each KV head, layer by layer
    scores: torch.Tensor  # error that losing each entry would cause, `(num_layers, num_kv_heads, n_tokens)`, float32,
    # where restore tokens, if there are any, count as the document's last tokens


class Matched:
    """The selector `matched`: as a `Selector` it only scores; `match` also selects and fits."""

    budget: Budget = "model"

    def __init__(self, settings: MatchSettings | None = None) -> None:
        self.settings = settings or MatchSettings()
        self.name = self.settings.name
        self.extra_tokens = max(self.settings.part_tokens + EXTRA_TOKENS, QUESTION_TOKENS)

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Score each entry by the error that losing it would cause, see `output_errors` and `MatchSettings.score`."""
        backbone.prefill(ids, cache)
        return self.documents(backbone, ids, cache)[0].scores

    def documents(
        self,
        backbone: Backbone,
        ids: torch.Tensor,
        cache: PositionedCache,
        *,
        lengths: torch.Tensor | None = None,
        restore: Adapter | None = None,
    ) -> list[MatchedDocument]:
        """Run the reference rows behind prefilled documents, and score the entries.

        Args:
            backbone: The model.
            ids: `(batch, n)`, token ids of the documents, padded on the right.
            cache: Cache of prefix and documents, with room for `record_rows`.
            lengths: `(batch,)`, real tokens of each document; all of them if None.
            restore: Adapter whose restore tokens are prefilled behind the documents, as more entries to select from.
                What all entries are fitted to is the document alone.

        Raises:
            ModelError: Scores are not finite.
        """
        # 1. Reference rows behind each document.
        sizes = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
        rows = [own[:n] for own, n in zip(ids, sizes, strict=True)]
        m = 0 if restore is None else restore.config.restore_tokens
        reference = record_rows(backbone, rows, cache, part_tokens=self.settings.part_tokens)
        bias = torch.zeros(backbone.num_layers, backbone.num_kv_heads, 0, device=ids.device)
        if restore is not None:
            prefill_restore_tokens(restore, cache)
            bias = restore_of(restore).bias.detach()
        n_prefix, n_behind = len(backbone.prefix_ids), len(backbone.prefix_ids) + ids.shape[1]  # m entries from there
        # 2. Targets and scores of each KV head.
        metrics = [_metric(backbone, layer, self.settings) for layer in range(backbone.num_layers)]
        documents = []
        for row, n_tokens in enumerate(sizes):
            layers = [[part[row] for part in cache.layer(index)] for index in range(backbone.num_layers)]
            if n_prefix + n_tokens < n_behind:  # shorter than others: its restore tokens are behind the padding
                parts = (slice(0, n_prefix + n_tokens), slice(n_behind, n_behind + m))
                layers = [[torch.cat([part[:, own] for own in parts], 1) for part in layer] for layer in layers]
            found = [
                self._scored(backbone, entries, head, n_tokens, of_layer, metric, bias[layer, head])
                for layer, (entries, of_layer, metric) in enumerate(zip(layers, reference[row], metrics, strict=True))
                for head in range(backbone.num_kv_heads)
            ]
            scores = torch.stack([own for _, own in found]).view(backbone.num_layers, -1, n_tokens + m)
            check_finite(backbone, scores)
            documents.append(MatchedDocument([head for head, _ in found], scores))
        return documents

    def _scored(
        self,
        backbone: Backbone,
        entries: Sequence[torch.Tensor],
        head: int,
        n_tokens: int,
        reference: ReferenceRows,
        metric: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[HeadRows, torch.Tensor]:
        """Compute the fit's targets for one KV head of a layer, and the scores of its entries, `(n_tokens + m,)`.

        `entries` are keys and values of the layer, `(num_kv_heads, n, head_dim)`; `metric` is M of each query head;
        `bias` those of the m restore tokens, `(m,)`.
        """
        # 1. The rows of the query heads that share the KV head; `group` heads with `m` queries each.
        n_prefix, group = len(backbone.prefix_ids), backbone.num_heads // backbone.num_kv_heads
        own = slice(head * group, (head + 1) * group)
        rows, metric = ReferenceRows.merged([reference], lambda tensors: tensors[0][own]), metric[own]
        m, device = rows.query.shape[1], rows.query.device
        total, rest = (torch.empty(group, m, device=device) for _ in range(2))  # see `HeadRows`
        target = torch.empty(group, m, backbone.head_dim, device=device)
        scores = torch.zeros(n_tokens + len(bias), device=device)
        end = n_prefix + n_tokens  # of the document; its restore tokens follow
        keys, values = (part[head, : end + len(bias)] for part in entries)  # (end + m, head_dim)
        biases = torch.nn.functional.pad(bias, (n_tokens, 0))
        made = HeadRows(keys, values, n_prefix, rows, total, rest, target, metric.mean(0), biases)
        keys, values = keys.float(), values.float()
        places = torch.arange(len(keys), device=device)
        size = max(1, _LOGITS // (group * len(keys)))
        for start in range(0, m, size):
            block = slice(start, start + size)
            # 2. Attention of the rows to prefix and document, with their own request in the denominator.
            logits = rows.logits(keys[:end], places[:end], block)  # (group, block, end)
            highest = torch.maximum(logits.amax(-1), rows.own[:, block])[..., None]  # (group, block, 1)
            weights = logits.sub_(highest).exp_()
            sums = weights.sum(-1, keepdim=True) + (rows.own[:, block, None] - highest).exp()
            weights = weights.div_(sums)
            before, inside = weights[..., :n_prefix], weights[..., n_prefix:]
            # 3. Targets of the fit: the attention outside the document, and the output of the document's entries.
            total[:, block] = (sums.log() + highest)[..., 0]
            rest[:, block] = before.sum(-1) + (rows.own[:, block] - total[:, block]).exp()
            target[:, block] = inside @ values[n_prefix:end]  # (group, block, head_dim)
            # 4. Scores: the highest attention, or the sum of the errors that losing each entry would cause.
            #    Those of restore tokens are beside the whole document: of the output that has them too.
            extra = rows.logits(keys[end:], places[end:], block).add_(bias).sub_(total[:, block, None]).exp_()
            together = 1 + extra.sum(-1, keepdim=True)
            if self.settings.score == "attention":
                scores = torch.maximum(scores, torch.cat([inside, extra / together], -1).amax((0, 1)))
                continue
            output, scale = target[:, block] + before @ values[:n_prefix], rows.scale[:, block]
            scores[:n_tokens] += output_errors(inside, values[n_prefix:end], output, metric, scale)
            if len(bias):
                output = (output + extra @ values[end:]) / together
                scores[n_tokens:] += output_errors(extra / together, values[end:], output, metric, scale)
        return made, scores

    def match(
        self, documents: Sequence[MatchedDocument], n_kept: Sequence[int], forced: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, FittedHeads]]:
        """Prune several documents in stages and fit the kept entries, with the heads of all documents side by side.

        Args:
            documents: Documents of one model, as scored by `documents`.
            n_kept: Number of entries to keep of each document, on average over layers and heads.
            forced: Bool `(n_tokens,)` for each document; tokens that are kept whatever their score, and neither moved
                nor biased.

        Returns:
            Mask of each document's kept entries, bool `(num_layers, num_kv_heads, n_tokens)` with its restore tokens,
            and these entries, one behind the other, layer by layer and head by head.
        """
        settings, scores = self.settings, [document.scores for document in documents]
        fixed = [  # restore tokens are not forced
            torch.nn.functional.pad(own.to(one.device), (0, one.shape[-1] - len(own)))
            for own, one in zip(forced, scores, strict=True)
        ]

        def choice(i: int, most: int) -> torch.Tensor:
            n = torch.tensor([len(fixed[i])])
            return top_k_mask(scores[i][:, None], n, torch.tensor([most]), budget="model", forced=fixed[i][None])[:, 0]

        def kept_of(i: int, chosen: torch.Tensor) -> list[KeptHead]:
            of_heads = [own.nonzero()[:, 0] for own in chosen.flatten(0, 1)]
            return [KeptHead(head, own, fixed[i][own]) for head, own in zip(documents[i].heads, of_heads, strict=True)]

        # 1. Stages: keep a multiple of the budget, fit, and replace the scores by the errors of the fitted entries.
        for stage in settings.stages if settings.fit else ():
            some = [i for i, most in enumerate(n_kept) if round(most * stage) < len(fixed[i])]
            kept = [kept_of(i, choice(i, max(n_kept[i], round(n_kept[i] * stage)))) for i in some]
            errors = iter(refitted_errors([head for heads in kept for head in heads], settings) if some else ())
            for i, heads in zip(some, kept, strict=True):
                scores[i] = torch.full_like(scores[i], -1.0)  # dropped: below every error
                for own, head in zip(scores[i].flatten(0, 1), heads, strict=True):
                    own[head.kept] = next(errors)
        # 2. Last selection. A head that has room for its whole document needs no restore tokens.
        chosen = [choice(i, most) for i, most in enumerate(n_kept)]  # each (num_layers, num_kv_heads, n_tokens)
        for own, held in zip(chosen, forced, strict=True):
            own[..., len(held) :] &= own.sum(-1, keepdim=True) <= len(held)
        kept = [kept_of(i, own) for i, own in enumerate(chosen)]
        # 3. Last fit, of all heads of all documents together, and the results back to their documents.
        found = iter(fitted_entries([head for heads in kept for head in heads], settings))
        return [
            (own, FittedHeads.joined([next(found) for _ in heads])) for own, heads in zip(chosen, kept, strict=True)
        ]


def _metric(backbone: Backbone, layer: int, settings: MatchSettings) -> torch.Tensor:
    """M of each query head, `(num_heads, head_dim, head_dim)`, times the weight of an error in this layer."""
    module: Any = backbone.layers[layer]
    weight: torch.Tensor = module.self_attn.o_proj.weight.float()  # (hidden_size, num_heads * head_dim)
    parts: torch.Tensor = weight.reshape(len(weight), backbone.num_heads, -1).transpose(0, 1)
    counts = math.exp(settings.depth_weight * layer / max(1, backbone.num_layers - 1))
    return parts.transpose(1, 2) @ parts * counts
