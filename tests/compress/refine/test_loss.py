"""Divergences are what PyTorch's own say, and the tail of the vocabulary as one token loses little of them."""

from __future__ import annotations

import pytest
import torch

from kv_memory.compress.refine.loss import Predictions, distillation_loss, kl_divergence


def logits(seed: int, *, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(7, 300, generator=torch.Generator().manual_seed(seed))


def test_kl_equals_torch_kl_div() -> None:
    p, q = logits(1), logits(2)
    wanted = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), wanted)
    both = distillation_loss(p, q, forward_weight=0.6)
    torch.testing.assert_close(both, 0.6 * kl_divergence(p, q) + 0.4 * kl_divergence(q, p))


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_loss_is_exact_when_only_one_token_is_in_the_tail(weight: float) -> None:
    p, q = logits(1), logits(2)
    found = Predictions.of(p, k=1000)
    assert found.ids.shape == (7, 299) and found.log_probs.shape == (7, 300)
    torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(7))
    torch.testing.assert_close(
        found.loss(q, forward_weight=weight), distillation_loss(p, q, forward_weight=weight), rtol=1e-4, atol=1e-5
    )


def test_loss_with_merged_tail_is_a_close_lower_bound() -> None:
    p = logits(1, spread=6.0)
    q = p + logits(3, spread=0.5)
    whole, part = distillation_loss(p, q, forward_weight=0.6), Predictions.of(p, k=64).loss(q, forward_weight=0.6)
    assert (part <= whole + 1e-6).all() and (part > 0.9 * whole).all()


def test_gradient_is_zero_at_the_teacher_and_points_towards_it() -> None:
    p = logits(1, spread=6.0)
    taught, same = Predictions.of(p, k=64), p.clone().requires_grad_()
    (none,) = torch.autograd.grad(taught.loss(same, forward_weight=0.6).sum(), [same])
    assert none.abs().max() < 1e-5
    moving = torch.zeros_like(p)
    first = kl_divergence(p, moving).mean()
    for _ in range(50):
        seen = moving.requires_grad_()
        (gradient,) = torch.autograd.grad(taught.loss(seen, forward_weight=0.6).sum(), [seen])
        moving = moving.detach() - gradient
    assert kl_divergence(p, moving).mean() < first / 4
