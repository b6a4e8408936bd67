from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kv_memory.compress import Compressor
from kv_memory.generate import compose
from kv_memory.model import attention
from kv_memory.model.attention import ForwardContext, attention_forward
from kv_memory.model.forward import cache_argument
from kv_memory.model.kv_cache import NEVER, PositionedCache, PreallocatedLayer
from tests.conftest import ARCHITECTURES, make_backbone
from tests.reference import assert_close, full_logits, letters, plain_model, shared_backbone

EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))
WINDOWED = ["llama", "mistral", "qwen2_window", "gemma2", "gemma3", "phi3_window"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_layer_grows_inside_its_buffer_and_copies_beyond_it() -> None:
    keys, values, more = rand(1, 2, 10, 4), rand(1, 2, 10, 4, seed=1), rand(1, 2, 4, 4, seed=2)
    first_keys, first_values = keys[:, :, :5].clone(), values[:, :, :5].clone()
    layer = PreallocatedLayer(keys, values, 5)
    k, v = layer.update(more, -more)
    assert k.data_ptr() == keys.data_ptr() and v.data_ptr() == values.data_ptr()
    assert torch.equal(k, torch.cat([first_keys, more], 2)) and torch.equal(v, torch.cat([first_values, -more], 2))
    k, v = layer.update(more, -more)  # 13 of 10
    assert k.data_ptr() != keys.data_ptr()
    assert torch.equal(k, torch.cat([first_keys, more, more], 2))
    assert torch.equal(v, torch.cat([first_values, -more, -more], 2))
    layer.rewind(4)
    k, v = layer.update(2 * more, 3 * more)
    assert torch.equal(k, torch.cat([first_keys, more, 2 * more], 2))
    assert torch.equal(v, torch.cat([first_values, -more, 3 * more], 2))


def test_a_rewound_cache_equals_a_fresh_one(backbone: Any) -> None:
    document = torch.tensor([backbone.encode_document(letters(40))])
    ids, other = (torch.tensor([backbone.encode(letters(9, seed=seed))]) for seed in (1, 2))
    with torch.no_grad():
        clean = backbone.prefixed_cache(document.shape[1])
        backbone.prefill(document, clean)
        used = backbone.prefixed_cache(document.shape[1], room=4)
        backbone.prefill(document, used)
        backbone.prefill(other, used)  # beyond its room
        used.rewind(5)
        used.rewind(0)
        used.rewind(4)
        assert torch.equal(used.next_positions, clean.next_positions)
        assert torch.equal(used.key_positions(1), clean.key_positions(1))
        assert torch.equal(backbone.logits(ids, used), backbone.logits(ids, clean))


def test_key_positions() -> None:
    shared = PositionedCache(
        rand(3, 2, 2, 9, 4), rand(3, 2, 2, 9, 4), positions=torch.tensor([0, 1, 5]), next_position=8
    )
    shared.append_positions(torch.tensor([[8, 9], [8, NEVER]]))
    assert shared.key_positions(1).tolist() == [[[0, 1, 5, 8, 9]], [[0, 1, 5, 8, NEVER]]]
    positions = torch.arange(3 * 2 * 4).view(3, 2, 4)
    per_head = PositionedCache(rand(3, 1, 2, 9, 4), rand(3, 1, 2, 9, 4), positions=positions, next_position=30)
    per_head.append_positions(torch.tensor([[30]]))
    assert per_head.key_positions(2).tolist() == [[[16, 17, 18, 19, 30], [20, 21, 22, 23, 30]]]


def test_keys_are_rotated_again_when_longrope_changes_frequencies() -> None:
    backbone = shared_backbone("phi3_longrope")
    texts = [letters(30, seed=seed) for seed in (1, 2)]
    compressor = Compressor(backbone, selector="attention")
    caches = [compressor.compress(text, keep_ratio=0.5) for text in texts]
    questions = torch.tensor([backbone.encode(letters(10, seed=seed)) for seed in (3, 4)])
    lengths = torch.tensor([10, 6])
    with torch.no_grad():
        cache = compose(backbone, caches, n_question=10, n_new=20, batch_size=2)
        assert cache.n_positions == 11 + 2 * 36 + 10 == 93
        backbone.logits(questions, cache, lengths=lengths)
        before = [cache.layer(index)[0].clone() for index in range(backbone.num_layers)]
        for _ in range(4):  # the last goes to position 96, one beyond the 96 positions of the short frequencies
            backbone.logits(torch.tensor([[5], [6]]), cache)
    assert cache.n_positions == 97
    for row in range(2):
        old = torch.stack([keys[row] for keys in before])
        now = torch.stack([cache.layer(index)[0][row, :, : old.shape[2]] for index in range(backbone.num_layers)])
        where = torch.stack([cache.key_positions(index)[row, :, : old.shape[2]] for index in range(4)])
        real = where[0, 0] != NEVER
        free = backbone.rope.unrotate(old[:, :, real], where[..., real], n_positions=96)
        turned = backbone.rope.rotate(free, where[..., real], n_positions=97)
        torch.testing.assert_close(now[:, :, real], turned, rtol=1e-4, atol=1e-4)
        assert (now - old).abs().max() > 0.1


# -- the attention function against one written out with loops ---------------------------------------------------------


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries_at: torch.Tensor,
    keys_at: torch.Tensor,
    *,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                at, where = int(queries_at[b, i]), keys_at[b, h // group].tolist()
                seen = [j for j, p in enumerate(where) if p <= at and (window is None or at - p < window)]
                logits = key[b, h // group, seen] @ query[b, h, i] * 0.4
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                out[b, i, h] = logits.softmax(-1) @ value[b, h // group, seen]
    return out


@pytest.mark.parametrize("block", [3, 512])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("new", [1, 7])
def test_attention_masks_by_position(
    monkeypatch: pytest.MonkeyPatch, new: int, per_head: bool, window: int | None, softcap: float | None, block: int
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    layers, batch, kv_heads, heads, dim, old, start = 3, 2, 2, 6, 4, 8, 20
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(layers, kv_heads, start, generator=generator).argsort(-1)[..., :old].sort(-1).values
    positions = rows if per_head else rows[0, 0]
    cache = PositionedCache(
        rand(layers, batch, kv_heads, old, dim),
        rand(layers, batch, kv_heads, old, dim),
        positions=positions,
        next_position=start,
    )
    at = torch.arange(start, start + new).expand(batch, -1).clone()
    real = at.clone()
    if new > 1:
        real[1, -2:] = NEVER  # the second row is shorter
    cache.append_positions(real)
    query = rand(batch, heads, new, dim, seed=4)
    key, value = rand(batch, kv_heads, old + new, dim, seed=5), rand(batch, kv_heads, old + new, dim, seed=6)
    context = ForwardContext(cache=cache)
    for layer in range(layers):
        module: Any = SimpleNamespace(layer_idx=layer, num_key_value_groups=heads // kv_heads, training=False)
        out, weights = attention_forward(
            module, query, key, value, None, 0.4, softcap=softcap, sliding_window=window, position_ids=at,
            kv_memory=context,
        )  # fmt: skip
        assert weights is None
        keys_at = cache.key_positions(layer).expand(batch, kv_heads, -1)
        expected = by_hand(query, key, value, at, keys_at, window=window, softcap=softcap)
        torch.testing.assert_close(out[real != NEVER], expected[real != NEVER], rtol=1e-5, atol=1e-5)


# -- the attention function inside the models --------------------------------------------------------------------------


@EVERY
def test_a_model_called_without_context_equals_the_reference(name: str) -> None:
    backbone, rows = shared_backbone(name), [list(letters(60, seed=seed).encode()) for seed in (1, 2)]
    with torch.no_grad():
        together = backbone.model(torch.tensor(rows)).logits
    for row, logits in zip(rows, together, strict=True):
        assert_close(logits, full_logits(name, row))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_model_with_a_transformers_cache_equals_the_reference(name: str) -> None:
    backbone, ids = shared_backbone(name), torch.tensor([list(letters(50).encode())])
    cache = {cache_argument(backbone.model.forward): DynamicCache(config=backbone.config)}
    with torch.no_grad():
        parts = [backbone.model(part, use_cache=True, **cache).logits for part in ids.split([30, 19, 1], dim=1)]
    ours = torch.cat(parts, dim=1)[0]
    assert_close(ours, full_logits(name, ids[0].tolist()))


@EVERY
def test_query_blocks_do_not_change_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = shared_backbone(name)
    cache = Compressor(backbone, selector="attention").compress(letters(60), keep_ratio=0.5)
    ids = torch.tensor([backbone.encode(letters(40, seed=3))])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return backbone.logits(ids, compose(backbone, [cache], n_question=40), every=True)[0]

    whole = logits()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    assert_close(logits(), whole)


@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@EVERY
def test_rows_of_a_padded_batch_equal_each_alone(name: str, keep_ratio: float) -> None:
    """The longest question leaves the shorter ones behind by more than a window, so that padding sees no key at all."""
    backbone = shared_backbone(name)
    cache = Compressor(backbone, selector="attention").compress(letters(30), keep_ratio=keep_ratio)
    rows = [backbone.encode(letters(n, seed=n)) for n in (40, 3, 11)]
    lengths = torch.tensor([40, 3, 11])
    padded = torch.tensor([row + [0] * (40 - len(row)) for row in rows])
    following = torch.tensor([[40], [50], [60]])
    with torch.no_grad():
        together = compose(backbone, [cache], n_question=40, n_new=1, batch_size=3)
        first = backbone.logits(padded, together, lengths=lengths)
        second = backbone.logits(following, together)
        for index, row in enumerate(rows):
            alone = compose(backbone, [cache], n_question=40, n_new=1)
            assert_close(first[index], backbone.logits(torch.tensor([row]), alone)[0])
            assert_close(second[index], backbone.logits(following[index : index + 1], alone)[0])


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("name", WINDOWED)
def test_gradients_reach_cached_keys_and_values(name: str, room: int) -> None:
    backbone = make_backbone(name)
    stored = Compressor(backbone, selector="attention").compress(letters(40), keep_ratio=0.5)
    ids = torch.tensor([backbone.encode(letters(5, seed=1))])
    made = compose(backbone, [stored], n_question=5)
    keys, values = (
        torch.stack([torch.nn.functional.pad(made.layer(i)[part], (0, 0, 0, room)) for i in range(backbone.num_layers)])
        for part in (0, 1)
    )
    positions, start = made.composed_positions, int(made.next_positions[0])

    def loss(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        cache = PositionedCache(keys, values, positions=positions, next_position=start)
        return backbone.logits(ids, cache, every=True).logsumexp(-1).sum()

    with torch.no_grad():
        expected = loss(keys.clone(), values.clone())
    keys, values = keys.double().float().requires_grad_(), values.clone().requires_grad_()
    reached = loss(keys, values)
    torch.testing.assert_close(reached, expected)
    reached.backward()
    for tensor in (keys, values):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        change = tensor.grad * (0.01 / tensor.grad.norm())
        with torch.no_grad():  # uphill as steep as the gradient says
            up = [t + change if t is tensor else t.clone() for t in (keys, values)]
            down = [t - change if t is tensor else t.clone() for t in (keys, values)]
            slope = (loss(*up) - loss(*down)) / 0.02
        torch.testing.assert_close(slope, tensor.grad.norm(), rtol=0.05, atol=0.05)


def test_generate_of_transformers_still_works() -> None:
    """Measurements compare with it on the model of a backbone."""
    for name in ("llama", "mistral", "phi3"):
        ids = torch.tensor([list(letters(40, seed=9).encode())])
        ours = shared_backbone(name).model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours, plain_model(name).generate(ids, max_new_tokens=6, do_sample=False))
