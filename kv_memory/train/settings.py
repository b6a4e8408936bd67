"""What decides the result of a training run, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kv_memory.compress.adapter import Routed, Target
from kv_memory.compress.scorer import ScorerKind
from kv_memory.config import Budget, check_choice, check_keep_ratio
from kv_memory.errors import ConfigError

__all__ = ["PRESETS", "Answers", "TrainSettings", "preset"]

Answers = Literal["people", "teacher"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run; written into its checkpoints, and compared when it is resumed.

    Attributes:
        scorer: Kind of scorer, see `AdapterConfig`.
        scorer_size: Width of its hidden layer.
        eta: The layer it looks at; `default_eta` if None.
        routed: Which tokens go through the LoRA, see `AdapterConfig`.
        budget: How entries are shared out, see `Budget`.
        first_routed_layer: See `AdapterConfig`.
        full_strength_ratio: See `AdapterConfig`.
        targets: Which projections the LoRA adapts.
        rank: Of the LoRA.
        alpha: LoRA scaling; twice the rank if None.
        warmup_steps: Steps of stage (a): the scorer alone, towards the attention that tokens receive.
        steps: Steps of stage (b): scorer and LoRA by distillation.
        seed: Of initial weights and of everything drawn.
        batch_documents: Documents a batch.
        accumulate: Batches a step; each has a keep ratio of its own.
        lr_scorer: Learning rate of the scorer in stage (a).
        lr_lora: Learning rate of the LoRA.
        lr_scorer_distil: Learning rate of the scorer in stage (b); 0 freezes it.
        rise: Share of each stage in which the learning rate rises; it falls linearly afterwards.
        weight_decay: Of AdamW, on the scorer; the LoRA has none.
        clip_norm: Gradients longer than this are shortened.
        forward_weight: λ of the objective.
        warmup_weight: Weight of the warm-up's loss beside the distillation's in stage (b).
        output_weight: Weight of a term that brings attention outputs of the student to the teacher's.
        ratio_power: Losses are multiplied by their keep ratio to this power (and a constant): at 0 small ratios, whose
            divergence is largest, decide nearly everything; at 1 all count about the same.
        min_ratio: Keep ratios are drawn between this and `max_ratio`, evenly on a logarithmic scale.
        max_ratio: See `min_ratio`.
        max_tokens: Longest document; longer ones are cut at a random place.
        composition_share: Share of the steps in which several documents, read apart, are joined.
        most_joined: How many at most.
        questions_per_document: At most.
        spans_per_document: Spans of the document that are to be repeated or gone on with.
        span_tokens: Length of a span.
        question_weight: Weight of the tokens of questions and requests; those of answers and spans weigh 1.
        answers: Whose answers the loss is taken over: those written by people, or the teacher's own greedy ones.
        answer_tokens: Longest answer.
    """

    scorer: ScorerKind = "layer"
    scorer_size: int = 64
    eta: int | None = None
    routed: Routed = "document"
    budget: Budget = "model"
    first_routed_layer: int = 0
    full_strength_ratio: float = 0.0625
    targets: tuple[Target, ...] = ("q", "k", "v", "o")
    rank: int = 32
    alpha: float | None = None
    warmup_steps: int = 300
    steps: int = 3000
    seed: int = 0
    batch_documents: int = 1
    accumulate: int = 1
    lr_scorer: float = 2e-3
    lr_lora: float = 5e-4
    lr_scorer_distil: float = 1e-4
    rise: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    forward_weight: float = 0.6
    warmup_weight: float = 0.0
    output_weight: float = 0.0
    ratio_power: float = 1.0
    min_ratio: float = 0.03
    max_ratio: float = 0.5
    max_tokens: int = 400
    composition_share: float = 0.1
    most_joined: int = 3
    questions_per_document: int = 5
    spans_per_document: int = 1
    span_tokens: int = 24
    question_weight: float = 0.3
    answers: Answers = "people"
    answer_tokens: int = 48

    def __post_init__(self) -> None:
        check_choice(self.scorer, ScorerKind, where="scorer")
        check_choice(self.routed, Routed, where="routed")
        check_choice(self.budget, Budget, where="budget")
        check_choice(self.answers, Answers, where="answers")
        for name in ("min_ratio", "max_ratio", "full_strength_ratio"):
            check_keep_ratio(getattr(self, name), where=name)
        if self.min_ratio > self.max_ratio:
            raise ConfigError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}", where="min_ratio")
        for name in (
            "rank",
            "scorer_size",
            "batch_documents",
            "accumulate",
            "max_tokens",
            "span_tokens",
            "answer_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", where=name)
        for name in ("warmup_steps", "steps", "questions_per_document", "spans_per_document", "lr_scorer", "lr_lora"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}", where=name)
        for name in ("forward_weight", "composition_share", "rise", "question_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in 0 to 1, got {getattr(self, name)}", where=name)
        if self.most_joined < 2:
            raise ConfigError(f"most_joined must be at least 2, got {self.most_joined}", where="most_joined")
        if self.questions_per_document + self.spans_per_document == 0:
            raise ConfigError("nothing would follow the documents", where="questions_per_document")


PRESETS: dict[str, TrainSettings] = {
    "default": TrainSettings(),
    # KV-Distill as published: one score a token, W_Q and W_O of the kept tokens in all layers.
    "paper": TrainSettings(
        scorer="token",
        scorer_size=256,
        routed="kept",
        budget="head",
        full_strength_ratio=1.0,
        targets=("q", "o"),
        ratio_power=0.0,
    ),
}


def preset(name: str, **changes: object) -> TrainSettings:
    """The settings of a preset, with changes.

    Raises:
        ConfigError: There is no such preset, or a change is out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", where="preset", next_step=f"Use one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
