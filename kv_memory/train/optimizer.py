"""Trained parameters, their optimiser, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.train.settings import TrainSettings

Stage = Literal["warmup", "distillation"]
Parameters = dict[str, torch.nn.Parameter]
_STATE = "optimizer/"


def parameters_of(adapter: Adapter) -> Parameters:
    """All parameters of an adapter by name, `lora.…` and `scorer.…`; the LoRA is converted to float32.

    In bfloat16, the dtype of a loaded LoRA, steps of 1e-4 would vanish.
    """
    lora = {f"lora.{name}": p for name, p in adapter.peft_model.named_parameters() if "lora_" in name}
    for parameter in lora.values():
        parameter.data = parameter.data.float()
    return {**lora, **{f"scorer.{name}": p for name, p in adapter.scorer.named_parameters()}}


def trainable(adapter: Adapter, settings: TrainSettings, stage: Stage) -> Parameters:
    """The parameters that a stage trains; all others are frozen."""
    everything = parameters_of(adapter)
    kinds = {"scorer."} if stage == "warmup" else {"lora."}
    if settings.lr_scorer_distil > 0:
        kinds.add("scorer.")
    chosen = {name: p for name, p in everything.items() if name.startswith(tuple(kinds))}
    for name, parameter in everything.items():
        parameter.requires_grad_(name in chosen)
    return chosen


class StageOptimizer:
    """The parameters that a stage trains, and their AdamW: the LoRA's without weight decay, and the scorer's.

    Learning rates rise linearly over the first share of the stage, then decay linearly; they never reach 0.

    Args:
        adapter: Adapter with the parameters; all that the stage does not train are frozen.
        settings: Settings of the run.
        stage: Stage of the run.

    Attributes:
        stage: Stage as given.
        parameters: Trained parameters by name.
    """

    def __init__(self, adapter: Adapter, settings: TrainSettings, stage: Stage) -> None:
        self.stage: Stage = stage
        self.parameters = trainable(adapter, settings, stage)
        self._begin, self._length = 0, settings.warmup_steps
        if stage == "distillation":
            self._begin, self._length = settings.warmup_steps, settings.steps
        self._n_rise = max(1, round(settings.rise * self._length))
        scorer_rate = settings.lr_scorer if stage == "warmup" else settings.lr_scorer_distil
        groups = []
        for kind, rate, decay in (("lora", settings.lr_lora, 0.0), ("scorer", scorer_rate, settings.weight_decay)):
            members = [p for name, p in self.parameters.items() if name.startswith(f"{kind}.")]
            if members:
                groups.append({"params": members, "lr": rate, "full_lr": rate, "weight_decay": decay, "name": kind})
        self._optimizer = torch.optim.AdamW(groups)

    def step(self, step: int) -> dict[str, float]:
        """Update the parameters by their gradients, and remove those.

        Args:
            step: Number of the step, from 0 over both stages.

        Returns:
            Learning rates by group, `lora` and `scorer`.
        """
        place = step - self._begin
        factor = min((place + 1) / self._n_rise, (self._length - place) / max(1, self._length - self._n_rise + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimiser's state by name, without learning rates, which follow from the step."""
        return {
            f"{_STATE}{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state from `tensors`; others are ignored."""
        for key, value in tensors.items():
            if key.startswith(_STATE):
                name, _, field = key.removeprefix(_STATE).rpartition("/")
                parameter = self.parameters[name]
                # Adam's step counter is a tensor that stays on the CPU.
                self._optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)
