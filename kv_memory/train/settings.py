"""Settings that determine the result of a training run, their presets, and the options that do not affect it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from kv_memory.compress.adapter import Routed, Target
from kv_memory.compress.scorer import ScorerKind
from kv_memory.config import Budget, check_at_least, check_choices, check_fields, check_keep_ratio, check_names
from kv_memory.errors import ConfigError

Answers = Literal["people", "teacher"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run, recorded in its checkpoints and compared when it is resumed.

    Attributes:
        scorer: Kind of scorer: one score per token, as in the paper; per layer and KV head, from one hidden state; or
            the same from the input of each layer.
        scorer_size: Width of the scorer's hidden layer.
        eta: Number of the layer that supplies the scorer's input, unless each layer has its own; `default_eta` if None.
        routed: Tokens that go through the LoRA: those that are kept, as in the paper, or the whole document.
        budget: Distribution of entries: the same number for every head, or one ranking over all heads of the model.
        first_routed_layer: First layer with the LoRA.
        full_strength_ratio: Keep ratio above which the LoRA acts less; at 1 it always acts in full, as in the paper.
        targets: Projections that the LoRA adapts.
        restore_tokens: Number of restore tokens, see preset `restore`; 0 for a scorer. With restore tokens the warm-up
            and everything about the scorer have no meaning.
        rank: Rank of the LoRA.
        alpha: Scaling of the LoRA; twice the rank if None.
        warmup_steps: Number of steps of stage (a): the scorer alone, on the attention that tokens receive.
        steps: Number of steps of stage (b): distillation of scorer and LoRA.
        seed: Random seed of initial weights and of everything drawn.
        batch_documents: Number of groups per batch: single documents, or several joined ones.
        accumulate: Number of batches per step, each with its own keep ratio.
        lr_scorer: Learning rate of the scorer in stage (a).
        lr_lora: Learning rate of the LoRA.
        lr_restore: Learning rate of the embeddings and biases of restore tokens.
        lr_scorer_distil: Learning rate of the scorer in stage (b); 0 freezes it.
        rise: Share of each stage in which the learning rate rises; it then decays linearly.
        weight_decay: Weight decay of AdamW on the scorer; the LoRA has none.
        forward_weight: Weight λ of KL(teacher‖student) in the objective; KL(student‖teacher) has 1 - λ.
        warmup_weight: Weight of the warm-up's loss in stage (b), relative to the distillation loss.
        ratio_power: Exponent of the keep ratio in the factor on the loss. At 0, small ratios, with the largest
            divergence, dominate; at 1, all ratios have about the same influence.
        min_ratio: Smallest keep ratio. Ratios are drawn log-uniformly between `min_ratio` and `max_ratio`.
        max_ratio: Largest keep ratio, see `min_ratio`.
        max_tokens: Longest document in tokens, or joined documents together, wrappers included. A longer document is
            cut to a random window.
        composition_share: Probability that a group joins two or three separately prefilled documents.
        questions_per_document: Maximum number of questions per document.
        spans_per_document: Number of spans of the document to repeat or continue; two more without questions.
        span_tokens: Length of a span in tokens.
        question_weight: Loss weight of the tokens of questions and requests; tokens of answers and spans have 1.
        answers: Source of the answers: `people` for the data set's, `teacher` for the teacher's own greedy ones.
        answer_tokens: Longest answer in tokens.

    Raises:
        ConfigError: A value is out of range, or there would be neither questions nor spans.
    """

    scorer: ScorerKind = "layer"
    scorer_size: int = 64
    eta: int | None = None
    routed: Routed = "document"
    budget: Budget = "model"
    first_routed_layer: int = 0
    full_strength_ratio: float = 0.0625
    targets: tuple[Target, ...] = ("q", "k", "v", "o")
    restore_tokens: int = 0
    rank: int = 32
    alpha: float | None = None
    warmup_steps: int = 300
    steps: int = 3000
    seed: int = 0
    batch_documents: int = 1
    accumulate: int = 1
    lr_scorer: float = 2e-3
    lr_lora: float = 5e-4
    lr_restore: float = 1e-3
    lr_scorer_distil: float = 1e-4
    rise: float = 0.02
    weight_decay: float = 0.01
    forward_weight: float = 0.6
    warmup_weight: float = 0.0
    ratio_power: float = 1.0
    min_ratio: float = 0.03
    max_ratio: float = 0.5
    max_tokens: int = 400
    composition_share: float = 0.1
    questions_per_document: int = 5
    spans_per_document: int = 1
    span_tokens: int = 24
    question_weight: float = 0.3
    answers: Answers = "people"
    answer_tokens: int = 48

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("min_ratio", "max_ratio", "full_strength_ratio"):
            check_keep_ratio(getattr(self, name), where=name)
        if self.min_ratio > self.max_ratio:
            raise ConfigError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}", where="min_ratio")
        check_at_least(
            self, 0, "warmup_steps", "steps", "questions_per_document", "spans_per_document", "lr_scorer", "lr_lora"
        )
        check_at_least(self, 1, "rank", "scorer_size", "batch_documents", "accumulate", "max_tokens", "span_tokens")
        check_at_least(self, 1, "answer_tokens")
        check_at_least(self, 0, "restore_tokens", "lr_restore")
        if self.restore_tokens and (self.warmup_steps or self.warmup_weight):
            raise ConfigError(
                "restore tokens have no scorer to warm up",
                where="restore_tokens",
                next_step="Use the preset `restore`, or set warmup_steps=0 and warmup_weight=0.",
            )
        for name in ("forward_weight", "composition_share", "rise", "question_weight"):
            check_fields(self, **{name: (0 <= getattr(self, name) <= 1, "in [0, 1]")})
        if self.questions_per_document + self.spans_per_document == 0:
            raise ConfigError(
                "questions_per_document and spans_per_document must not both be 0", where="questions_per_document"
            )


PRESETS: dict[str, TrainSettings] = {
    "default": TrainSettings(),
    # KV-Distill as published: one score per token; W_Q and W_O adapted for the kept tokens in all layers.
    "paper": TrainSettings(
        scorer="token",
        scorer_size=256,
        routed="kept",
        budget="head",
        full_strength_ratio=1.0,
        targets=("q", "o"),
        ratio_power=0.0,
    ),
    # A few learned tokens behind the document, and a LoRA for them alone; `matched` selects and fits the rest.
    "restore": TrainSettings(
        restore_tokens=4,
        rank=16,
        lr_lora=1e-3,
        lr_restore=5e-4,
        warmup_steps=0,
        min_ratio=0.01,
        max_ratio=0.25,
        ratio_power=0.5,
        composition_share=0.25,
        questions_per_document=4,
        question_weight=0.0,
        answers="teacher",
        answer_tokens=16,
    ),
}


def preset(name: str, **changes: object) -> TrainSettings:
    """The settings of a preset, with optional changes.

    Raises:
        ConfigError: The preset does not exist, or a change is out of range.
    """
    check_names([name], PRESETS, what="preset", where="preset")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


WINDOW_TOKENS = 1500  # longest window of a corpus
# Differences from training on question data sets: keep ratios down to 1/200, long documents, more spans.
_DOMAIN = {"min_ratio": 0.005, "max_ratio": 0.3, "max_tokens": WINDOW_TOKENS + 36, "spans_per_document": 3}


def domain_settings(settings: TrainSettings, *, given: Collection[str] = ()) -> TrainSettings:
    """Settings for domain tuning; those with names in `given` were chosen explicitly, and are not changed."""
    changes = {name: value for name, value in _DOMAIN.items() if name not in given}
    if "min_ratio" in given:
        changes.pop("max_ratio", None)  # the given min_ratio may be above our max_ratio
    if "max_ratio" in given and settings.max_ratio < _DOMAIN["min_ratio"]:
        changes["min_ratio"] = settings.max_ratio
    return replace(settings, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that do not affect the result of a step.

    Attributes:
        checkpoint_every: Number of steps between checkpoints.
        keep_checkpoints: Number of newest checkpoints to keep, in addition to the best.
        eval_every: Number of steps between evaluations; 0 for no evaluation. Each is followed by a checkpoint.
        eval_ratios: Keep ratios of the evaluations.
        time_limit_s: Time in seconds after which the run writes a checkpoint and stops; None for no limit.
        fit_steps: Fit the numbers of steps to the time limit, instead of taking them from the settings.
        gradient_checkpointing: Recompute layers in the backward pass: much less memory, and a third more time.

    Raises:
        ConfigError: A number is out of range, or `fit_steps` is set without a time limit.
    """

    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 0
    eval_ratios: tuple[float, ...] = (0.25, 0.125, 0.0625)
    time_limit_s: float | None = None
    fit_steps: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "checkpoint_every", "keep_checkpoints")
        check_at_least(self, 0, "eval_every")
        check_fields(self, time_limit_s=(self.time_limit_s is None or 0 < self.time_limit_s < math.inf, "above 0"))
        if self.fit_steps and self.time_limit_s is None:
            raise ConfigError("fit_steps needs a time limit", where="time_limit_s")
