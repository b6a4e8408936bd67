"""Budgets of tokens and bytes: which keep_ratio they come to, and that files are really no larger."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory import ConfigError, DistilledCache, Keep
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import windows_of
from kv_memory.config import StorageName, n_kept_for
from kv_memory.settings import MemorySettings
from tests.compress.test_compressor import compressor_for
from tests.reference import letters
from tests.store.store_samples import FINGERPRINT

TEXT = letters(60)
N_TOKENS = len(TEXT) + 6  # the wrapper of the document
STORAGES: tuple[StorageName, ...] = ("auto", "float32", "bfloat16", "float16", "int8")


def in_windows(window: int) -> Fingerprint:
    return replace(FINGERPRINT, method=f"attention|window:{window}")


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_keep_tokens_holds_for_documents_of_any_length() -> None:
    for n_tokens, most in itertools.product([1, 2, 7, 63, 64, 65, 1000, 32767, 10**6 + 3], [1, 2, 63, 64, 999, 54321]):
        ratio = Keep(keep_tokens=most).ratio_for(n_tokens, FINGERPRINT)
        assert n_kept_for(n_tokens, ratio) == min(most, n_tokens)
        assert (ratio == 1.0) == (n_tokens <= most)


def test_keep_tokens_is_a_limit_over_all_windows() -> None:
    fingerprint = in_windows(20)
    for n_tokens, most in itertools.product(range(1, 130, 3), range(1, 40)):
        windows = windows_of(n_tokens, 20)
        if most < len(windows):
            with pytest.raises(ConfigError, match="keep_tokens") as caught:
                Keep(keep_tokens=most).ratio_for(n_tokens, fingerprint)
            assert caught.value.next_step == f"Pass {len(windows)} or more."
            continue
        ratio = Keep(keep_tokens=most).ratio_for(n_tokens, fingerprint)
        kept = sum(n_kept_for(end - start, ratio) for start, end in windows)
        assert min(most, n_tokens) - len(windows) < kept <= most


@pytest.mark.parametrize("method", ["sink_recent", "attention", "matched", "adapter_head_ragged"])
@pytest.mark.parametrize("most", [3, 10, 500])
def test_a_cache_has_keep_tokens_entries_per_head(method: str, most: int) -> None:
    compressor = compressor_for("llama", method)
    ratio = compressor.ratio_for(TEXT, Keep(keep_tokens=most))
    made = compressor.compress(TEXT, keep_ratio=ratio)
    heads = compressor.backbone.num_layers * compressor.backbone.num_kv_heads
    assert made.keys.numel() // made.keys.shape[-1] == min(most, N_TOKENS) * heads
    assert made.n_kept == min(most, N_TOKENS) and made.keep_ratio == ratio
    assert Keep(keep_tokens=most).fits(made.keep_ratio, made.n_tokens, made.fingerprint)


@pytest.mark.parametrize("method", ["attention", "matched"])
def test_kept_spans_count_towards_keep_tokens(method: str) -> None:
    compressor = compressor_for("llama", method, window_tokens=20)
    spans = [(0, 5), (30, 33)]
    keep = Keep(keep_tokens=16)
    made = compressor.compress(TEXT, keep_ratio=compressor.ratio_for(TEXT, keep, keep_spans=spans), keep_spans=spans)
    assert 8 < made.n_kept <= 16
    with pytest.raises(ConfigError) as caught:
        compressor.ratio_for(TEXT, Keep(keep_tokens=8), keep_spans=spans)
    assert caught.value.next_step == "Pass 12 or more."  # eight are held, and each of four windows keeps one
    assert compressor.ratio_for(TEXT, Keep(keep_tokens=12), keep_spans=spans) > 0
    whole = [(0, len(TEXT))]
    assert compressor.ratio_for(TEXT, Keep(keep_tokens=N_TOKENS), keep_spans=whole) == 1.0


def test_a_keep_ratio_is_returned_unchanged() -> None:
    compressor = compressor_for("llama", "attention")
    assert compressor.ratio_for(TEXT, 0.3) == compressor.ratio_for(TEXT, Keep(keep_ratio=0.3)) == 0.3


# -- bytes -------------------------------------------------------------------------------------------------------------


def written(cache: DistilledCache, storage: StorageName) -> int:
    """Size of the file with the longest header that a store writes."""
    full = replace(cache, text_sha256="a" * 64, fidelity=1.2345678901234567e-05, refined_steps=192)
    return len(full.to_bytes(storage=storage))


@pytest.mark.parametrize("storage", ["auto", "bfloat16", "int8"])
@pytest.mark.parametrize("method", ["sink_recent", "attention", "matched", "adapter_head_ragged"])
@pytest.mark.parametrize("options", [{}, {"window_tokens": 20}], ids=["one window", "windows"])
def test_files_are_no_larger_than_max_bytes(method: str, storage: StorageName, options: dict[str, Any]) -> None:
    compressor = compressor_for("llama", method, **options)
    heads = compressor.backbone.num_layers * compressor.backbone.num_kv_heads
    entry = heads * (2 * compressor.backbone.head_dim * {"int8": 1, "auto": 4, "float32": 4}.get(storage, 2) + 6)
    n_windows = len(windows_of(N_TOKENS, compressor.window_tokens))
    smallest = smallest_for(compressor.fingerprint(), storage, n_windows)
    for size in (smallest, smallest + 3 * entry + 1, smallest + 9 * entry - 1):
        keep = Keep(max_bytes=size, storage=storage)
        made = compressor.compress(TEXT, keep_ratio=compressor.ratio_for(TEXT, keep))
        assert made.keep_ratio < 1
        # What is left over: less than an entry, one for each further window, and what other forms of a file have more.
        assert size - entry * n_windows - 2000 < written(made, storage) <= size
    whole = compressor.compress(TEXT, keep_ratio=1.0)
    size = written(whole, storage) + 2000 + N_TOKENS * heads * 4  # biases and positions of every head, had it any
    assert compressor.ratio_for(TEXT, Keep(max_bytes=size, storage=storage)) == 1.0


def smallest_for(fingerprint: Fingerprint, storage: StorageName, n_windows: int) -> int:
    """What the error names; it works, and a byte less does not."""
    with pytest.raises(ConfigError) as caught:
        Keep(max_bytes=1, storage=storage).ratio_for(N_TOKENS, fingerprint)
    error = caught.value
    assert error.where == "max_bytes" and error.next_step is not None
    smallest = int(error.next_step.split()[1])
    assert f"{smallest:,} bytes" in error.what
    ratio = Keep(max_bytes=smallest, storage=storage).ratio_for(N_TOKENS, fingerprint)
    windows = windows_of(N_TOKENS, int(fingerprint.method.rpartition("window:")[2]))
    assert len(windows) == n_windows == sum(n_kept_for(end - start, ratio) for start, end in windows)
    with pytest.raises(ConfigError):
        Keep(max_bytes=smallest - 1, storage=storage).ratio_for(N_TOKENS, fingerprint)
    return smallest


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("n_tokens", [32767, 32768, 10**6])
def test_max_bytes_holds_for_long_documents_and_large_files(n_tokens: int, ragged: bool, storage: StorageName) -> None:
    fingerprint = replace(FINGERPRINT, keep_spans="b" * 64)
    layers, heads, width = fingerprint.num_layers, fingerprint.num_kv_heads, fingerprint.head_dim
    size = 700_000
    ratio = Keep(max_bytes=size, storage=storage).ratio_for(n_tokens, fingerprint)
    n_kept = n_kept_for(n_tokens, ratio)
    counts = torch.full((layers, heads), n_kept)
    shape: tuple[int, ...] = (layers, heads, n_kept)
    if ragged:
        counts[0, 0], counts[-1, -1] = 1, 2 * n_kept - 1
        shape = (int(counts.sum()),)
    dtype = getattr(torch, fingerprint.dtype)
    cache = DistilledCache(
        keys=torch.zeros(*shape, width, dtype=dtype),
        values=torch.zeros(*shape, width, dtype=dtype),
        positions=torch.zeros(shape, dtype=torch.int32),
        counts=counts if ragged else None,
        n_tokens=n_tokens,
        keep_ratio=ratio,
        fingerprint=fingerprint,
    )
    assert 0.99 * size < written(cache, storage) <= size


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "where", "step"),
    [
        ({}, "keep_ratio", "one of keep_ratio, keep_tokens and max_bytes"),
        ({"keep_ratio": 0.5, "keep_tokens": 3}, "keep_tokens", "one of"),
        ({"keep_ratio": 0.5, "max_bytes": 3}, "max_bytes", "one of"),
        ({"keep_ratio": 2}, "keep_ratio", "share of tokens"),
        ({"keep_tokens": 0}, "keep_tokens", "keep_tokens=64"),
        ({"keep_tokens": 1.5}, "keep_tokens", "keep_tokens=64"),
        ({"keep_tokens": True}, "keep_tokens", "keep_tokens=64"),
        ({"max_bytes": -5}, "max_bytes", "max_bytes=300_000"),
        ({"max_bytes": "2MB"}, "max_bytes", "max_bytes=300_000"),
    ],
)
def test_exactly_one_way_to_keep_must_be_given(given: dict[str, Any], where: str, step: str) -> None:
    for make in (Keep, MemorySettings) if given else (Keep,):
        with pytest.raises(ConfigError) as caught:
            make(**given)
        assert caught.value.where == where and step in (caught.value.next_step or "")


def test_the_last_given_way_to_keep_replaces_stored_ones() -> None:
    stored: dict[str, Any] = {}
    for choice in ({}, {"keep_tokens": 64}, {"max_bytes": 300_000}, {"keep_ratio": 0.5}, {"max_bytes": 9}, {}):
        settings = MemorySettings.resolve(stored, model="other", **choice)
        stored = {name: getattr(settings, name) for name in ("model", "keep_ratio", "keep_tokens", "max_bytes")}
        wanted = choice or ({"max_bytes": 9} if stored["max_bytes"] else {"keep_ratio": 0.25})
        assert {name: value for name, value in stored.items() if value is not None and name != "model"} == wanted
        assert settings.keep == Keep(**wanted)  # type: ignore[arg-type]
    assert MemorySettings.resolve({"keep_ratio": 0.5}, model="other", keep_tokens=4).keep == Keep(
        keep_tokens=4
    )  # an older store
    with pytest.raises(ConfigError, match="keep_tokens and max_bytes exclude each other"):
        MemorySettings.resolve({}, keep_tokens=4, max_bytes=4)
