"""The parameters that a stage trains, their optimiser, and its state as plain tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.train.settings import TrainSettings

Stage = Literal["warmup", "distillation"]
Parameters = dict[str, torch.nn.Parameter]


def parameters_of(adapter: Adapter) -> Parameters:
    """All parameters of an adapter by name, `lora.…` and `scorer.…`; the LoRA is converted to float32.

    In bfloat16, the dtype of a loaded LoRA, steps of 1e-4 would vanish.
    """
    lora = {f"lora.{name}": p for name, p in adapter.peft_model.named_parameters() if "lora_" in name}
    for parameter in lora.values():
        parameter.data = parameter.data.float()
    return {**lora, **{f"scorer.{name}": p for name, p in adapter.scorer.named_parameters()}}


def learning_rates(settings: TrainSettings, stage: Stage) -> dict[str, float]:
    """Full learning rates of a stage, by the first part of the parameters' names; it trains no others."""
    if stage == "warmup":
        return {"scorer": settings.lr_scorer}
    scorer = {"scorer": settings.lr_scorer_distil} if settings.lr_scorer_distil > 0 else {}
    return {"lora": settings.lr_lora, **scorer}


def trainable(adapter: Adapter, settings: TrainSettings, stage: Stage) -> Parameters:
    """The parameters that a stage trains; all others are frozen."""
    everything, kinds = parameters_of(adapter), learning_rates(settings, stage)
    for name, parameter in everything.items():
        parameter.requires_grad_(name.split(".")[0] in kinds)
    return {name: p for name, p in everything.items() if p.requires_grad}


class StageOptimizer:
    """The parameters that a stage trains, and their AdamW; weight decay is for the scorer alone.

    Learning rates rise linearly over the first share of the stage, then decay linearly; they never reach 0. Parameters
    that the stage does not train are frozen.

    Attributes:
        stage: Stage of the run.
        parameters: Trained parameters by name.
    """

    def __init__(self, adapter: Adapter, settings: TrainSettings, stage: Stage) -> None:
        self.stage: Stage = stage
        self.parameters = trainable(adapter, settings, stage)
        warmup, n = settings.warmup_steps, settings.steps
        self._begin, self._length = (0, warmup) if stage == "warmup" else (warmup, n)
        self._n_rise = max(1, round(settings.rise * self._length))
        self._rates = learning_rates(settings, stage)
        self._optimizer = torch.optim.AdamW(
            {
                "name": kind,
                "params": [p for name, p in self.parameters.items() if name.startswith(f"{kind}.")],
                "weight_decay": settings.weight_decay if kind == "scorer" else 0.0,
            }
            for kind in self._rates
        )

    def step(self, step: int) -> dict[str, float]:
        """Update the parameters by their gradients, and remove those, at a step counted from 0 over both stages.

        Returns:
            Learning rates by kind of parameter, as in `learning_rates`.
        """
        place = step - self._begin
        factor = min((place + 1) / self._n_rise, (self._length - place) / max(1, self._length - self._n_rise + 1))
        rates = {kind: rate * factor for kind, rate in self._rates.items()}
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return rates

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimiser's state by name, without learning rates, which follow from the step."""
        state = self._optimizer.state_dict()["state"]
        return {f"optimizer/{index}/{name}": value for index, own in state.items() for name, value in own.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state from `tensors`; others are ignored."""
        state: dict[int, dict[str, Any]] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state[int(index)][name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
