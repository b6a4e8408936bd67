"""The selector `combined`: an adapter's scores and the change of the output top_k_mask together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Adapter, Compressor, Matched, MatchSettings
from kv_memory.compress.combined import combined_scores
from kv_memory.compress.kept import top_k_mask
from kv_memory.compress.prefill import DocumentPrefill, prefill_documents
from kv_memory.errors import ConfigError
from kv_memory.settings import MemorySettings
from tests.conftest import make_backbone
from tests.reference import by_head, letters

TEXT = letters(60)
FORM: dict[str, Any] = {"scorer": "layer", "routed": "document", "budget": "model"}


def adapted(**options: Any) -> Adapter:
    return Adapter.create(make_backbone("llama"), rank=4, **{**FORM, "zero_init": False, **options})


def read(adapter: Adapter, selector: Matched) -> tuple[torch.Tensor, DocumentPrefill]:
    ids = torch.tensor([adapter.backbone.encode(TEXT)])
    n_tokens, n_kept = torch.tensor([ids.shape[1]]), torch.tensor([15])
    with torch.no_grad():
        return ids, prefill_documents(adapter, ids, n_tokens, n_kept, room=selector.extra_tokens)


def test_adapter_scores_and_output_errors_both_count() -> None:
    adapter, selector = adapted(), Matched(MatchSettings(part_tokens=32))
    ids, reading = read(adapter, selector)
    with torch.no_grad():
        errors = selector.documents(adapter.backbone, ids, reading.cache)[0].scores
        scores = combined_scores(adapter.backbone, selector, ids, reading)
    made = top_k_mask(scores, torch.tensor([ids.shape[1]]), torch.tensor([15]), budget="model")
    assert made.shape == reading.selected.shape and int(made.sum()) == 15 * 8

    def best(scores: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
        mask[scores.flatten().topk(15 * 8).indices] = True
        return mask.view_as(scores)

    assert made[:, 0].equal(best(reading.scores[:, 0] + errors.log() / 2))
    assert not made.equal(reading.selected), "the errors had no say"
    assert not made[:, 0].equal(best(errors)), "the adapter had no say"


def test_prefilled_cache_is_left_unchanged() -> None:
    adapter, selector = adapted(), Matched(MatchSettings(part_tokens=32))
    ids, reading = read(adapter, selector)
    before = [tensor.clone() for tensor in reading.cache.layer(3)]
    with torch.no_grad():
        combined_scores(adapter.backbone, selector, ids, reading)
    for old, new in zip(before, reading.cache.layer(3), strict=True):
        assert old.equal(new)


def test_combined_has_its_own_method_and_selection() -> None:
    adapter = adapted()
    alone, combined = (
        Compressor(adapter.backbone, adapter=adapter),
        Compressor(adapter.backbone, adapter=adapter, selector="combined"),
    )
    assert combined.fingerprint().method.startswith("adapter+matched:")
    assert alone.fingerprint().method.startswith("adapter|")
    one, other = alone.compress(TEXT, keep_ratio=0.25), combined.compress(TEXT, keep_ratio=0.25)
    assert one.keys.shape == other.keys.shape
    positions = [[head[0].tolist() for layer in by_head(cache) for head in layer] for cache in (one, other)]
    assert positions[0] != positions[1]
    again = combined.compress_many([TEXT, TEXT[:40]], keep_ratio=0.25)[0]
    assert again.to_bytes() == other.to_bytes()


def test_combined_selection_keeps_the_kept_spans() -> None:
    adapter = adapted()
    made = Compressor(adapter.backbone, adapter=adapter, selector="combined").compress(
        TEXT, keep_ratio=0.1, keep_spans=[(10, 20)]
    )
    for layer in by_head(made):
        for positions, _, _ in layer:
            assert len(set(positions.tolist())) >= 10


@pytest.mark.parametrize(
    ("options", "said"), [(None, "needs an adapter"), ({"routed": "kept", "budget": "head"}, "routes whole documents")]
)
def test_combined_without_a_suitable_adapter_is_rejected(options: dict[str, Any] | None, said: str) -> None:
    adapter = None if options is None else adapted(**options)
    backbone = make_backbone("llama") if adapter is None else adapter.backbone
    with pytest.raises(ConfigError, match=said) as caught:
        Compressor(backbone, adapter=adapter, selector="combined")
    assert caught.value.next_step


def test_combined_selector_with_adapter_none_is_rejected() -> None:
    with pytest.raises(ConfigError, match="adapter='none' means no adapter"):
        MemorySettings.resolve({}, adapter="none", selector="combined")


def test_stored_combined_selector_follows_its_adapter() -> None:
    settings = MemorySettings.resolve({}, selector="combined", model="smollm2")
    assert (settings.adapter, settings.selector) == ("shipped", "combined")
    without = {"adapter": None, "selector": "reconstruction"}
    assert MemorySettings.resolve(without, selector="combined").adapter == "shipped"
    combined = {"adapter": "shipped", "selector": "combined"}
    assert MemorySettings.resolve(combined).selector == "combined"
    left = MemorySettings.resolve(combined, adapter="none")
    assert (left.adapter, left.selector) == (None, "matched")
    elsewhere = MemorySettings.resolve(combined, model="a/model")
    assert (elsewhere.adapter, elsewhere.selector) == (None, "matched")
    other = MemorySettings.resolve(combined, selector="attention")
    assert (other.adapter, other.selector) == (None, "attention")
