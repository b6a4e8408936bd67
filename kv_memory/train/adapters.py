"""Adapters in training: created from settings, and the settings that an existing one prescribes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

# Settings that determine the structure of an adapter: those that its `AdapterConfig` records, and its LoRA's.
_CONFIG = ("scorer", "scorer_size", "eta", "routed", "budget", "first_routed_layer")
_LORA = ("targets", "rank", "alpha")
_TARGETS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "qkv_proj": "q"}


def new_adapter(backbone: Backbone, settings: TrainSettings) -> Adapter:
    """Create an untrained adapter with the structure in the settings, attached to the backbone."""
    structure: dict[str, Any] = {name: getattr(settings, name) for name in (*_CONFIG, *_LORA)}
    return Adapter.create(backbone, **structure, full_strength_ratio=settings.full_strength_ratio, seed=settings.seed)


def fit_settings(settings: TrainSettings, adapter: Adapter, *, given: Mapping[str, Any]) -> TrainSettings:
    """Settings with the structure of an existing adapter, which needs no warm-up unless it is chosen.

    Args:
        settings: Settings of the run.
        adapter: Adapter to train further. Its `full_strength_ratio` is changed if given, as no weights depend on it.
        given: Settings that the user chose explicitly, by name.

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
