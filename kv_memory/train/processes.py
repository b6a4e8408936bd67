"""Device and peers of a training process, from Accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch

from kv_memory.errors import TrainingError

__all__ = ["local_device", "make_accelerator"]


def local_device(name: str) -> str:
    """Resolve `auto` under `accelerate launch` to this process's own GPU; other names are unchanged."""
    rank = os.environ.get("LOCAL_RANK")
    if name == "auto" and rank is not None and torch.cuda.is_available():
        return f"cuda:{rank}"
    return name


def make_accelerator(device: torch.device) -> Any:
    """Create an `Accelerator` without mixed precision: the base model is bfloat16 already, and the adapter float32.

    Args:
        device: Device of the model.

    Raises:
        TrainingError: Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TrainingError(
            "Accelerate is not installed", next_step="Install it with: pip install 'kv-memory[train]'"
        ) from error
    return Accelerator(mixed_precision="no", cpu=device.type == "cpu")
