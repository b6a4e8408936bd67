"""The training loop: two stages, one counter of steps, exact resume.

A step depends on the settings, its number, and the parameters before it, on nothing else: batches are drawn from
`(seed, step)`, the learning rate is a function of the step, and nothing in the models is random. So a run that is
killed and resumed from a checkpoint goes the way of one that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.datasets import Example
from kv_memory.errors import CheckpointError, ConfigError, DivergedError
from kv_memory.train.adapters import save_adapter
from kv_memory.train.batches import Batches
from kv_memory.train.checkpoints import Checkpoint, Checkpoints
from kv_memory.train.estimate import Estimate, fit_steps, measure
from kv_memory.train.gradients import Figures, Gradients, Stage, trainable
from kv_memory.train.heldout import HeldOut
from kv_memory.train.log import TrainLog
from kv_memory.train.optimizer import learning_rate, load_optimizer, make_optimizer, optimizer_tensors
from kv_memory.train.resume import check_resumable, data_sha256
from kv_memory.train.settings import TrainSettings

__all__ = ["Evaluation", "RunOptions", "TrainProgress", "TrainReport", "Trainer"]

logger = logging.getLogger(__name__)


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
    """KL to the full cache on held-out examples: nats a token, by keep ratio.

    Attributes:
        step: After which it was measured.
        kl: Of the adapter.
        score: The mean over keep ratios; the best checkpoint has the lowest.
    """

    step: int
    kl: dict[float, float]
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
        n_eval_documents: On how many.
        n_tokens: Read.
        elapsed_s: Of all parts of the run.
        settings: As they were, the number of steps fixed.
    """

    adapter: Path
    step: int
    n_steps: int
    best_step: int
    loss: float | None
    evaluation: Evaluation | None
    baseline: dict[float, float] | None
    none: float | None
    n_eval_documents: int
    n_tokens: int
    elapsed_s: float
    settings: TrainSettings


@dataclass
class _Run:
    """What changes from step to step, besides the parameters."""

    step: int = 0
    n_tokens: int = 0
    elapsed_s: float = 0.0
    pieces: int = 1
    evaluation: Evaluation | None = None
    baseline: dict[float, float] | None = None
    none: float | None = None
    started_s: float = field(default_factory=time.monotonic)


class Trainer:
    """Trains one adapter.

    Args:
        adapter: Attached to its backbone; `adapters.new_adapter`, or one that is to be trained further.
        examples: To train on.
        settings: What decides the result.
        out: The run's folder: `checkpoints/`, `log.jsonl`, `loss.png`, and at the end `adapter/`.
        options: How it is carried out.
        held_out: Examples for evaluation; none of them in `examples`.
        on_progress: Called after each step.

    Raises:
        TrainingError: Accelerate is not installed.
        DatasetError: There are no examples.
    """

    def __init__(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        *,
        settings: TrainSettings,
        out: Path,
        options: RunOptions | None = None,
        held_out: Sequence[Example] = (),
        on_progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.out = out
        self._options = options or RunOptions()
        self._examples = examples
        self._held_out = held_out
        self._on_progress = on_progress
        self._base_steps = adapter.config.trained_steps
        self._accelerator = _accelerator(adapter)
        self._checkpoints = Checkpoints(out / "checkpoints", keep=self._options.keep_checkpoints)
        self._log = TrainLog(out / "log.jsonl")
        self._batches = Batches(examples, adapter.backbone, settings)
        self._heldout: HeldOut | None = None
        if held_out and self._options.eval_every:
            self._heldout = HeldOut(held_out, adapter.backbone, settings, ratios=self._options.eval_ratios)

    def estimate(self, *, n_steps: int = 3) -> Estimate:
        """What the run will take, from a few steps that change nothing; nothing is written."""
        return measure(self._gradients(_Run()), self.adapter, self.settings, n_steps=n_steps)

    def run(self, *, resume: bool = False) -> TrainReport:
        """Train to the end, or to the time limit.

        Args:
            resume: Go on from the newest checkpoint; from the beginning where there is none yet.

        Raises:
            CheckpointError: There is a run in this folder already; or, resuming, it had other settings or data.
            AdapterMismatchError: Resuming, the run was one of another model.
            DivergedError: A loss or gradient is not finite; the checkpoints before it are kept.
            TrainingError: The GPU's memory is too small for a single document.
        """
        run, tensors = self._resume() if resume else self._start()
        if self._main:
            self.out.mkdir(parents=True, exist_ok=True)
            self._log.truncate(run.step)
        if run.step == 0:
            self._before_the_first_step(run)
        self._steps(run, tensors)
        return self._finish(run)

    # -- beginning -------------------------------------------------------------------------------------------------

    @property
    def _main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self._accelerator.is_main_process)

    @property
    def _n_steps(self) -> int:
        return self.settings.warmup_steps + self.settings.steps

    def _stage(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        return "warmup" if step < self.settings.warmup_steps else "distillation"

    def _gradients(self, run: _Run) -> Gradients:
        def note(text: str) -> None:
            run.pieces = gradients.pieces
            if self._main and self.out.is_dir():
                self._log.write(event="out_of_memory", step=run.step, note=text)

        gradients = Gradients(
            self.adapter,
            self._batches,
            self.settings,
            accelerator=self._accelerator,
            gradient_checkpointing=self._options.gradient_checkpointing,
            pieces=run.pieces,
            on_split=note,
        )
        return gradients

    def _start(self) -> tuple[_Run, dict[str, torch.Tensor]]:
        if self._checkpoints.steps():
            raise CheckpointError(
                "there is a run in this folder already",
                where=str(self.out),
                next_step="Go on with --resume, or name another folder.",
            )
        return _Run(), {}

    def _resume(self) -> tuple[_Run, dict[str, torch.Tensor]]:
        checkpoint = self._checkpoints.newest()
        if checkpoint is None:
            logger.warning("nothing to resume in %s: starting from the beginning", self.out)
            return _Run(), {}
        state = checkpoint.state
        if self._options.fit_steps:  # they were fitted when the run began
            told = state["settings"]
            self.settings = replace(self.settings, warmup_steps=told["warmup_steps"], steps=told["steps"])
        check_resumable(checkpoint, self._identity(), backbone=self.adapter.backbone)
        self._base_steps = int(state["base_steps"])
        evaluation = state["evaluation"]
        run = _Run(
            step=checkpoint.step,
            n_tokens=int(state["n_tokens"]),
            elapsed_s=float(state["elapsed_s"]),
            pieces=int(state["pieces"]),
            baseline=_by_ratio(state["baseline"]),
            none=state["none"],
        )
        if evaluation is not None:
            run.evaluation = Evaluation(
                step=evaluation["step"], kl=_by_ratio(evaluation["kl"]) or {}, score=evaluation["score"]
            )
        for name, parameter in self._parameters().items():
            parameter.data = checkpoint.tensors[f"parameter/{name}"].to(parameter.device)
        return run, dict(checkpoint.tensors)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is ever trained, in float32."""
        return {
            **trainable(self.adapter, self.settings, "warmup"),
            **trainable(self.adapter, self.settings, "distillation"),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        return {
            "settings": asdict(self.settings),
            "weights_sha256": self.adapter.backbone.weights_sha256,
            "data_sha256": data_sha256(self._examples),
            "prompt": self.adapter.backbone.prompt.digest,
            "n_processes": self._accelerator.num_processes,
        }

    def _before_the_first_step(self, run: _Run) -> None:
        """Baselines on the held-out examples, and the number of steps where the time decides it."""
        evaluation_s = 0.0
        if self._heldout is not None and self._main:
            begin_s = time.monotonic()
            run.none = self._heldout.none()
            run.baseline = self._heldout.reconstruction()
            evaluation_s = (time.monotonic() - begin_s) / 2
            self._log.write(event="baseline", step=0, kl=_by_name(run.baseline), none=run.none)
        if self._options.fit_steps:
            assert self._options.time_limit_s is not None
            estimate = self.estimate()
            spent_s = time.monotonic() - run.started_s
            fitted = fit_steps(
                self.settings,
                estimate,
                time_limit_s=self._options.time_limit_s - spent_s,
                evaluation_s=evaluation_s,
                eval_every=self._options.eval_every if self._heldout else 0,
            )
            n_steps = self._agree(torch.tensor([fitted.warmup_steps, fitted.steps])).tolist()
            self.settings = replace(self.settings, warmup_steps=int(n_steps[0]), steps=int(n_steps[1]))

    def _agree(self, value: torch.Tensor) -> torch.Tensor:
        """What the main process says, for all of them."""
        if self._accelerator.num_processes == 1:
            return value
        mine = value.to(self._accelerator.device).float() * self._main
        said: torch.Tensor = self._accelerator.reduce(mine, "sum")
        return said

    # -- steps -----------------------------------------------------------------------------------------------------

    def _steps(self, run: _Run, tensors: dict[str, torch.Tensor]) -> None:
        options, gradients = self._options, self._gradients(run)
        stage: Stage | None = None
        before_s = run.elapsed_s
        while run.step < self._n_steps:
            if self._stage(run.step) != stage:
                stage = self._stage(run.step)
                parameters = trainable(self.adapter, self.settings, stage)
                optimizer = make_optimizer(parameters, self.settings)
                load_optimizer(optimizer, parameters, tensors if tensors.get(f"stage/{stage}") is not None else {})
                tensors = {}
            self._step(run, gradients, stage, parameters, optimizer)
            run.elapsed_s = before_s + time.monotonic() - run.started_s
            late = options.time_limit_s is not None and run.elapsed_s - before_s > options.time_limit_s
            late = bool(self._agree(torch.tensor([float(late)]))[0])
            last = run.step == self._n_steps or late
            evaluated = self._heldout is not None and (last or run.step % options.eval_every == 0)
            if evaluated:
                self._evaluate(run)
            if evaluated or last or run.step % options.checkpoint_every == 0:
                self._save(run, stage, optimizer, parameters, evaluated=evaluated)
            if late and run.step < self._n_steps:
                logger.warning("the time is over after step %d of %d", run.step, self._n_steps)
                return

    def _step(
        self,
        run: _Run,
        gradients: Gradients,
        stage: Stage,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        begin_s = time.monotonic()
        figures = gradients.compute(run.step, stage, parameters)
        norm = float(self._accelerator.clip_grad_norm_(list(parameters.values()), self.settings.clip_norm))
        if not (math.isfinite(figures.loss) and math.isfinite(norm)):
            self._diverged(run, figures, norm)
        begin = 0 if stage == "warmup" else self.settings.warmup_steps
        length = self.settings.warmup_steps if stage == "warmup" else self.settings.steps
        rates = learning_rate(optimizer, run.step - begin, length, rise=self.settings.rise)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.n_tokens += figures.n_tokens
        elapsed_s = run.elapsed_s + time.monotonic() - begin_s
        if self._main:
            self._log.write(
                step=run.step,
                stage=stage,
                loss=figures.loss,
                parts={name: value for name, value in figures.parts.items() if name != "keep_ratio"},
                keep_ratio=figures.parts.get("keep_ratio"),
                lr=rates,
                grad_norm=norm,
                n_tokens=run.n_tokens,
                elapsed_s=round(elapsed_s, 3),
            )
        if self._on_progress is not None:
            self._on_progress(
                TrainProgress(
                    step=run.step,
                    n_steps=self._n_steps,
                    stage=stage,
                    loss=figures.loss,
                    n_tokens=run.n_tokens,
                    elapsed_s=elapsed_s,
                )
            )

    def _diverged(self, run: _Run, figures: Figures, norm: float) -> None:
        if self._main:
            self._log.write(event="diverged", step=run.step, loss=figures.loss, grad_norm=norm)
        what = f"the loss is {figures.loss}" if not math.isfinite(figures.loss) else f"the gradient's norm is {norm}"
        steps = self._checkpoints.steps()
        if steps:
            good = self._checkpoints.folder(steps[-1]) / "adapter"
            next_step = f"Start again from the last good state, with lower learning rates: --init {good}"
        else:
            next_step = "Start again with lower learning rates (--lr-lora, --lr-scorer)."
        raise DivergedError(f"{what} at step {run.step + 1}", where=str(self.out), next_step=next_step)

    def _evaluate(self, run: _Run) -> None:
        assert self._heldout is not None
        if self._main:
            kl = self._heldout.adapter(self.adapter)
            run.evaluation = Evaluation(step=run.step, kl=kl, score=sum(kl.values()) / len(kl))
            self._log.write(event="evaluation", step=run.step, kl=_by_name(kl), score=run.evaluation.score)
        self._accelerator.wait_for_everyone()

    def _save(
        self,
        run: _Run,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        *,
        evaluated: bool,
    ) -> None:
        if self._main:
            tensors: dict[str, torch.Tensor] = {f"stage/{stage}": torch.ones(1)}
            tensors |= {f"parameter/{name}": p for name, p in self._parameters().items()}
            tensors |= optimizer_tensors(optimizer, parameters)
            trainable(self.adapter, self.settings, stage)  # `_parameters` has frozen and thawed
            state = {
                **self._identity(),
                "base_steps": self._base_steps,
                "n_tokens": run.n_tokens,
                "elapsed_s": run.elapsed_s,
                "pieces": run.pieces,
                "evaluation": None if run.evaluation is None else _plain(run.evaluation),
                "baseline": None if run.baseline is None else _by_name(run.baseline),
                "none": run.none,
                "score": run.evaluation.score if evaluated and run.evaluation else None,
            }
            self._checkpoints.save(
                Checkpoint(step=run.step, state=state, tensors=tensors),
                write_adapter=lambda folder: self._write_adapter(folder, run.step),
            )
        self._accelerator.wait_for_everyone()

    def _write_adapter(self, folder: Path, step: int) -> None:
        save_adapter(self.adapter, folder, trained_steps=self._base_steps + step)

    # -- end -------------------------------------------------------------------------------------------------------
