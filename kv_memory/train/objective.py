"""What is minimised: how far the student's predictions are from the teacher's (KV-Distill, section 3.3)."""

from __future__ import annotations

from kv_memory.compress.divergence import distillation_loss, kl_divergence

__all__ = ["distillation_loss", "kl_divergence"]
