"""The training loop: two stages, one counter of steps, exact resume.

A step depends only on the settings, its number, and the parameters before it: batches are drawn from `(seed, step)`,
the learning rate is a function of the step, and nothing in the models is random. A run that is killed and resumed from
a checkpoint therefore gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import ctypes
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.datasets import Example
from kv_memory.errors import ConfigError, TrainingError
from kv_memory.train.adapters import Stage, parameters_of
from kv_memory.train.batches import Batches
from kv_memory.train.checkpoints import Checkpoint, Checkpoints, RunState, check_resumable, identity, replace_folder
from kv_memory.train.estimate import Estimate, fit_steps, measure
from kv_memory.train.evaluation import HeldOut
from kv_memory.train.gradients import Gradients
from kv_memory.train.json_lines import JsonLines
from kv_memory.train.optimizer import StageOptimizer
from kv_memory.train.settings import RunOptions, TrainSettings
from kv_memory.train.train_report import TrainProgress, TrainReport, plot_log

TRIM_EVERY = 25  # steps
_CLIP_NORM = 1.0  # longer gradients are clipped to this norm

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one adapter.

    With several processes (`accelerate launch`), each process has its own batches, and gradients are averaged.

    Args:
        adapter: Adapter attached to its backbone; from `new_adapter`, or an existing one to train further.
        examples: Training examples.
        settings: Settings that determine the result.
        out: Folder of the run, with `checkpoints/`, `log.jsonl`, `loss.png`, and at the end `adapter/`.
        options: Options that do not affect the result of a step.
        held_out: Evaluation examples, disjoint from `examples`.
        on_progress: Callback after each step.

    Attributes:
        settings: Settings as given; with `fit_steps`, the numbers of steps are set when the run starts.

    Raises:
        TrainingError: Accelerate is not installed.
        DatasetError: There are no examples.
        ConfigError: The model was loaded with int8 weights.
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
        if adapter.backbone.weights != "plain":
            raise ConfigError(
                f"an adapter cannot be trained on {adapter.backbone.weights} weights",
                where="weights",
                next_step="Load the model with weights='plain'.",
            )
        self.settings = settings
        self._adapter = adapter
        self._examples = examples
        self._out = out
        self._options = options or RunOptions()
        self._on_progress = on_progress
        self._accelerator = make_accelerator(adapter.backbone.device)
        self._is_main = bool(self._accelerator.is_main_process)  # the process that writes all files
        self._checkpoints = Checkpoints(out / "checkpoints", keep=self._options.keep_checkpoints)
        self._log = JsonLines(out / "log.jsonl")
        self._gradients = Gradients(
            adapter,
            Batches(examples, adapter.backbone, settings),
            settings,
            self._accelerator,
            self._options.gradient_checkpointing,
        )
        self._heldout: HeldOut | None = None
        if held_out and self._options.eval_every:
            self._heldout = HeldOut(held_out, adapter.backbone, settings, ratios=self._options.eval_ratios)
        self._state = RunState(base_steps=adapter.config.trained_steps)

    def estimate(self, *, n_steps: int = 3, spent_s: float = 0.0, evaluation_s: float = 0.0) -> Estimate:
        """Estimate the cost of the run from a few steps of each stage without updates; nothing is written.

        Steps are fitted to what is left of the time limit after `spent_s`, and to the seconds of each evaluation.
        """
        options, estimate = self._options, measure(self._gradients, n_steps=n_steps)
        if not options.fit_steps or options.time_limit_s is None:
            return estimate
        return fit_steps(
            estimate,
            time_limit_s=options.time_limit_s - spent_s,
            evaluation_s=evaluation_s,
            eval_every=options.eval_every if self._heldout else 0,
        )

    def run(self, *, resume: bool = False) -> TrainReport:
        """Train to the end, or to the time limit.

        Args:
            resume: Resume from the newest checkpoint; start from the beginning if there is no checkpoint yet.

        Raises:
            TrainingError: The folder already contains a run; or the resumed run had other settings, data or weights;
                or checkpoints are damaged or cannot be written; a loss or gradient is not finite; earlier checkpoints
                are kept; the GPU's memory is too small for the smallest part of a batch.
        """
        checkpoint = self._checkpoints.newest()
        if checkpoint is not None and not resume:
            raise already_there(self._out)
        if checkpoint is None and resume:
            logger.warning("nothing to resume in %s: starting a new run", self._out)
        self._state = RunState(base_steps=self._state.base_steps)  # its clock starts here
        if checkpoint is not None:
            self._restore(checkpoint)
        if self._is_main:
            self._out.mkdir(parents=True, exist_ok=True)
            self._log.truncate(self._state.step or -1)
        if checkpoint is None:
            self._prepare()
        self._train(checkpoint)
        return self._finish()

    # -- start -----------------------------------------------------------------------------------------------------

    @property
    def _n_steps(self) -> int:
        return self.settings.warmup_steps + self.settings.steps

    @property
    def _identity(self) -> dict[str, Any]:
        return identity(self.settings, self._adapter.backbone, self._examples, self._accelerator.num_processes)

    def _write_log(self, **record: Any) -> None:
        if self._is_main:
            self._log.append({"step": self._state.step, **record})

    def _restore(self, checkpoint: Checkpoint) -> None:
        then = checkpoint.state
        if self._options.fit_steps:  # they were fitted when the run started
            fitted = {name: then["settings"][name] for name in ("warmup_steps", "steps")}
            self.settings = replace(self.settings, **fitted)
        folder = self._checkpoints.folder(then["step"])
        check_resumable(then, self._identity, where=folder)
        for name, parameter in parameters_of(self._adapter).items():
            parameter.data = checkpoint.tensors[f"parameter/{name}"].to(parameter.device)
        self._state = RunState.from_json(then)
        self._gradients.pieces = self._state.pieces

    def _prepare(self) -> None:
        """Measure baselines on the held-out examples; with `fit_steps`, fit the numbers of steps to the time limit."""
        state, evaluation_s = self._state, 0.0
        if self._heldout is not None and self._is_main:
            state.none = self._heldout.none()
            before_s = state.here_s
            state.baseline = self._heldout.measure()
            evaluation_s = state.here_s - before_s
            self._write_log(event="baseline", kl=state.baseline, none=state.none)
        if self._options.fit_steps:
            fitted = self.estimate(spent_s=state.here_s, evaluation_s=evaluation_s)
            warmup_steps, steps = self._agreed(fitted.warmup_steps, fitted.steps)
            self.settings = replace(self.settings, warmup_steps=warmup_steps, steps=steps)

    def _agreed(self, *values: int) -> list[int]:
        """The main process's values, in all processes, because clocks differ."""
        mine = torch.tensor(values, device=self._accelerator.device) * self._is_main
        said: list[int] = self._accelerator.reduce(mine, "sum").tolist()
        return said

    # -- steps -----------------------------------------------------------------------------------------------------

    def _train(self, checkpoint: Checkpoint | None) -> None:
        options, state = self._options, self._state
        optimizer: StageOptimizer | None = None
        while state.step < self._n_steps:
            # 1. At the start of a stage: its optimiser, restored if the checkpoint is of this stage.
            stage: Stage = "warmup" if state.step < self.settings.warmup_steps else "distillation"
            if optimizer is None or optimizer.stage != stage:
                optimizer = StageOptimizer(self._adapter, self.settings, stage)
                if checkpoint is not None and checkpoint.state["stage"] == stage:
                    optimizer.load(checkpoint.tensors)
                checkpoint = None
            # 2. One step. All processes must agree on whether the time is over.
            self._step(optimizer)
            late = options.time_limit_s is not None and state.here_s > options.time_limit_s
            late = bool(self._agreed(int(late))[0])
            last = late or state.step == self._n_steps
            # 3. Evaluate, and write a checkpoint: every evaluation is followed by one.
            score = None
            evaluated = self._heldout is not None and (last or state.step % options.eval_every == 0)
            if evaluated and self._is_main and self._heldout is not None:
                state.kl = kl = self._heldout.measure(self._adapter)
                score = fmean(kl.values())
                self._write_log(event="evaluation", kl=kl, score=score)
            if evaluated or last or state.step % options.checkpoint_every == 0:
                self._save(optimizer, score)
            if late:
                logger.warning("time limit reached after %d of %d steps", state.step, self._n_steps)
                return

    def _step(self, optimizer: StageOptimizer) -> None:
        # 1. Gradients, clipped; a step that is not finite ends the run before it changes a parameter.
        state, parameters = self._state, list(optimizer.parameters.values())
        figures = self._gradients.compute(state.step, optimizer.stage, parameters)
        norm = float(self._accelerator.clip_grad_norm_(parameters, _CLIP_NORM))
        if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
            self._stop_diverged(figures["loss"], norm)
        # 2. The update.
        rates = optimizer.step(state.step)
        state.step += 1
        state.n_tokens += int(figures["n_tokens"])
        if state.step % TRIM_EVERY == 0:
            trim_heap()
        # 3. Log and progress.
        progress = TrainProgress(
            step=state.step,
            n_steps=self._n_steps,
            stage=optimizer.stage,
            loss=figures["loss"],
            n_tokens=state.n_tokens,
            elapsed_s=round(state.elapsed_s, 3),
        )
        self._write_log(**{**figures, **asdict(progress)}, lr=rates, grad_norm=norm)
        if self._gradients.pieces != state.pieces:
            state.pieces = self._gradients.pieces
            self._write_log(event="out_of_memory", pieces=state.pieces)
        if self._on_progress is not None:
            self._on_progress(progress)

    def _stop_diverged(self, loss: float, norm: float) -> NoReturn:
        self._write_log(event="diverged", loss=loss, grad_norm=norm)
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        steps = self._checkpoints.steps()
        good = f", from the last good checkpoint: --init {self._checkpoints.folder(steps[-1]) / 'adapter'}"
        raise TrainingError(
            f"step {self._state.step + 1}: {what}",
            where=str(self._out),
            next_step=f"Start again in another folder with lower lr_lora and lr_scorer{good if steps else ''}",
        )

    def _save(self, optimizer: StageOptimizer, score: float | None) -> None:
        if self._is_main:
            parameters = {f"parameter/{name}": value for name, value in parameters_of(self._adapter).items()}
            checkpoint = Checkpoint(
                state={**self._identity, **self._state.to_json(), "stage": optimizer.stage, "score": score},
                tensors={**parameters, **optimizer.tensors()},
            )
            self._checkpoints.save(checkpoint, write_adapter=self._write_adapter)
        self._accelerator.wait_for_everyone()

    def _write_adapter(self, folder: Path) -> None:
        trained_steps = self._state.base_steps + self._state.step
        self._adapter.config = replace(self._adapter.config, trained_steps=trained_steps)
        self._adapter.save(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template, not filled in

    # -- end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> TrainReport:
        """Copy the best adapter to its final folder, draw the plot, and build the report."""
        state, records = self._state, self._log.records()
        best = self._checkpoints.best() or state.step
        adapter, found = self._out / "adapter", self._checkpoints.state(best)
        if self._is_main:
            copy = partial(shutil.copytree, self._checkpoints.folder(best) / "adapter", dirs_exist_ok=True)
            # Without a readable checkpoint, e.g. after a run of 0 steps, the adapter is written as it is.
            replace_folder(adapter, copy if found else self._write_adapter)
            plot_log(records, self._out / "loss.png")
        losses = [record["loss"] for record in records if "stage" in record][-50:]
        return TrainReport(
            adapter=adapter,
            step=state.step,
            n_steps=self._n_steps,
            best_step=best,
            loss=fmean(losses) if losses else None,
            kl=RunState.from_json(found).kl if found else None,
            baseline=state.baseline,
            none=state.none,
            n_held_out=self._heldout.n_documents if self._heldout else 0,
            n_examples=len(self._examples),
            n_tokens=state.n_tokens,
            elapsed_s=state.elapsed_s,
            settings=self.settings,
        )


def already_there(out: Path) -> TrainingError:
    """Error for a folder that already contains a run."""
    return TrainingError(
        "the folder already contains a run",
        where=str(out),
        next_step="Continue it with --resume, or choose another folder.",
    )


def make_accelerator(device: torch.device) -> Any:
    """An `Accelerator` without mixed precision: the base model is bfloat16 already, and the adapter float32.

    It is a TrainingError if Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(
            "Accelerate is not installed", next_step="Install it with: pip install 'kv-memory[train]'"
        ) from error
    return Accelerator(mixed_precision="no", cpu=device.type == "cpu")


def trim_heap() -> None:
    """Return the C library's unused memory to the operating system, which takes a fifth of a second.

    Batches differ in shape, and glibc retains the memory they free. A run on a CPU grew from 2 to 4 GB in 900 steps;
    trimming every ten steps kept it below 2.8 GB, with 1.3 GB in use.
    """
    with suppress(AttributeError, OSError, TypeError):  # musl and macOS; Windows
        ctypes.CDLL(None).malloc_trim(0)
