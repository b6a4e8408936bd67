"""Trained parameters, their optimiser, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.train.settings import TrainSettings

__all__ = [
    "Parameters",
    "Stage",
    "load_optimizer",
    "make_optimizer",
    "optimizer_tensors",
    "parameters_of",
    "set_rates",
    "trainable",
]

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


def make_optimizer(parameters: Parameters, settings: TrainSettings, stage: Stage) -> torch.optim.Optimizer:
    """Create AdamW with a group for the LoRA, without weight decay, and one for the scorer."""
    scorer_rate = settings.lr_scorer if stage == "warmup" else settings.lr_scorer_distil
    groups = []
    for kind, rate, decay in (("lora.", settings.lr_lora, 0.0), ("scorer.", scorer_rate, settings.weight_decay)):
        members = [p for name, p in parameters.items() if name.startswith(kind)]
        if members:
            groups.append({"params": members, "lr": rate, "full_lr": rate, "weight_decay": decay, "name": kind[:-1]})
    return torch.optim.AdamW(groups)


def set_rates(optimizer: torch.optim.Optimizer, place: int, length: int, *, rise: float) -> dict[str, float]:
    """Set the learning rates of one step: linear rise over the first share of a stage, then linear decay.

    Args:
        optimizer: Optimiser from `make_optimizer`.
        place: Index of the step in its stage, from 0.
        length: Number of steps of the stage.
        rise: Share of the steps in which the rate rises.

    Returns:
        The rates by group, `lora` and `scorer`. The schedule never reaches 0.
    """
    n_rise = max(1, round(rise * length))
    factor = min((place + 1) / n_rise, (length - place) / max(1, length - n_rise + 1))
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, torch.Tensor]:
    """The optimiser's state by name, without learning rates, which follow from the step."""
    return {
        f"{_STATE}{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the state from `optimizer_tensors`."""
    for key, value in tensors.items():
        if key.startswith(_STATE):
            name, _, field = key.removeprefix(_STATE).rpartition("/")
            parameter = parameters[name]
            # Adam's step counter is a tensor that stays on the CPU.
            optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)
