"""One step of distillation: the teacher reads everything, the student a distilled cache; how far are they apart?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.prefill import pad, read_documents
from kv_memory.compress.refine.batching import Entries, gather_entries, join_entries
from kv_memory.compress.refine.loss import distillation_loss, kl_divergence
from kv_memory.config import n_kept_for
from kv_memory.model.backbone import Backbone
from kv_memory.train.batches import Batch, Row
from kv_memory.train.settings import TrainSettings
from kv_memory.train.warmup import Asked, received_attention, repetition, scorer_loss

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

UNEVEN = 1.4  # rows more than this much longer than the shortest of a part begin a new one


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        loss: Scalar, with its graph.
        parts: Its terms and other figures, for the log.
        n_tokens: Tokens read, documents and rows.
        weight: What the loss weighs beside those of other parts of one batch.
    """

    loss: torch.Tensor
    parts: dict[str, float] = field(default_factory=dict)
    n_tokens: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Followed:
    """Rows of a batch, of about the same length, as tensors.

    Attributes:
        ids: `(rows, n)`, padded.
        lengths: `(rows,)`.
        groups: `(rows,)`, what each follows.
        wanted: Bool `(rows, n)`, tokens whose successors are predicted.
        weights: `(number of wanted,)`.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    groups: torch.Tensor
    wanted: torch.Tensor
    weights: torch.Tensor

    def ask(self, backbone: Backbone, entries: Entries, *, outputs: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits at the wanted tokens: `(number of wanted, vocab_size)`; `outputs` as in `Entries.ask`."""
        return entries.ask(backbone, self.ids, self.lengths, self.groups, self.wanted, outputs=outputs)


def follow(batch: Batch, teacher: Entries, backbone: Backbone, settings: TrainSettings) -> list[Followed]:
    """The rows of a batch, in parts of similar length; rows that want an answer get the teacher's greedy one.

    In one part, a span of 46 tokens beside questions of 20 would make most of what is computed padding.
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
    ids, lengths = pad(ids_of, device=device)
    place = torch.arange(ids.shape[1], device=device)
    asked = torch.tensor([row.n_asked for row in rows], device=device)[:, None]
    told = (place >= asked - 1) & (place < lengths[:, None] - 1)
    question = (place < asked - 1) & (settings.question_weight > 0)
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
    """Greedy answers of at most `most` tokens, each up to and including the token that ends it."""
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
    """The loss of one batch; see `TrainSettings` for its terms.

    Args:
        adapter: Whose scorer and LoRA carry gradients.
        batch: From `Batches.batch`.
        settings: Of the run.
    """
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)
    n_documents = len(batch.documents)
    kept = [n_kept_for(len(document), batch.keep_ratio) for document in batch.documents]
    n_kept = torch.tensor(kept, device=backbone.device)
    with torch.no_grad():
        cache = backbone.prefixed_cache(ids.shape[1], batch_size=n_documents)
        backbone.read(ids, cache, lengths=lengths if n_documents > 1 else None)
        apart = gather_entries(backbone, cache, lengths)
        full = join_entries(backbone, apart, lengths, batch.groups)
        parts = follow(batch, full, backbone, settings)
        attended: list[list[torch.Tensor]] = [[] for _ in parts]
        with_outputs = settings.output_weight > 0
        taught = [
            part.ask(backbone, full, outputs=outputs if with_outputs else None)
            for part, outputs in zip(parts, attended, strict=True)
        ]
    reading = read_documents(adapter, ids, lengths, n_kept)
    learns = settings.lr_scorer_distil > 0
    student_entries = gather_entries(
        backbone, reading.cache, lengths, reading.selected, reading.scores if learns else None
    )
    distilled = join_entries(backbone, student_entries, lengths, batch.groups)
    weight = torch.cat([part.weights for part in parts]).sum()
    divergence = torch.zeros((), device=backbone.device)
    outputs_apart = torch.zeros((), device=backbone.device)
    for part, teacher, wanted_outputs in zip(parts, taught, attended, strict=True):
        outputs: list[torch.Tensor] = []
        logits = part.ask(backbone, distilled, outputs=outputs if with_outputs else None)
        apart_by = distillation_loss(teacher, logits, forward_weight=settings.forward_weight)
        divergence = divergence + (apart_by * part.weights).sum() / weight
        if with_outputs:
            errors = output_error(wanted_outputs, outputs)
            outputs_apart = outputs_apart + (errors * part.weights).sum() / weight
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


def _askings(batch: Batch, parts: list[Followed], backbone: Backbone) -> list[Asked]:
    """What pays the attention that scorers are trained on: repetition, and the rows behind documents read alone."""
    askings = [repetition(backbone, batch.documents)]
    alone = torch.tensor([group[0] if len(group) == 1 else -1 for group in batch.groups], device=backbone.device)
    for part in parts:
        documents = alone[part.groups]
        if bool((documents >= 0).any()):
            chosen = documents >= 0
            askings.append(Asked(part.ids[chosen], part.lengths[chosen], documents[chosen]))
    return askings


def warmup_step(adapter: Adapter, batch: Batch, *, settings: TrainSettings) -> StepResult:
    """The loss of the scorer alone. Arguments as in `distillation_step`; the LoRA takes no part."""
    backbone = adapter.backbone
    ids, lengths = pad(batch.documents, device=backbone.device)
    n_documents = len(batch.documents)
    one = torch.ones(n_documents, dtype=torch.int64, device=backbone.device)
    reading = read_documents(adapter, ids, lengths, one, routed=False)
    full = gather_entries(backbone, reading.cache, lengths)
    parts = follow(batch, full, backbone, settings)
    labels = received_attention(backbone, full, _askings(batch, parts, backbone))
    loss = scorer_loss(reading.scores, labels, lengths, budget=adapter.config.budget)
    n_tokens = int(lengths.sum())
    figures = {"scorer": float(loss.detach())}
    return StepResult(loss=loss, parts=figures, n_tokens=2 * n_tokens, weight=n_tokens)


def output_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the student's attention outputs are from the teacher's, as a share of their squared length.

    Args:
        teacher: Of every layer `(n, num_heads * head_dim)`.
        student: The same.

    Returns:
        `(n,)`, float32, the mean over layers: 0 where they are the same, 1 where the student's are 0.
    """
    shares = [
        (s.float() - t.float()).square().sum(-1) / (t.float().square().sum(-1) + 1e-6)
        for t, s in zip(teacher, student, strict=True)
    ]
    return torch.stack(shares).mean(0)
