"""What is minimised: how far the student's predictions are from the teacher's (KV-Distill, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_memory.compress.refine.loss import distillation_loss, kl_divergence

__all__ = ["distillation_loss", "kl_divergence", "output_error"]


def output_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the student's attention outputs are from the teacher's, as a share of their squared length.

    Args:
        teacher: Of every layer `(n, num_heads * head_dim)`.
        student: The same.

    Returns:
        `(n,)`, float32, the mean over layers: 0 where they are the same, 1 where the student's are 0.
    """
    shares = [
        (s.float() - t.float()).square().sum(-1) / (t.float().square().sum(-1) + 1e-6)
        for t, s in zip(teacher, student, strict=True)
    ]
    return torch.stack(shares).mean(0)
