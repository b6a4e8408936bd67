"""Options, progress, report and state of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError
from kv_memory.train.optimizer import Stage
from kv_memory.train.settings import TrainSettings

__all__ = ["Evaluation", "RunOptions", "RunState", "TrainProgress", "TrainReport"]


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
        gradient_checkpointing: Recompute layers in the backward pass to save memory, see `checkpointing`.

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
        for name, least in (("checkpoint_every", 1), ("keep_checkpoints", 1), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}", where=name)
        if self.time_limit_s is not None and not 0 < self.time_limit_s < math.inf:
            raise ConfigError(f"time_limit must be above 0 s, got {self.time_limit_s}", where="time_limit")
        if self.fit_steps and self.time_limit_s is None:
            raise ConfigError("fit_steps needs a time limit", where="time_limit")


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Progress of a run after a step.

    Attributes:
        step: Number of steps done.
        n_steps: Total number of steps, over both stages.
        stage: `warmup` or `distillation`.
        loss: Loss of this step.
        n_tokens: Number of tokens processed so far, by this and earlier parts of the run.
        elapsed_s: Seconds so far, in this and earlier parts of the run.
    """

    step: int
    n_steps: int
    stage: Stage
    loss: float
    n_tokens: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """KL to the full cache on held-out examples, in nats per token.

    Attributes:
        kl: KL of the adapter, by keep ratio.
        score: Mean over the keep ratios; the best checkpoint has the lowest score.
    """

    kl: Mapping[float, float]
    score: float


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Result of a run.

    Attributes:
        adapter: Folder of the finished adapter.
        step: Number of steps done.
        n_steps: Number of steps planned.
        best_step: Step of the finished adapter: the one with the best evaluation, or the last.
        loss: Mean loss over the last 50 steps; None without steps.
        evaluation: Evaluation of that adapter; None if nothing was evaluated.
        baseline: KL by keep ratio of the reconstruction selector, which needs no training; None if not measured.
        none: KL without any document; None if not measured.
        n_held_out: Number of documents in the evaluation.
        n_examples: Number of training examples.
        n_tokens: Number of tokens processed.
        elapsed_s: Seconds of all parts of the run.
        settings: Settings of the run, with the final numbers of steps.
        plotted: True if `loss.png` was drawn.
    """

    adapter: Path
    step: int
    n_steps: int
    best_step: int
    loss: float | None
    evaluation: Evaluation | None
    baseline: Mapping[float, float] | None
    none: float | None
    n_held_out: int
    n_examples: int
    n_tokens: int
    elapsed_s: float
    settings: TrainSettings
    plotted: bool


@dataclass(kw_only=True)
class RunState:
    """State that changes from step to step, besides parameters and optimiser; part of every checkpoint.

    Attributes:
        step: Number of steps done.
        n_tokens: Number of tokens processed.
        earlier_s: Seconds of the earlier parts of the run.
        pieces: Number of parts into which batches are split after the GPU ran out of memory; else 1.
        base_steps: Number of steps that the adapter was trained for before the run.
        evaluation: Last evaluation; None before the first.
        baseline: KL of the reconstruction selector, see `TrainReport`.
        none: KL without any document, see `TrainReport`.
    """

    step: int = 0
    n_tokens: int = 0
    earlier_s: float = 0.0
    pieces: int = 1
    base_steps: int = 0
    evaluation: Evaluation | None = None
    baseline: Mapping[float, float] | None = None
    none: float | None = None
    _begin_s: float = field(default_factory=time.monotonic)

    @property
    def here_s(self) -> float:
        """Seconds since the start of this part of the run."""
        return time.monotonic() - self._begin_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of all parts of the run."""
        return self.earlier_s + self.here_s

    def to_json(self) -> dict[str, Any]:
        """The state for a checkpoint, without the step, which the checkpoint has itself."""
        return {
            "n_tokens": self.n_tokens,
            "elapsed_s": self.elapsed_s,
            "pieces": self.pieces,
            "base_steps": self.base_steps,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "baseline": None if self.baseline is None else dict(self.baseline),
            "none": self.none,
        }

    @classmethod
    def from_json(cls, step: int, data: Mapping[str, Any]) -> RunState:
        """Inverse of `to_json`; keep ratios, which are strings in JSON, become numbers again."""
        return cls(
            step=step,
            n_tokens=data["n_tokens"],
            earlier_s=data["elapsed_s"],
            pieces=data["pieces"],
            base_steps=data["base_steps"],
            evaluation=evaluation_of(data),
            baseline=None if data["baseline"] is None else _by_ratio(data["baseline"]),
            none=data["none"],
        )


def evaluation_of(data: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation in a checkpoint's state."""
    found = data["evaluation"]
    return None if found is None else Evaluation(kl=_by_ratio(found["kl"]), score=found["score"])


def _by_ratio(data: Mapping[str, float]) -> dict[float, float]:
    return {float(ratio): value for ratio, value in data.items()}
