"""Distances between the predictions of two models, which training and refinement minimise."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats, token by token: logits `(..., vocab_size)` of any dtype to `(...)`, float32."""
    p, q = torch.log_softmax(p_logits.float(), -1), torch.log_softmax(q_logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(teacher: torch.Tensor, student: torch.Tensor, *, forward_weight: float) -> torch.Tensor:
    """`λ·KL(teacher‖student) + (1-λ)·KL(student‖teacher)` in nats, token by token (KV-Distill, section 3.3).

    Logits `(..., vocab_size)` to losses `(...)`, float32. λ is `forward_weight`, in [0, 1]; 0.6 in the paper.
    """
    return _both_ways(torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1), forward_weight)


def _both_ways(t: torch.Tensor, s: torch.Tensor, forward_weight: float) -> torch.Tensor:
    """`distillation_loss` of log-probabilities."""
    difference = t - s
    return forward_weight * (t.exp() * difference).sum(-1) - (1 - forward_weight) * (s.exp() * difference).sum(-1)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a teacher without the vocabulary's long tail: the likeliest tokens, and all others as one.

    Logits of a few hundred positions over 50,000 tokens and more would take more memory than the prefill of the
    document.
    """

    ids: torch.Tensor  # `(n, k)`, the likeliest tokens
    log_probs: torch.Tensor  # `(n, k + 1)`, float32; the last is that of all other tokens together

    @classmethod
    def of(cls, logits: torch.Tensor, *, k: int = 256) -> Predictions:
        """Build predictions from logits `(n, vocab_size)`."""
        scores = logits.float()
        ids = scores.topk(min(k, scores.shape[-1] - 1), dim=-1).indices
        return cls(ids=ids, log_probs=_with_rest(scores, ids))

    def loss(self, student: torch.Tensor, *, forward_weight: float) -> torch.Tensor:
        """`distillation_loss` of student logits `(n, vocab_size)` with the tail as one token: at most the full loss."""
        return _both_ways(self.log_probs, _with_rest(student.float(), self.ids), forward_weight)


def _with_rest(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, and of all others together."""
    rest = scores.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scores.gather(-1, ids), rest], -1) - scores.logsumexp(-1, keepdim=True)
