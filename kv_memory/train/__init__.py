"""Training an adapter: data, objective, warm-up and distillation."""

from __future__ import annotations

from kv_memory.train.adapters import new_adapter
from kv_memory.train.estimate import Estimate
from kv_memory.train.gradient_checkpointing import checkpointing
from kv_memory.train.run import OpenRun, TrainRun
from kv_memory.train.settings import PRESETS, RunOptions, TrainSettings, preset
from kv_memory.train.train_report import TrainProgress, TrainReport
from kv_memory.train.trainer import Trainer

__all__ = [
    "PRESETS",
    "Estimate",
    "OpenRun",
    "RunOptions",
    "TrainProgress",
    "TrainReport",
    "TrainRun",
    "TrainSettings",
    "Trainer",
    "checkpointing",
    "new_adapter",
    "preset",
]
