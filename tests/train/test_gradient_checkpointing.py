"""Gradient checkpointing changes the memory, not the numbers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.train.adapters import new_adapter, trainable
from kv_memory.train.batches import Batches
from kv_memory.train.gradient_checkpointing import checkpointing
from kv_memory.train.step import distillation_step
from tests.conftest import make_backbone
from tests.train.tiny_runs import SETTINGS, examples

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"scorer": "head", "routed": "kept", "targets": ("q", "o")}),
    ("qwen3", {"scorer": "token", "routed": "kept", "targets": ("q", "o"), "first_routed_layer": 2}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi3_longrope", {"targets": ("q", "o")}),
]


def step(model: str, changes: dict[str, Any], *, enabled: bool) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that were kept for the backward pass."""
    settings = replace(SETTINGS, batch_documents=2, composition_share=0.5, **changes)
    backbone = make_backbone(model)
    adapter: Adapter = new_adapter(backbone, settings)
    generator = torch.Generator().manual_seed(1)
    parameters = trainable(adapter, settings, "distillation")
    for parameter in parameters.values():  # B starts at zero, and a zero would hide a wrong gradient of A
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = Batches(examples(), backbone, settings).batch(1)
    with checkpointing(backbone) if enabled else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):  # these would hide a change in place
            distillation_step(adapter, batch, settings=settings)
        result = distillation_step(adapter, batch, settings=settings)
    result.loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert all("forward" not in vars(layer) for layer in backbone.layers)
    return float(result.loss.detach()), grads, sum(kept.values())


@pytest.mark.parametrize(("model", "changes"), FORMS, ids=[f"{m}-{'-'.join(map(str, c.values()))}" for m, c in FORMS])
def test_same_loss_and_gradients_with_less_memory(model: str, changes: dict[str, Any]) -> None:
    loss, grads, kept_bytes = step(model, changes, enabled=False)
    again, regrads, less_bytes = step(model, changes, enabled=True)
    assert again == loss
    assert regrads.keys() == grads.keys() and len(grads) > 4
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 1e-8
    for name, grad in grads.items():
        torch.testing.assert_close(regrads[name] / largest, grad / largest, rtol=1e-4, atol=1e-5, msg=name)
    assert less_bytes < 0.75 * kept_bytes


def test_checkpointing_without_gradients_changes_nothing(backbone: Any) -> None:
    ids = torch.tensor([backbone.encode("A lamp.")])
    with torch.no_grad():
        plain, wrapped = backbone.prefixed_cache(ids.shape[1]), backbone.prefixed_cache(ids.shape[1])
        backbone.prefill(ids, plain)
        with checkpointing(backbone):
            backbone.prefill(ids, wrapped)
    assert torch.equal(plain.layer(3)[0], wrapped.layer(3)[0])


def test_layers_are_restored_after_an_error(backbone: Any) -> None:
    with pytest.raises(ZeroDivisionError), checkpointing(backbone):
        assert all("forward" in vars(layer) for layer in backbone.layers)
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in backbone.layers)
