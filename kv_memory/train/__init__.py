"""Training an adapter: data, objective, warm-up and distillation."""

from __future__ import annotations

from kv_memory.train.adapters import new_adapter
from kv_memory.train.checkpointing import checkpointing
from kv_memory.train.data import Source, parse_source
from kv_memory.train.estimate import Estimate
from kv_memory.train.settings import PRESETS, TrainSettings, preset
from kv_memory.train.state import Evaluation, RunOptions, TrainProgress, TrainReport
from kv_memory.train.train_run import Job, OpenJob
from kv_memory.train.trainer import Trainer

__all__ = [
    "PRESETS",
    "Estimate",
    "Evaluation",
    "Job",
    "OpenJob",
    "RunOptions",
    "Source",
    "TrainProgress",
    "TrainReport",
    "TrainSettings",
    "Trainer",
    "checkpointing",
    "new_adapter",
    "parse_source",
    "preset",
]
