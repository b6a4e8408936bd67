"""One distillation step: the divergence of a student with a distilled cache from the teacher with the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.prefill import pad, prefill_documents
from kv_memory.compress.refine.batching import Entries, gather_entries, join_entries
from kv_memory.compress.refine.loss import distillation_loss, kl_divergence
from kv_memory.config import n_kept_for
from kv_memory.model.backbone import Backbone
from kv_memory.train.batches import Batch, Row
from kv_memory.train.settings import TrainSettings
from kv_memory.train.warmup import LabelRows, received_attention, repetition, scorer_loss

__all__ = [
    "Followed",
    "StepResult",
    "distillation_loss",
    "distillation_step",
    "follow",
    "kl_divergence",
    "output_error",
    "warmup_step",
]

UNEVEN = 1.4  # a row longer than the shortest row of a part by more than this factor starts a new part


@dataclass(frozen=True)
class StepResult:
    """Result of one training step.

    Attributes:
        loss: Scalar loss, with its autograd graph.
        parts: Terms of the loss and other figures, for the log.
        n_tokens: Number of tokens processed, in documents and rows.
        weight: Weight of the loss relative to the other parts of the same batch.
    """

    loss: torch.Tensor
    parts: dict[str, float] = field(default_factory=dict)
    n_tokens: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Followed:
    """Rows of a batch, of similar length, as tensors.

    Attributes:
        ids: `(rows, n)`, token ids, padded on the right.
        lengths: `(rows,)`, length of each row in tokens.
        groups: `(rows,)`, index of the document group that each row follows.
        wanted: Bool `(rows, n)`, True where the next token is predicted.
        weights: `(n_wanted,)`, loss weight of each prediction.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    groups: torch.Tensor
    wanted: torch.Tensor
    weights: torch.Tensor

    def ask(self, backbone: Backbone, entries: Entries, *, outputs: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits at the wanted tokens: `(n_wanted, vocab_size)`; `outputs` as in `Entries.ask`."""
        return entries.ask(backbone, self.ids, self.lengths, self.groups, self.wanted, outputs=outputs)


def follow(batch: Batch, teacher: Entries, backbone: Backbone, settings: TrainSettings) -> list[Followed]:
    """The rows of a batch, in parts of similar length; a row that needs an answer gets the teacher's greedy answer.

    A single part was rejected: with a span of 46 tokens beside questions of 20, most of the computation is padding.
    """
    device = backbone.device
    rows = [list(row.ids) for row in batch.rows]
    open_rows = [index for index, row in enumerate(batch.rows) if row.wants_answer]
    if open_rows:
        ids, lengths = pad([rows[index] for index in open_rows], device=device)
        groups = torch.tensor([batch.rows[index].group for index in open_rows], device=device)
        answers = _greedy(backbone, teacher, ids, lengths, groups, settings.answer_tokens)
        for index, answer in zip(open_rows, answers, strict=True):
            rows[index] += answer
    parts: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if not parts or len(rows[index]) > UNEVEN * len(rows[parts[-1][0]]):
            parts.append([])
        parts[-1].append(index)
    return [_as_tensors([rows[i] for i in part], [batch.rows[i] for i in part], settings, device) for part in parts]


def _as_tensors(ids_of: list[list[int]], rows: list[Row], settings: TrainSettings, device: torch.device) -> Followed:
    ids, lengths = pad(ids_of, device=device)  # (rows, n), (rows,)
    place = torch.arange(ids.shape[1], device=device)  # (n,)
    asked = torch.tensor([row.n_asked for row in rows], device=device)[:, None]  # (rows, 1)
    # The logits at token i predict token i + 1, so the first answer token is predicted at the last question token.
    told = (place >= asked - 1) & (place < lengths[:, None] - 1)  # (rows, n): answers and spans
    question = (place < asked - 1) & (settings.question_weight > 0)  # (rows, n): questions and requests
    wanted = told | question
    return Followed(
        ids=ids,
        lengths=lengths,
        groups=torch.tensor([row.group for row in rows], device=device),
        wanted=wanted,
        weights=(told + question * settings.question_weight)[wanted].float(),
    )


@torch.no_grad()
def _greedy(
    backbone: Backbone, teacher: Entries, ids: torch.Tensor, lengths: torch.Tensor, groups: torch.Tensor, most: int
) -> list[list[int]]:
    """Greedy answers of at most `most` tokens, each up to and including its end token."""
    cache = teacher.cache(groups)
    stop = backbone.prompt.stop
    ends = {backbone.tokenizer.eos_token_id, *(backbone.encode(stop[0])[:1] if stop else [])}
    answers: list[list[int]] = [[] for _ in range(len(ids))]
    logits = backbone.logits(ids, cache, lengths=lengths)
    for _ in range(most):
        tokens = logits.argmax(-1)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            if not answer or answer[-1] not in ends:
                answer.append(token)
        if all(answer[-1] in ends for answer in answers):
            break
        logits = backbone.logits(tokens[:, None], cache)
    return answers


def distillation_step(adapter: Adapter, batch: Batch, *, settings: TrainSettings) -> StepResult:
    """Compute the distillation loss of one batch; see `TrainSettings` for its terms.

    Args:
        adapter: Adapter with the scorer and the LoRA that receive gradients.
        batch: Batch from `Batches.batch`.
        settings: Settings of the run.
    """
    # 1. Teacher, without gradients: prefill each document on its own, then join the documents of each group.
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)  # (documents, n_tokens), (documents,)
    n_documents = len(batch.documents)
    kept = [n_kept_for(len(document), batch.keep_ratio) for document in batch.documents]
    n_kept = torch.tensor(kept, device=backbone.device)  # (documents,)
    with torch.no_grad():
        cache = backbone.prefixed_cache(ids.shape[1], batch_size=n_documents)
        backbone.prefill(ids, cache, lengths=lengths if n_documents > 1 else None)
        apart = gather_entries(backbone, cache, lengths)  # keys: (num_layers, documents, num_kv_heads, n, head_dim)
        full = join_entries(backbone, apart, lengths, batch.groups)  # the same, with groups in place of documents
        # 2. Teacher logits over the rows. The teacher first decodes the answers that are missing.
        parts = follow(batch, full, backbone, settings)
        attended: list[list[torch.Tensor]] = [[] for _ in parts]
        with_outputs = settings.output_weight > 0
        taught = [
            part.ask(backbone, full, outputs=outputs if with_outputs else None)
            for part, outputs in zip(parts, attended, strict=True)
        ]  # each (n_wanted, vocab_size)
    # 3. Student, with gradients: prefill through scorer and LoRA, select, and join. Entries that are not selected stay
    #    in place as padding. Scores join the graph (as a bias of value 0) only if the scorer is trained.
    reading = prefill_documents(adapter, ids, lengths, n_kept)
    learns = settings.lr_scorer_distil > 0
    student_entries = gather_entries(
        backbone, reading.cache, lengths, reading.selected, reading.scores if learns else None
    )
    distilled = join_entries(backbone, student_entries, lengths, batch.groups)
    # 4. Mean divergence over the predictions of all parts, by weight; with `output_weight`, of attention outputs too.
    weight = torch.cat([part.weights for part in parts]).sum()
    divergence = torch.zeros((), device=backbone.device)
    outputs_apart = torch.zeros((), device=backbone.device)
    for part, teacher, wanted_outputs in zip(parts, taught, attended, strict=True):
        outputs: list[torch.Tensor] = []
        logits = part.ask(backbone, distilled, outputs=outputs if with_outputs else None)  # (n_wanted, vocab_size)
        apart_by = distillation_loss(teacher, logits, forward_weight=settings.forward_weight)  # (n_wanted,)
        divergence = divergence + (apart_by * part.weights).sum() / weight
        if with_outputs:
            errors = output_error(wanted_outputs, outputs)  # (n_wanted,)
            outputs_apart = outputs_apart + (errors * part.weights).sum() / weight
    # 5. Scale by (keep_ratio / geometric mean of min_ratio and max_ratio) ** ratio_power, and add the optional terms.
    scale = (batch.keep_ratio**2 / (settings.min_ratio * settings.max_ratio)) ** (settings.ratio_power / 2)
    loss, figures = divergence * scale, {"divergence": float(divergence.detach())}
    if with_outputs:
        loss = loss + settings.output_weight * scale * outputs_apart
        figures["outputs"] = float(outputs_apart.detach())
    if settings.warmup_weight > 0:
        labels = received_attention(backbone, apart, _askings(batch, parts, backbone))
        extra = scorer_loss(reading.scores, labels, lengths, budget=adapter.config.budget)
        loss = loss + settings.warmup_weight * extra
        figures["scorer"] = float(extra.detach())
    figures["keep_ratio"] = batch.keep_ratio
    n_tokens = int(lengths.sum()) + sum(int(part.lengths.sum()) for part in parts)
    return StepResult(loss=loss, parts=figures, n_tokens=n_tokens, weight=float(weight))


def _askings(batch: Batch, parts: list[Followed], backbone: Backbone) -> list[LabelRows]:
    """The rows that supply the scorer's attention labels: repetitions, and the rows that follow a single document."""
    askings = [repetition(backbone, batch.documents)]
    # Rows behind joined documents are left out: the labels are computed on each document's own entries.
    alone = torch.tensor([group[0] if len(group) == 1 else -1 for group in batch.groups], device=backbone.device)
    for part in parts:
        documents = alone[part.groups]
        if bool((documents >= 0).any()):
            chosen = documents >= 0
            askings.append(LabelRows(part.ids[chosen], part.lengths[chosen], documents[chosen]))
    return askings


def warmup_step(adapter: Adapter, batch: Batch, *, settings: TrainSettings) -> StepResult:
    """Compute the loss of the scorer alone, without the LoRA; arguments as in `distillation_step`."""
    # 1. Prefill with the frozen weights; the scorer scores every token. How many entries are kept does not matter.
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)
    n_documents = len(batch.documents)
    one = torch.ones(n_documents, dtype=torch.int64, device=backbone.device)
    reading = prefill_documents(adapter, ids, lengths, one, routed=False)
    # 2. Labels: the attention that each token receives from a repetition of the document and from the rows.
    full = gather_entries(backbone, reading.cache, lengths)
    parts = follow(batch, full, backbone, settings)
    labels = received_attention(backbone, full, _askings(batch, parts, backbone))
    # 3. Squared error of the scores.
    loss = scorer_loss(reading.scores, labels, lengths, budget=adapter.config.budget)
    n_tokens = int(lengths.sum())
    figures = {"scorer": float(loss.detach())}
    return StepResult(loss=loss, parts=figures, n_tokens=2 * n_tokens, weight=n_tokens)


def output_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared error of the student's attention outputs, as a share of the teacher's squared norm.

    Args:
        teacher: Attention outputs of every layer, `(n, num_heads * head_dim)` each.
        student: Attention outputs of the student, in the same shapes.

    Returns:
        `(n,)`, float32, the mean over layers: 0 where both are equal, 1 where the student's output is 0.
    """
    shares = [
        (s.float() - t.float()).square().sum(-1) / (t.float().square().sum(-1) + 1e-6)
        for t, s in zip(teacher, student, strict=True)
    ]
    return torch.stack(shares).mean(0)
