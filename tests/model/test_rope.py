from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_all
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_part

from kv_memory.model.rope import Rope
from tests.conftest import LLAMA3, SHAPE, YARN, make_model

N = 60  # entries
LAYERS, HEADS, DIM = 3, 2, 8


@dataclass
class Case:
    rotary: Any
    layer_types: list[str | None]
    head_dim: int = DIM
    partial: bool = False
    n_positions: int = 400

    @property
    def rope(self) -> Rope:
        return Rope(self.rotary, layer_types=self.layer_types)


def llama_rotary(**rope: Any) -> Any:
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 512, "rope_parameters": rope})
    return LlamaRotaryEmbedding(config)


BASE = {"rope_theta": 10000.0}
SHORT_AND_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 5.0],
    "original_max_position_embeddings": 96,
    **BASE,
}
GEMMA_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "default": lambda: Case(llama_rotary(rope_type="default", **BASE), [None] * LAYERS),
    "linear": lambda: Case(llama_rotary(rope_type="linear", factor=3.0, **BASE), [None] * LAYERS),
    "dynamic": lambda: Case(llama_rotary(rope_type="dynamic", factor=3.0, **BASE), [None] * LAYERS),
    "dynamic_beyond": lambda: Case(
        llama_rotary(rope_type="dynamic", factor=3.0, **BASE), [None] * LAYERS, n_positions=900
    ),
    "yarn": lambda: Case(llama_rotary(**YARN), [None] * LAYERS),
    "yarn_factor": lambda: Case(llama_rotary(**YARN, attention_factor=1.7), [None] * LAYERS),
    "llama3": lambda: Case(llama_rotary(**LLAMA3), [None] * LAYERS),
    "longrope_short": lambda: Case(llama_rotary(**SHORT_AND_LONG, factor=4.0), [None] * LAYERS, n_positions=90),
    "longrope_long": lambda: Case(llama_rotary(**SHORT_AND_LONG, factor=4.0), [None] * LAYERS),
    "phi3": lambda: Case(make_model("phi3").model.rotary_emb, [None] * LAYERS, partial=True),
    "phi3_partial": lambda: Case(make_model("phi3_longrope").model.rotary_emb, [None] * LAYERS, partial=True),
    "gemma3": lambda: Case(make_model("gemma3").model.rotary_emb, GEMMA_TYPES, head_dim=10),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = CASES[request.param]()
    return made


def random_keys(case: Case, seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYERS, HEADS, N, case.head_dim, generator=torch.Generator().manual_seed(seed))


def some_positions(case: Case, *shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.rand(*shape, case.n_positions, generator=torch.Generator().manual_seed(seed))
    return rows.argsort(-1)[..., :N].sort(-1).values


def rotated_by_the_model(case: Case, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One layer at a time, by the code of the model, as in a forward pass over all positions."""
    rows = []
    for layer, layer_type in enumerate(case.layer_types):
        extra = () if layer_type is None else (layer_type,)
        cos, sin = case.rotary(keys, torch.arange(case.n_positions)[None], *extra)
        rotate = rotate_part if case.partial else rotate_all
        rows.append(rotate(keys[layer, None], keys[layer, None], cos[:, positions], sin[:, positions])[1][0])
    return torch.stack(rows)


def test_rotate_equals_the_rotation_of_the_model(case: Case) -> None:
    keys, positions = random_keys(case), some_positions(case)
    ours = case.rope.rotate(keys, positions, n_positions=case.n_positions)
    torch.testing.assert_close(ours, rotated_by_the_model(case, keys, positions), rtol=1e-5, atol=1e-5)
    assert (ours - keys).abs().max() > 0.5


def test_unrotate_inverts_rotate(case: Case) -> None:
    keys, positions = random_keys(case), some_positions(case)
    there = case.rope.rotate(keys, positions, n_positions=case.n_positions)
    back = case.rope.unrotate(there, positions, n_positions=case.n_positions)
    torch.testing.assert_close(back, keys, rtol=1e-5, atol=1e-5)


def test_keys_can_be_moved_to_other_positions(case: Case) -> None:
    rope, keys = case.rope, random_keys(case)
    here, there = some_positions(case, seed=1), some_positions(case, seed=2)
    first = rope.rotate(keys, here, n_positions=case.n_positions)
    moved = rope.rotate(rope.unrotate(first, here, n_positions=case.n_positions), there, n_positions=case.n_positions)
    expected = rope.rotate(keys, there, n_positions=case.n_positions)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    assert (first - expected).abs().max() > 0.5


def test_every_head_can_have_its_own_positions(case: Case) -> None:
    rope, keys = case.rope, random_keys(case)
    positions = some_positions(case, LAYERS, HEADS)
    ours = rope.rotate(keys, positions, n_positions=case.n_positions)
    for layer in range(LAYERS):
        for head in range(HEADS):
            alone = rope.rotate(keys, positions[layer, head], n_positions=case.n_positions)
            assert torch.equal(ours[layer, head], alone[layer, head])


def test_keys_of_other_types_are_rotated_in_float32(case: Case) -> None:
    rope, positions = case.rope, some_positions(case)
    keys = random_keys(case).bfloat16()
    out = rope.rotate(keys, positions, n_positions=case.n_positions, dtype=torch.float32)
    assert torch.equal(out, rope.rotate(keys.float(), positions, n_positions=case.n_positions))
    assert torch.equal(rope.rotate(keys, positions, n_positions=case.n_positions), out.bfloat16())
    assert rope.unrotate(keys, positions, n_positions=case.n_positions).dtype == torch.float32


def test_gemma3_layers_use_their_own_theta() -> None:
    case = CASES["gemma3"]()
    keys = random_keys(case)[:1].expand(LAYERS, -1, -1, -1)
    ours = case.rope.rotate(keys, some_positions(case), n_positions=case.n_positions)
    assert torch.equal(ours[0], ours[2])
    assert (ours[0] - ours[1]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("name", "varies"), [("default", False), ("yarn", False), ("dynamic", True), ("gemma3", False)]
)
def test_only_dynamic_frequencies_depend_on_the_length(name: str, varies: bool) -> None:
    rope = CASES[name]().rope
    assert rope.varies == varies
    assert rope.regime(100) == rope.regime(500)  # within the context window
    assert (rope.regime(600) == rope.regime(700)) == (not varies)


def test_longrope_changes_frequencies_once() -> None:
    rope = CASES["longrope_long"]().rope
    assert rope.varies
    assert rope.regime(10) == rope.regime(96) != rope.regime(97) == rope.regime(500)
    keys, positions = random_keys(CASES["longrope_long"]()), torch.arange(N)
    short, longer, longest = (rope.rotate(keys, positions, n_positions=n) for n in (96, 97, 500))
    assert torch.equal(longer, longest)
    assert (short - longer).abs().max() > 0.1


def test_the_lock_is_held_while_the_module_changes_its_frequencies() -> None:
    case, lock = CASES["longrope_long"](), threading.RLock()
    free: list[bool] = []

    def try_from_another_thread() -> None:
        free.append(lock.acquire(blocking=False))

    def look(*_: object) -> None:
        thread = threading.Thread(target=try_from_another_thread)
        thread.start()
        thread.join()

    case.rotary.register_forward_pre_hook(look)
    rope = Rope(case.rotary, layer_types=case.layer_types, lock=lock)
    rope.rotate(random_keys(case), torch.arange(N), n_positions=200)
    assert free == [False]
