from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import ObservedAttention, Reconstruction, Selector, SinkRecent, selectors
from kv_memory.compress.kept import top_k_mask
from kv_memory.compress.selectors import make_selector
from kv_memory.config import SelectorName, n_kept_for
from kv_memory.errors import ConfigError
from tests.conftest import ARCHITECTURES
from tests.reference import letters, plain_model, shared_backbone

EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))
N = 50


def scores_of(backbone: Any, selector: Selector, ids: list[int]) -> torch.Tensor:
    """As the compressor asks for them."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        cache, plain = (backbone.prefixed_cache(len(ids), room=selector.extra_tokens) for _ in range(2))
        scores = selector.score(backbone, tokens, cache)
        backbone.prefill(tokens, plain)
    for index in range(backbone.num_layers):  # the requests have left nothing behind
        assert cache.layer(index)[0].shape == plain.layer(index)[0].shape
        if backbone.rope.varies:  # whose frequencies may change with the requests
            continue
        assert torch.equal(cache.layer(index)[0], plain.layer(index)[0])
    return scores


@torch.no_grad()
def attentions(name: str, ids: list[int]) -> torch.Tensor:
    """What Transformers' eager attention gives, by KV head: `(layers, kv_heads, group, queries, keys)`."""
    model = plain_model(name)
    given = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    return torch.stack([weights[0].unflatten(0, (2, -1)) for weights in given])


@pytest.mark.parametrize("at_once", [7, 256])
@EVERY
def test_attention_selector_matches_brute_force(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "OBSERVED_QUERIES", at_once)
    backbone = shared_backbone(name)
    ids, n_prefix = backbone.encode(letters(N)), len(backbone.prefix_ids)
    weights = attentions(name, [*backbone.prefix_ids, *ids])[..., n_prefix:, n_prefix:]
    expected = torch.zeros(weights.shape[0], 2, N)
    for layer in range(weights.shape[0]):
        for token in range(N):
            # Softmax gives exactly 0 to what a query may not see: the future, and what lies behind the window.
            seen = [q for q in range(token, N) if weights[layer, :, :, q, token].any()]
            assert len(seen) in {N - token, min(24, N - token)}
            expected[layer, :, token] = weights[layer, :, :, seen, token].mean((1, 2))
    torch.testing.assert_close(scores_of(backbone, ObservedAttention(), ids), expected, rtol=1e-3, atol=1e-5)


@EVERY
def test_reconstruction_selector_matches_brute_force(name: str) -> None:
    backbone = shared_backbone(name)
    ids, n_prefix = backbone.encode(letters(N)), len(backbone.prefix_ids)
    expected = torch.zeros(4, 2, N)
    longest = 0
    for start in range(0, N, 20):
        request = "\n\nRepeat the previous text exactly.\n"
        if start:
            request = "\n\nRepeat the previous text exactly, from here on: "
        asking = backbone.encode(request)[:48] + ids[max(0, start - 8) : start] + ids[start : start + 20]
        longest = max(longest, len(asking))
        weights = attentions(name, [*backbone.prefix_ids, *ids, *asking])
        part = weights[..., n_prefix + N :, n_prefix : n_prefix + N].amax((2, 3))
        expected = torch.maximum(expected, part)
    selector = Reconstruction(part_tokens=20)
    if "longrope" not in name:  # whose frequencies may differ between reading and asking
        torch.testing.assert_close(scores_of(backbone, selector, ids), expected, rtol=1e-3, atol=1e-5)
    assert longest <= selector.extra_tokens


def chosen(scores: torch.Tensor, n_kept: int, **options: Any) -> list[list[list[int]]]:
    """Positions kept in every layer and head of one document."""
    scores = scores.reshape(*([1] * (3 - scores.ndim)), *scores.shape)
    lengths, most = torch.tensor([scores.shape[-1]]), torch.tensor([n_kept])
    mask = top_k_mask(scores[:, None], lengths, most, **{"budget": "head", **options})[:, 0]
    return [[head.nonzero()[:, 0].tolist() for head in layer] for layer in mask]


def test_sink_recent_keeps_both_ends(backbone: Any) -> None:
    scores = scores_of(backbone, SinkRecent(n_sink=3), backbone.encode(letters(N)))
    assert chosen(scores, 7) == [[[0, 1, 2, 46, 47, 48, 49]]]
    assert chosen(scores, 2) == [[[0, 1]]]
    assert chosen(scores_of(backbone, SinkRecent(), [70, 71]), 1) == [[[0]]]


SCORES = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]])


def test_top_k_is_taken_within_each_head() -> None:
    assert chosen(SCORES, 2) == [[[1, 2], [0, 1]]]  # of equal scores the earlier
    forced = torch.tensor([[False, False, False, True, False]])
    assert chosen(SCORES, 2, forced=forced) == [[[1, 3], [0, 3]]]
    assert chosen(SCORES, 5) == [[[0, 1, 2, 3, 4]] * 2]


def test_top_k_is_taken_over_all_heads() -> None:
    assert chosen(SCORES, 2, budget="model") == [[[1, 2, 4], [0]]]
    assert chosen(SCORES, 1, budget="model") == [[[1, 2], []]]
    forced = torch.tensor([[False, False, False, True, False]])
    assert chosen(SCORES, 2, budget="model", forced=forced) == [[[1, 2, 3], [3]]]


def test_documents_in_a_batch_keep_the_same_entries_as_alone() -> None:
    torch.manual_seed(0)
    scores, lengths, n_kept = torch.randn(3, 2, 2, 9), torch.tensor([9, 5]), torch.tensor([4, 1])
    for budget in ("head", "model"):
        together = top_k_mask(scores, lengths, n_kept, budget=budget)  # type: ignore[arg-type]
        for row in (0, 1):
            n = int(lengths[row])
            one = top_k_mask(
                scores[:, row : row + 1, :, :n], lengths[row : row + 1], n_kept[row : row + 1], budget=budget
            )  # type: ignore[arg-type]
            assert torch.equal(together[:, row, :, :n], one[:, 0])
            assert not together[:, row, :, n:].any()
            assert int(together[:, row].sum()) == 6 * int(n_kept[row])


@pytest.mark.parametrize(
    ("n_tokens", "keep_ratio", "n_kept"),
    [
        (100, 0.25, 25),
        (10, 0.25, 3),
        (9, 0.25, 2),
        (1, 0.01, 1),
        (100, 0.001, 1),
        (7, 1.0, 7),
        (3, 0.99, 3),
        (2, 0.25, 1),
    ],
)
def test_n_kept(n_tokens: int, keep_ratio: float, n_kept: int) -> None:
    assert n_kept_for(n_tokens, keep_ratio) == n_kept


def test_selector_names_are_unique_per_settings() -> None:
    names_of_selectors: tuple[SelectorName, ...] = ("sink_recent", "attention", "reconstruction", "matched")
    names = [
        selector.name
        for selector in (
            *(make_selector(name, context_window=4096) for name in names_of_selectors),
            SinkRecent(n_sink=5),
            Reconstruction(part_tokens=64),
        )
    ]
    assert len(set(names)) == 6
    with pytest.raises(ConfigError, match="snapkv") as caught:
        make_selector("snapkv", context_window=4096)  # type: ignore[arg-type]
    assert caught.value.next_step is not None and "reconstruction" in caught.value.next_step
