"""What a run is told, what it tells, and what it remembers from step to step."""

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
    """How a run is carried out; none of this changes what a step does.

    Attributes:
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest are kept, besides the best.
        eval_every: Steps between evaluations; 0 for none. Each is followed by a checkpoint.
        eval_ratios: Keep ratios they measure at.
        time_limit_s: After so long the run stops, with a checkpoint; None for no limit.
        fit_steps: With a time limit: the number of steps is what the time allows, whatever the settings say.
        gradient_checkpointing: See `checkpointing`.
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
            raise ConfigError("without a time limit there is nothing to fit the steps to", where="time_limit")


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """How far a run is, after each step.

    Attributes:
        step: Steps done.
        n_steps: Of both stages.
        stage: `warmup` or `distillation`.
        loss: Of this step.
        n_tokens: Read so far, by this and earlier parts of the run.
        elapsed_s: So far, likewise.
    """

    step: int
    n_steps: int
    stage: Stage
    loss: float
    n_tokens: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """KL to the full cache on held-out examples: nats a token.

    Attributes:
        kl: Of the adapter, by keep ratio.
        score: The mean over keep ratios; the best checkpoint has the lowest.
    """

    kl: Mapping[float, float]
    score: float


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run came to.

    Attributes:
        adapter: The folder of the finished adapter.
        step: Steps done.
        n_steps: Steps planned.
        best_step: Whose adapter it is.
        loss: Mean over the last 50 steps; None without steps.
        evaluation: Of that adapter; None where nothing was evaluated.
        baseline: The same figures of the reconstruction selector, which needs no training.
        none: The same without any document.
        n_held_out: On how many documents that was measured.
        n_examples: Trained on.
        n_tokens: Read.
        elapsed_s: Of all parts of the run.
        settings: As they were, the number of steps fixed.
        plotted: Whether `loss.png` was drawn.
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
    """What changes from step to step, besides parameters and optimiser; part of every checkpoint.

    Attributes:
        step: Steps done.
        n_tokens: Read.
        earlier_s: Time that earlier parts of the run took.
        pieces: Parts into which batches are cut, since memory ran out.
        base_steps: Steps the adapter had been trained for before the run.
        evaluation: The last one.
        baseline: See `TrainReport`.
        none: See `TrainReport`.
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
        """Seconds since this part of the run began."""
        return time.monotonic() - self._begin_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of all parts of the run."""
        return self.earlier_s + self.here_s

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint. The step is not among it, the checkpoint has it."""
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
        """The state that `to_json` gave; keep ratios were made strings by JSON."""
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
