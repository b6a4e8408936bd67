"""The loss of one step, in both stages.

Stage (a), the warm-up: the scorer learns the attention that each token receives from the text after the document. The
labels are the highest attention that a token receives, in each layer and KV head, while the model repeats the document
(the reconstruction selector's scores, KVzip) and while it prefills questions and their answers. They are dense, whereas
the gradient of distillation covers only kept tokens.

Stage (b), distillation: the divergence of a student with a distilled cache from the teacher with the full cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import pad
from kv_memory.compress.prefill import prefill_documents
from kv_memory.compress.refine.batching import Entries, Row, RowBatch, batch_rows, gather_entries, join_entries
from kv_memory.compress.refine.loss import distillation_loss
from kv_memory.compress.refine.teacher import stop_ids
from kv_memory.compress.scorer import attention_scores
from kv_memory.config import Budget, n_kept_for
from kv_memory.model.attention import AttentionKind, ForwardContext, attention_probabilities
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import NEVER
from kv_memory.train.batches import Batch
from kv_memory.train.restored import output_selector, restore_scores, restored_entries
from kv_memory.train.settings import TrainSettings

REQUEST = "\n\nRepeat the previous text exactly.\n"


@dataclass(frozen=True)
class StepResult:
    """The scalar loss of one training step, with its autograd graph.

    `figures` are terms of the loss and others for the log; `n_tokens` counts documents and rows; `weight` is that of
    the loss relative to the other parts of the same batch.
    """

    loss: torch.Tensor
    figures: dict[str, float]
    n_tokens: int
    weight: float


@dataclass(frozen=True)
class WeightedRows:
    """Rows of similar length, and the loss weights of their predictions, `(n_wanted,)`.

    `rows.wanted` covers answers and spans, and with `question_weight` also questions and requests.
    """

    rows: RowBatch
    weights: torch.Tensor

    def ask(self, backbone: Backbone, entries: Entries) -> torch.Tensor:
        """Logits at the wanted tokens: `(n_wanted, vocab_size)`."""
        return entries.ask(backbone, self.rows)


@torch.no_grad()
def answered_rows(batch: Batch, teacher: Entries, backbone: Backbone, settings: TrainSettings) -> list[Row]:
    """The rows of a batch; a question without an answer gets the teacher's greedy answer."""
    asked = [row for row in batch.rows if not row.n_wanted]
    answers: list[list[int]] = [[] for _ in asked]  # each up to and including its end token
    if asked:
        ids, lengths = pad([row.ids for row in asked], device=backbone.device)
        cache = teacher.cache(torch.tensor([row.document for row in asked], device=backbone.device))
        ends = stop_ids(backbone)
        logits = backbone.logits(ids, cache, lengths=lengths)
        for _ in range(settings.answer_tokens):
            tokens = logits.argmax(-1)
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                if not answer or answer[-1] not in ends:
                    answer.append(token)
            if all(answer[-1] in ends for answer in answers):
                break
            logits = backbone.logits(tokens[:, None], cache)
    answered = iter(answers)
    return [row if row.n_wanted else replace(row, ids=(*row.ids, *next(answered))) for row in batch.rows]


def weighted_rows(
    rows: Sequence[Row], full: Entries, backbone: Backbone, settings: TrainSettings
) -> list[WeightedRows]:
    """Answered rows in batches of similar length, with the weights of their predictions.

    A single batch was rejected: with a span of 46 tokens beside questions of 20, most of the computation is padding.
    """
    found = []
    for part in _by_length(rows, full, backbone):
        told = part.wanted  # (rows, n): answers and spans
        place = torch.arange(told.shape[1], device=told.device)
        question = ~told & (place < part.lengths[:, None] - 1) & (settings.question_weight > 0)  # and requests
        wanted = told | question
        weights = (told + question * settings.question_weight)[wanted].float()
        found.append(WeightedRows(replace(part, wanted=wanted), weights))
    return found


def _by_length(rows: Sequence[Row], entries: Entries, backbone: Backbone) -> list[RowBatch]:
    ends = entries.next_positions.tolist()
    return batch_rows(backbone, rows, ends, at_once=len(rows), max_tokens=sys.maxsize)


# -- stage (a): the scorer alone -------------------------------------------------------------------------------------


def warmup_step(adapter: Adapter, batch: Batch, *, settings: TrainSettings) -> StepResult:
    """Compute the loss of the scorer alone, without the LoRA."""
    # 1. Prefill with the frozen weights; the scorer scores every token. How many entries are kept does not matter.
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)
    one = torch.ones(len(batch.documents), dtype=torch.int64, device=backbone.device)
    reading = prefill_documents(adapter, ids, lengths, one, routed=False)
    # 2. Labels: the attention that each token receives from a repetition of the document and from the rows.
    full = gather_entries(backbone, reading.cache)
    rows = answered_rows(batch, full, backbone, settings)
    labels = received_attention(backbone, full, label_rows(batch, rows, backbone))
    # 3. Squared error of the scores.
    loss = scorer_loss(reading.scores, labels, lengths, budget=adapter.config.budget)
    n_tokens = int(lengths.sum())
    return StepResult(loss=loss, figures={"scorer": float(loss.detach())}, n_tokens=2 * n_tokens, weight=n_tokens)


def label_rows(batch: Batch, rows: Sequence[Row], backbone: Backbone) -> list[Row]:
    """The rows that supply the scorer's labels: repetitions of each document, and those of `rows` behind a single one.

    Rows behind joined documents are left out, as the labels are computed on each document's own entries.
    """
    request = backbone.encode(REQUEST)
    repeated = [Row(index, (*request, *document), len(request)) for index, document in enumerate(batch.documents)]
    groups = [batch.groups[row.document] for row in rows]
    alone = [replace(row, document=g[0]) for row, g in zip(rows, groups, strict=True) if len(g) == 1]
    return [*repeated, *alone]


@torch.no_grad()
def received_attention(backbone: Backbone, entries: Entries, rows: Sequence[Row]) -> torch.Tensor:
    """The highest attention that each token of each document receives from the rows after it.

    Returns:
        `(num_layers, documents, num_kv_heads, n_tokens)`, float32, in 0 to 1.
    """
    n_prefix = len(backbone.prefix_ids)
    documents, heads, n_entries, _ = entries.keys[0].shape
    received = torch.zeros(backbone.num_layers, documents, heads, n_entries - n_prefix, device=backbone.device)
    for part in _by_length(rows, entries, backbone):
        visible = entries.positions[0][part.documents, 0] != NEVER
        observer = _Received(received, n_prefix, visible, part)
        cache = entries.cache(part.documents)
        backbone.prefill(part.ids, cache, lengths=part.lengths, context=ForwardContext(observer=observer))
    return received


@dataclass(frozen=True)
class _Received:
    """An `AttentionObserver` that records the highest attention of each document's tokens from the rows after it."""

    received: torch.Tensor  # (num_layers, documents, num_kv_heads, n_tokens)
    n_prefix: int
    visible: torch.Tensor  # bool (rows, entries)
    asked: RowBatch

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> None:
        """See `AttentionObserver`; sliding windows are ignored, so tokens outside a window count as visible."""
        # 1. Attention weights under a causal mask, without the padding of shorter documents.
        new, length = query.shape[2], key.shape[2]
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)  # (new, length)
        mask = mask & torch.nn.functional.pad(self.visible, (0, new), value=True)[:, None, None]
        weights = attention_probabilities(query, key, mask, kind)
        # 2. Maximum over the query heads of each KV head, and over the real tokens of each row.
        here = weights[..., self.n_prefix : length - new].unflatten(1, (key.shape[1], -1))
        real = torch.arange(new, device=query.device) < self.asked.lengths[:, None]  # (rows, new)
        highest = (here * real[:, None, None, :, None]).amax((2, 3))  # (rows, kv_heads, tokens)
        # 3. Maximum over the rows of each document.
        documents = self.asked.documents[:, None, None].expand_as(highest)
        self.received[layer].scatter_reduce_(0, documents, highest, "amax")


def scorer_loss(scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, *, budget: Budget) -> torch.Tensor:
    """Mean squared error of scores from the targets of `attention_scores`, a scalar.

    Scores are `(num_layers, documents, num_kv_heads or 1, n_tokens)`; labels, from `received_attention`, have all
    heads. `lengths` are those of the documents in tokens, `(documents,)`.
    """
    real = torch.arange(labels.shape[-1], device=labels.device) < lengths.to(labels.device)[:, None]
    real = real[None, :, None].expand_as(labels)
    target = attention_scores(labels, real, budget=budget)
    if scores.shape[2] == 1:  # one score per token: its best target is the mean over layers and heads
        target, real, scores = target.mean((0, 2), keepdim=True), real[:1, :, :1], scores[:1]
    return ((scores - target).square() * real).sum() / real.sum()


# -- stage (b): scorer and LoRA --------------------------------------------------------------------------------------


def distillation_step(adapter: Adapter, batch: Batch, *, settings: TrainSettings) -> StepResult:
    """Compute the distillation loss of one batch; see `TrainSettings` for its terms."""
    # 1. Teacher, without gradients: prefill each document on its own, then join the documents of each group.
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)  # (documents, n_tokens), (documents,)
    n_documents = len(batch.documents)
    kept = [n_kept_for(len(document), batch.keep_ratio) for document in batch.documents]
    n_kept = torch.tensor(kept, device=backbone.device)  # (documents,)
    restores = adapter.config.restore_tokens
    room = output_selector(backbone).extra_tokens + restores if restores else 0
    with torch.no_grad():
        cache = backbone.prefixed_cache(ids.shape[1], room=room, batch_size=n_documents)
        backbone.prefill(ids, cache, lengths=lengths if n_documents > 1 else None)
        apart = gather_entries(backbone, cache)  # keys of a layer: (documents, num_kv_heads, n, head_dim)
        full = join_entries(backbone, apart, lengths, batch.groups)  # the same, with groups in place of documents
        # 2. Teacher logits over the rows. The teacher first decodes the answers that are missing.
        rows = answered_rows(batch, full, backbone, settings)
        parts = weighted_rows(rows, full, backbone, settings)
        taught = [part.ask(backbone, full) for part in parts]  # each (n_wanted, vocab_size)
    # 3. Student, with gradients: prefill through scorer and LoRA, or restore tokens behind the teacher's documents;
    #    select, and join. Entries that are not selected stay in place as padding. Scores join the graph (as a bias of
    #    value 0) only if the scorer is trained.
    if restores:
        scores = restore_scores(adapter, ids, lengths, cache)
        student_entries = restored_entries(adapter, cache, scores, n_kept, seed=batch.seed)
    else:
        reading = prefill_documents(adapter, ids, lengths, n_kept)
        straight = reading.scores - reading.scores.detach() if settings.lr_scorer_distil > 0 else None
        student_entries = gather_entries(backbone, reading.cache, reading.selected, straight)
    distilled = join_entries(backbone, student_entries, lengths, batch.groups)
    # 4. Mean divergence over the predictions of all parts, by weight.
    weight = torch.cat([part.weights for part in parts]).sum()
    divergence = torch.zeros((), device=backbone.device)
    for part, teacher in zip(parts, taught, strict=True):
        logits = part.ask(backbone, distilled)  # (n_wanted, vocab_size)
        apart_by = distillation_loss(teacher, logits, forward_weight=settings.forward_weight)  # (n_wanted,)
        divergence = divergence + (apart_by * part.weights).sum() / weight
    # 5. Scale by (keep_ratio / geometric mean of min_ratio and max_ratio) ** ratio_power, and add the warm-up's loss.
    scale = (batch.keep_ratio**2 / (settings.min_ratio * settings.max_ratio)) ** (settings.ratio_power / 2)
    loss, figures = divergence * scale, {"divergence": float(divergence.detach())}
    if settings.warmup_weight > 0:
        labels = received_attention(backbone, apart, label_rows(batch, rows, backbone))
        extra = scorer_loss(reading.scores, labels, lengths, budget=adapter.config.budget)
        loss = loss + settings.warmup_weight * extra
        figures["scorer"] = float(extra.detach())
    figures["keep_ratio"] = batch.keep_ratio
    n_tokens = int(lengths.sum()) + sum(len(row.ids) for row in rows)
    return StepResult(loss=loss, figures=figures, n_tokens=n_tokens, weight=float(weight))
