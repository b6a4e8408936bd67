"""Small distilled caches of every form, with random entries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kv_memory.cache.distilled import DistilledCache, dtype_from_name
from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.config import StorageName

FINGERPRINT = Fingerprint(
    format_version=1,
    architecture="llama",
    weights="a" * 64,
    tokenizer="b" * 64,
    prompt="c" * 64,
    prefix="d" * 64,
    method="attention|window:100",
    adapter="",
    eta=None,
    rope="e" * 64,
    dtype="float32",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
)
DTYPES = ["float32", "bfloat16", "float16"]


def make_cache(*, n_tokens: int = 40, n_kept: int = 10, per_head: bool = True, **fields: Any) -> DistilledCache:
    fingerprint = replace(FINGERPRINT, **fields)
    generator = torch.Generator().manual_seed(0)
    shape = (fingerprint.num_layers, fingerprint.num_kv_heads, n_kept)
    keys, values = (
        torch.randn(*shape, fingerprint.head_dim, generator=generator).to(dtype_from_name(fingerprint.dtype))
        for _ in range(2)
    )
    rows = torch.rand(*(shape[:2] if per_head else ()), n_tokens, generator=generator).argsort(-1)
    return DistilledCache(
        keys=keys,
        values=values,
        positions=rows[..., :n_kept].sort(-1).values,
        n_tokens=n_tokens,
        keep_ratio=n_kept / n_tokens,
        fingerprint=fingerprint,
    )


def make_ragged(*, counts: list[list[int]] | None = None, n_tokens: int = 40, **fields: Any) -> DistilledCache:
    """A cache whose heads keep different numbers of entries, one of them none."""
    fingerprint = replace(FINGERPRINT, **fields)
    of = torch.tensor(counts if counts is not None else [[3, 0], [17, 1], [2, 7]])
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(int(of.sum()), fingerprint.head_dim, generator=generator).to(dtype_from_name(fingerprint.dtype))
        for _ in range(2)
    )
    rows = [torch.randperm(n_tokens, generator=generator)[:n].sort().values for n in of.flatten().tolist()]
    return DistilledCache(
        keys=keys,
        values=values,
        positions=torch.cat(rows),
        counts=of,
        n_tokens=n_tokens,
        keep_ratio=0.125,
        fingerprint=fingerprint,
    )


def biased(cache: DistilledCache) -> DistilledCache:
    """The same with biases: format 2."""
    bias = torch.randn(cache.keys.shape[:-1], generator=torch.Generator().manual_seed(1)).half()
    return replace(cache, bias=bias, fingerprint=replace(cache.fingerprint, format_version=2))


def loaded(cache: DistilledCache, folder: Path, storage: StorageName) -> DistilledCache:
    cache.save(folder / storage, storage=storage)
    return DistilledCache.load(folder / storage)
