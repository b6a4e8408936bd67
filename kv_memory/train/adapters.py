"""Adapters in training: created from settings, the settings that an existing one prescribes, and their parameters.

Another form of adapter is created in `new_adapter`, names its parameters in `parameters_of`, says in `learning_rates`
which of them a stage trains, and has its step in `gradients.STEPS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

Stage = Literal["warmup", "distillation"]
Parameters = dict[str, torch.nn.Parameter]

# Settings that determine the structure of an adapter: those that its `AdapterConfig` records, and its LoRA's.
_CONFIG = ("scorer", "scorer_size", "eta", "routed", "budget", "first_routed_layer", "restore_tokens")
_LORA = ("targets", "rank", "alpha")
_TARGETS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "qkv_proj": "q"}


def new_adapter(backbone: Backbone, settings: TrainSettings) -> Adapter:
    """Create an untrained adapter with the structure in the settings, attached to the backbone."""
    structure: dict[str, Any] = {name: getattr(settings, name) for name in (*_CONFIG, *_LORA)}
    return Adapter.create(backbone, **structure, full_strength_ratio=settings.full_strength_ratio, seed=settings.seed)


def fit_settings(settings: TrainSettings, adapter: Adapter, *, given: Mapping[str, Any]) -> TrainSettings:
    """Settings with the structure of an existing adapter, which needs no warm-up unless it is chosen.

    `given` are the settings that the user chose explicitly, by name. The adapter's `full_strength_ratio` is changed if
    given, as no weights depend on it.

    Raises:
        ConfigError: A setting in `given` contradicts the adapter.
    """
    lora: Any = adapter.peft_model.peft_config["default"]
    targets = {_TARGETS[name] for name in lora.target_modules}
    structure: dict[str, Any] = {name: getattr(adapter.config, name) for name in _CONFIG}
    structure["targets"] = tuple(name for name in "qkvo" if name in targets)
    structure |= {"rank": lora.r, "alpha": float(lora.lora_alpha)}
    wrong = [f"{name} is {value!r}" for name, value in structure.items() if name in given and given[name] != value]
    if wrong:
        raise ConfigError(
            f"further training cannot change the structure of an adapter: {', '.join(wrong)}",
            where="init",
            next_step="Omit these settings, or train a new adapter without --init.",
        )
    if "full_strength_ratio" in given:
        adapter.config = replace(adapter.config, full_strength_ratio=settings.full_strength_ratio)
    structure["full_strength_ratio"] = adapter.config.full_strength_ratio
    warmup_steps = settings.warmup_steps if "warmup_steps" in given else 0
    return replace(settings, **structure, warmup_steps=warmup_steps)


def parameters_of(adapter: Adapter) -> Parameters:
    """All parameters of an adapter by name, `lora.…` and `scorer.…` or `restore.…`; the LoRA is converted to float32.

    In bfloat16, the dtype of a loaded LoRA, steps of 1e-4 would vanish.
    """
    lora = {f"lora.{name}": p for name, p in adapter.peft_model.named_parameters() if "lora_" in name}
    for parameter in lora.values():
        parameter.data = parameter.data.float()
    kind = "restore" if adapter.config.restore_tokens else "scorer"
    return {**lora, **{f"{kind}.{name}": p for name, p in adapter.head.named_parameters()}}


def learning_rates(settings: TrainSettings, stage: Stage) -> dict[str, float]:
    """Full learning rates of a stage, by the first part of the parameters' names; it trains no others."""
    if settings.restore_tokens:
        return {"lora": settings.lr_lora, "restore": settings.lr_restore}
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
