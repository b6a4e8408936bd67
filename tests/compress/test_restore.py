"""Restore tokens: learned tokens behind a document that compete with its entries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor, Matched, MatchSettings, RefineSettings
from kv_memory.compress.restore import prefill_restore_tokens, restore_of
from kv_memory.errors import AdapterError, ConfigError
from kv_memory.model.attention import ForwardContext
from tests.conftest import make_backbone
from tests.reference import FixedRouting, by_head, letters

M = 3
TEXT = letters(60)
SETTINGS = MatchSettings(part_tokens=128, key_steps=6, rows_per_step=64)
FILES = ["adapter_config.json", "adapter_model.safetensors", "restore.safetensors", "kv_distill.json"]


def make_adapter(name: str = "llama", m: int = M, **options: Any) -> Adapter:
    """With a LoRA and biases that change much."""
    targets: Any = ("q", "o") if name.startswith("phi3") else ("q", "k", "v", "o")
    adapter = Adapter.create(
        make_backbone(name), rank=4, targets=targets, restore_tokens=m, zero_init=False, seed=3, **options
    )
    draw = torch.Generator().manual_seed(1)
    restore_of(adapter).bias.data.normal_(0.5, 0.5, generator=draw)
    return adapter


def compressor_for(adapter: Adapter, settings: MatchSettings = SETTINGS) -> Compressor:
    return Compressor(adapter.backbone, selector=Matched(settings), adapter=adapter)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return make_adapter()


@pytest.fixture(scope="module")
def saved(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restore") / "mine"
    adapter.save(folder)
    return folder


def n_entries(cache: DistilledCache) -> int:
    return int(cache.head_counts.sum())


def n_restored(cache: DistilledCache) -> int:
    """Entries that are neither the document's nor, by their position, of another token than the last."""
    return sum(len(where) - len(set(where.tolist())) for heads in by_head(cache) for where, *_ in heads)


# -- the adapter -------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_makes_the_same_caches(adapter: Adapter, saved: Path) -> None:
    assert set(FILES) <= {path.name for path in saved.iterdir()} and not (saved / "scorer.safetensors").exists()
    loaded = Adapter.load(saved, make_backbone())
    assert (loaded.config, loaded.sha256) == (adapter.config, adapter.sha256)
    made, again = (compressor_for(one).compress(TEXT, keep_ratio=0.3) for one in (adapter, loaded))
    assert made.to_bytes() == again.to_bytes()
    restore_of(loaded).bias.data[0, 0, 0] += 1
    assert loaded.sha256 != adapter.sha256


def test_logits_without_routing_are_bit_identical(adapter: Adapter) -> None:
    ids = torch.tensor([adapter.backbone.encode(letters(20))])
    plain = make_backbone()
    ours, theirs = (one.logits(ids, one.prefixed_cache(20), every=True) for one in (adapter.backbone, plain))
    assert torch.equal(ours, theirs)
    routing = FixedRouting(torch.ones(1, 20, dtype=torch.bool))
    routed = adapter.backbone.logits(
        ids, adapter.backbone.prefixed_cache(20), every=True, context=ForwardContext(routing=routing)
    )
    assert (routed - theirs).abs().max() > 0.1


def test_an_adapter_for_other_weights_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="was made for"):
        Adapter.load(saved, make_backbone("qwen3"))


@pytest.mark.parametrize(("name", "says"), [("restore.safetensors", "missing"), ("kv_distill.json", "missing")])
def test_an_incomplete_folder_is_refused(saved: Path, tmp_path: Path, name: str, says: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=says):
        Adapter.load(folder, make_backbone())
    (folder / name).write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="unreadable adapter"):
        Adapter.load(folder, make_backbone())


@pytest.mark.parametrize(("name", "m", "says"), [("llama", 33, "0 to 32"), ("phi3_longrope", 2, "length of the seq")])
def test_models_and_numbers_that_do_not_work_are_refused(name: str, m: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_adapter(name, m)


def test_what_does_not_work_with_restore_tokens_is_refused(adapter: Adapter) -> None:
    backbone = adapter.backbone
    for options in ({"selector": "reconstruction"}, {"routed": False}, {"refine": RefineSettings()}):
        with pytest.raises(ConfigError, match="restore tokens"):
            Compressor(backbone, adapter=adapter, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="restore tokens"):
        Compressor(backbone, adapter=adapter, selector="combined")
    with pytest.raises(AdapterError, match="instead of a scorer"):
        _ = adapter.scorer


# -- compression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_window", "phi3"])
def test_restore_tokens_see_the_whole_document(name: str) -> None:
    adapter = make_adapter(name)
    backbone, n_prefix = adapter.backbone, len(adapter.backbone.prefix_ids)
    ids = torch.tensor([backbone.encode_document(TEXT), backbone.encode_document(letters(60, seed=1))])
    cache = backbone.prefixed_cache(ids.shape[1], batch_size=2)
    with torch.no_grad():
        backbone.prefill(ids, cache)
        before = cache.layer(3)[0][:, :, n_prefix:].clone()
        prefill_restore_tokens(adapter, cache)
    keys = cache.layer(3)[0][:, :, n_prefix:]
    assert torch.equal(keys[:, :, :-M], before), "the document's entries are as they were"
    one, other = keys[:, :, -M:]
    assert (one - other).abs().max() > 1e-2, "they do not depend on the document"
    assert cache.key_positions(0)[0, 0, -M:].tolist() == [n_prefix + ids.shape[1] - 1] * M
    assert cache.next_positions.tolist() == [n_prefix + ids.shape[1]] * 2


@pytest.mark.parametrize("ratio", [0.95, 0.5, 0.05])
def test_the_budget_counts_restore_entries(adapter: Adapter, ratio: float) -> None:
    cache = compressor_for(adapter).compress(TEXT, keep_ratio=ratio)
    plain = Compressor(make_backbone(), selector=Matched(SETTINGS)).compress(TEXT, keep_ratio=ratio)
    assert cache.n_tokens == plain.n_tokens and n_entries(cache) <= n_entries(plain)
    assert n_entries(cache) == n_entries(plain) or ratio > 0.5  # some heads keep everything, and no restore tokens
    assert n_restored(cache) > 0 or ratio < 0.5  # random ones do not pay
    assert cache.fingerprint.adapter == adapter.sha256 and cache.fingerprint.method.startswith("restore+matched")


def test_more_restore_tokens_than_the_budget_holds_compete_for_it() -> None:
    adapter = make_adapter(m=32)
    cache = compressor_for(adapter).compress(TEXT, keep_ratio=0.02)
    assert n_entries(cache) == cache.head_counts.numel() and int(cache.head_counts.max()) < 32


def test_a_restore_token_that_nobody_sees_is_not_kept() -> None:
    adapter = make_adapter()
    restore_of(adapter).bias.data.fill_(-60.0)
    cache = compressor_for(adapter).compress(TEXT, keep_ratio=0.3)
    assert n_restored(cache) == 0


def test_biases_and_forced_spans_are_kept(adapter: Adapter) -> None:
    fixed = MatchSettings(part_tokens=128, fit=False)
    cache = compressor_for(adapter, fixed).compress(TEXT, keep_ratio=0.2, keep_spans=[(10, 20)])
    bias, assigned = restore_of(adapter).bias.detach(), 0
    for layer, heads in enumerate(by_head(cache)):
        for head, (where, *_) in enumerate(heads):
            own = where.tolist()
            assert set(range(len("Doc: ") + 10, len("Doc: ") + 20)) <= set(own)
            start = int(cache.head_counts.flatten()[: layer * len(heads) + head].sum())
            given = cache.bias.flatten()[start : start + len(own)]  # type: ignore[union-attr]
            biased = {round(value, 2) for value in given.tolist() if value}
            assert biased <= {round(value, 2) for value in bias[layer, head].half().tolist()}
            assigned += len(biased)
    assert assigned > 0


def test_batched_documents_equal_single_ones(adapter: Adapter) -> None:
    compressor = compressor_for(adapter)
    texts = [letters(n, seed=n) for n in (60, 23, 41)]
    for ours, text in zip(compressor.compress_many(texts, keep_ratio=0.3), texts, strict=True):
        alone = compressor.compress(text, keep_ratio=0.3)
        assert ours.n_tokens == alone.n_tokens
        for layers in zip(by_head(ours), by_head(alone), strict=True):
            for head, other in zip(*layers, strict=True):
                assert head[0].tolist() == other[0].tolist()
                for mine, theirs in zip(head[1:], other[1:], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2e-3)


def test_everything_kept_and_windows(adapter: Adapter) -> None:
    whole = compressor_for(adapter).compress(TEXT, keep_ratio=1.0)
    assert whole.bias is None and n_entries(whole) == whole.head_counts.numel() * whole.n_tokens
    long = Compressor(adapter.backbone, selector=Matched(SETTINGS), adapter=adapter, window_tokens=40)
    cache = long.compress(letters(90), keep_ratio=0.3)
    assert cache.n_tokens == len(adapter.backbone.encode_document(letters(90)))
    prefilled = long.prefill(letters(90)).keep(0.3)
    assert prefilled.to_bytes() == cache.to_bytes()
