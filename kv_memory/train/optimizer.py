"""The optimiser of a stage, and its state as plain tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.train.adapters import Stage, learning_rates, trainable
from kv_memory.train.settings import TrainSettings


class StageOptimizer:
    """The parameters that a stage trains, by name, and their AdamW; weight decay is for the scorer alone.

    Learning rates rise linearly over the first share of the stage, then decay linearly; they never reach 0. Parameters
    that the stage does not train are frozen.
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

        Returns the learning rates by kind of parameter, as in `learning_rates`.
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
