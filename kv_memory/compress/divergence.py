"""How far one model's predictions are from another's: what training and refinement make small."""

from __future__ import annotations

import torch

__all__ = ["distillation_loss", "kl_divergence"]


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats, token by token.

    Args:
        p_logits: `(..., vocab_size)`, any dtype.
        q_logits: The same shape.

    Returns:
        `(...)`, float32.
    """
    p, q = torch.log_softmax(p_logits.float(), -1), torch.log_softmax(q_logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(teacher: torch.Tensor, student: torch.Tensor, *, forward_weight: float) -> torch.Tensor:
    """`λ·KL(teacher‖student) + (1-λ)·KL(student‖teacher)`, token by token (KV-Distill, section 3.3).

    Args:
        teacher: Logits `(..., vocab_size)`.
        student: The same shape.
        forward_weight: λ, in [0, 1]; 0.6 in the paper.

    Returns:
        `(...)`, float32, nats.
    """
    t, s = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    difference = t - s
    forward = (t.exp() * difference).sum(-1)
    backward = -(s.exp() * difference).sum(-1)
    return forward_weight * forward + (1 - forward_weight) * backward
