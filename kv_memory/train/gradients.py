"""The gradient of one optimiser step: accumulate batches, average processes, and split batches if memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import TrainingError
from kv_memory.train.adapters import Stage
from kv_memory.train.batches import Batch, Batches, split_batch
from kv_memory.train.gradient_checkpointing import checkpointing
from kv_memory.train.settings import TrainSettings
from kv_memory.train.step import StepResult, distillation_step, warmup_step

STEPS: Mapping[Stage, Callable[..., StepResult]] = {"warmup": warmup_step, "distillation": distillation_step}
Figures: TypeAlias = dict[str, float]  # `loss`, those of `StepResult`, and `n_tokens`

logger = logging.getLogger(__name__)


@dataclass
class Gradients:
    """Computes the gradient of any step.

    Attributes:
        accelerator: Accelerate's `Accelerator`; each of its processes has its own batches.
        pieces: Number of parts into which a batch is split, a power of 2; doubles when a GPU runs out of memory.
    """

    adapter: Adapter
    batches: Batches
    settings: TrainSettings
    accelerator: Any
    gradient_checkpointing: bool = False
    pieces: int = 1

    def compute(self, step: int, stage: Stage, parameters: Sequence[torch.nn.Parameter]) -> Figures:
        """Store the gradient of a step, counted from 0 over both stages, in `.grad` of the stage's parameters.

        Returns:
            Means over the batches, of the loss also over processes; `n_tokens` is the sum over both.

        Raises:
            TrainingError: The GPU's memory does not hold the smallest part of a batch.
        """
        figures = None
        while figures is None:
            with suppress(torch.OutOfMemoryError):
                figures = self._over_batches(step, stage, parameters)
            if figures is None:  # only now the exception's frames have freed their tensors
                self._halve(step, stage)
        return self._over_processes(figures, parameters)

    def _batch(self, step: int, number: int) -> Batch:
        """The batch of this process; every accumulated batch of every process has its own number."""
        count = step * self.settings.accumulate + number
        return self.batches.batch(count * self.accelerator.num_processes + self.accelerator.process_index)

    def _parts(self, batch: Batch, stage: Stage, pieces: int) -> list[Batch]:
        return split_batch(batch, pieces, by_rows=stage == "distillation")

    def _over_batches(self, step: int, stage: Stage, parameters: Sequence[torch.nn.Parameter]) -> Figures:
        # Batches of a step have equal weights, but parts of a batch are weighted by their loss weights, and their sum
        # is known only at the end. So each batch's gradient is computed separately, then added.
        n_batches = self.settings.accumulate
        total: dict[int, torch.Tensor] = {}
        batches = []
        for number in range(n_batches):
            for parameter in parameters:
                parameter.grad = None
            parts: list[tuple[float, Figures]] = []
            first = 0.0
            for part in self._parts(self._batch(step, number), stage, self.pieces):
                with checkpointing(self.adapter.backbone) if self.gradient_checkpointing else nullcontext():
                    result = STEPS[stage](self.adapter, part, settings=self.settings)
                first = first or result.weight
                weight = result.weight / first
                self.accelerator.backward(result.loss * weight)
                figures = {**result.figures, "loss": float(result.loss.detach()), "n_tokens": result.n_tokens}
                parts.append((weight, figures))
            all_weights = sum(weight for weight, _ in parts)
            for index, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    mine = parameter.grad / all_weights / n_batches
                    total[index] = total[index] + mine if index in total else mine
            batches.append((1.0, _mean(parts)))
        for index, parameter in enumerate(parameters):
            parameter.grad = total.get(index)
        return _mean(batches)

    def _halve(self, step: int, stage: Stage) -> None:
        torch.cuda.empty_cache()
        batch = self._batch(step, 0)
        if len(self._parts(batch, stage, self.pieces * 2)) == len(self._parts(batch, stage, self.pieces)):
            raise TrainingError(
                f"out of GPU memory at step {step + 1}, and the batches cannot be split further",
                where=f"{max(map(len, batch.documents))} tokens in the longest document",
                next_step="Set gradient_checkpointing to true, or lower max_tokens.",
            )
        self.pieces *= 2
        logger.warning(
            "out of GPU memory at step %d: from now on batches are processed in %d parts", step + 1, self.pieces
        )

    def _over_processes(self, figures: Figures, parameters: Sequence[torch.nn.Parameter]) -> Figures:
        """The mean over processes. Rejected: DDP's wrapper, because the forward pass enters the model below it."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return figures
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(grad, "mean")
        loss, n_tokens = (torch.tensor(figures[name], device=accelerator.device) for name in ("loss", "n_tokens"))
        loss, n_tokens = accelerator.reduce(loss, "mean"), accelerator.reduce(n_tokens, "sum")
        return {**figures, "loss": float(loss), "n_tokens": int(n_tokens)}


def _mean(found: Sequence[tuple[float, Figures]]) -> Figures:
    """The mean by weight; numbers of tokens add up."""
    total = sum(weight for weight, _ in found)
    means = {name: sum(weight * figures[name] for weight, figures in found) / total for name in found[0][1]}
    return {**means, "n_tokens": sum(figures["n_tokens"] for _, figures in found)}
