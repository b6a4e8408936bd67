"""The gradient of one optimiser step: accumulate batches, average processes, and split batches if memory runs out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import TrainingError
from kv_memory.train.batches import Batch, Batches, split_batch
from kv_memory.train.gradient_checkpointing import checkpointing
from kv_memory.train.optimizer import Parameters, Stage
from kv_memory.train.settings import TrainSettings
from kv_memory.train.step import StepResult, distillation_step, warmup_step

StepFunction: TypeAlias = Callable[..., StepResult]
STEPS: Mapping[Stage, StepFunction] = {"warmup": warmup_step, "distillation": distillation_step}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one step, computed with its gradient.

    Attributes:
        loss: Mean loss over batches and processes.
        parts: Terms of the loss and other figures, each the mean over the batches of this process.
        n_tokens: Number of tokens processed by all processes.
    """

    loss: float
    parts: dict[str, float]
    n_tokens: int


class Gradients:
    """Computes the gradient of any step.

    Args:
        adapter: Adapter with the parameters.
        batches: Source of the batches; every batch depends only on its number.
        settings: Settings of the run.
        accelerator: Accelerate's `Accelerator`; each of its processes has its own batches.
        gradient_checkpointing: Recompute layers in the backward pass, see `checkpointing`.
        pieces: Number of parts into which a batch is split, a power of 2.
        on_split: Callback with a message when memory runs out and the number of parts doubles.

    Attributes:
        pieces: Current number of parts; doubles when a GPU runs out of memory.
    """

    def __init__(
        self,
        adapter: Adapter,
        batches: Batches,
        settings: TrainSettings,
        *,
        accelerator: Any,
        gradient_checkpointing: bool = False,
        pieces: int = 1,
        on_split: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._adapter = adapter
        self._batches = batches
        self._settings = settings
        self._accelerator = accelerator
        self._checkpointing = gradient_checkpointing
        self._on_split = on_split
        self.pieces = pieces

    def compute(self, step: int, stage: Stage, parameters: Parameters) -> Figures:
        """Store the gradient of a step in `.grad` of the parameters.

        Args:
            step: Number of the step, from 0 over both stages.
            stage: Stage, which determines the loss.
            parameters: Parameters of this stage, from `trainable`.

        Raises:
            TrainingError: The GPU's memory does not hold the smallest part of a batch.
        """
        members = list(parameters.values())
        while (figures := self._over_batches(step, stage, members)) is None:
            # Not inside an except clause: the exception's frames would keep alive the tensors that must be freed.
            self._halve(step, stage)
        return self._over_processes(figures, members)

    def _batch(self, step: int, number: int) -> Batch:
        """The batch of this process; every accumulated batch of every process has its own number."""
        accelerator = self._accelerator
        count = step * self._settings.accumulate + number
        return self._batches.batch(count * accelerator.num_processes + accelerator.process_index)

    def _over_batches(self, step: int, stage: Stage, parameters: list[torch.nn.Parameter]) -> Figures | None:
        """The mean over the batches of a step; None if memory runs out."""
        # Batches of a step have equal weights, but parts of a batch are weighted by their loss weights, and their sum
        # is known only at the end. So each batch's gradient is computed separately, then added.
        total: list[torch.Tensor | None] = [None] * len(parameters)
        found = []
        try:
            for number in range(self._settings.accumulate):
                found.append((1.0, self._over_parts(self._batch(step, number), stage, parameters)))
                for index, parameter in enumerate(parameters):
                    if parameter.grad is not None:
                        mine, before = parameter.grad / self._settings.accumulate, total[index]
                        total[index] = mine if before is None else before + mine
        except torch.OutOfMemoryError:
            return None
        for gradient, parameter in zip(total, parameters, strict=True):
            parameter.grad = gradient
        return _mean(found)

    def _over_parts(self, batch: Batch, stage: Stage, parameters: list[torch.nn.Parameter]) -> Figures:
        """The mean over the parts of one batch, by their weights relative to the first part's."""
        for parameter in parameters:
            parameter.grad = None
        found: list[tuple[float, Figures]] = []
        first = 0.0
        for part in split_batch(batch, self.pieces, by_rows=stage == "distillation"):
            with checkpointing(self._adapter.backbone, enabled=self._checkpointing):
                result = STEPS[stage](self._adapter, part, settings=self._settings)
            first = first or result.weight
            share = result.weight / first
            self._accelerator.backward(result.loss * share)
            figures = Figures(loss=float(result.loss.detach()), parts=result.parts, n_tokens=result.n_tokens)
            found.append((share, figures))
        weight = sum(share for share, _ in found)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= weight
        return _mean(found)

    def _halve(self, step: int, stage: Stage) -> None:
        torch.cuda.empty_cache()
        batch = self._batch(step, 0)
        by_rows = stage == "distillation"
        n_now = len(split_batch(batch, self.pieces, by_rows=by_rows))
        if len(split_batch(batch, self.pieces * 2, by_rows=by_rows)) == n_now:
            raise TrainingError(
                f"out of GPU memory at step {step + 1}, and the batches cannot be split further",
                where=f"{max(map(len, batch.documents))} tokens in the longest document",
                next_step="Set gradient_checkpointing to true, or lower max_tokens.",
            )
        self.pieces *= 2
        note = f"out of GPU memory at step {step + 1}: from now on batches are processed in {self.pieces} parts"
        logger.warning(note)
        self._on_split(note)

    def _over_processes(self, figures: Figures, parameters: list[torch.nn.Parameter]) -> Figures:
        """The mean over processes. Rejected: DDP's wrapper, because the forward pass enters the model below it."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return figures
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(grad, "mean")
        loss = accelerator.reduce(torch.tensor(figures.loss, device=accelerator.device), "mean")
        n_tokens = accelerator.reduce(torch.tensor(figures.n_tokens, device=accelerator.device), "sum")
        return Figures(loss=float(loss), parts=figures.parts, n_tokens=int(n_tokens))


def _mean(found: Sequence[tuple[float, Figures]]) -> Figures:
    """The mean by weight; numbers of tokens add up."""
    total = sum(weight for weight, _ in found)
    parts: Counter[str] = Counter()
    for weight, figures in found:
        for name, value in figures.parts.items():
            parts[name] += value * weight / total  # type: ignore[assignment]
    loss = sum(weight * figures.loss for weight, figures in found) / total
    return Figures(loss=loss, parts=dict(parts), n_tokens=sum(figures.n_tokens for _, figures in found))
