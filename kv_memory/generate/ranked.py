"""Caches of a ranking before a question: their order, and a bias that leaves the best passage most of the attention.

Passages that are compressed apart do not see one another, and a small model then answers from any of them. A constant
bias on all entries of a passage multiplies the weight of its attention by `exp(bias)`, without a token being computed,
and what the best passage lacks is still found in the others. docs/fidelity.md, "Several documents", has the figures,
and those of what was rejected: shared positions, gaps, tokens between passages, recomputed tokens, a temperature, and a
correction of keys and values by what one prefill of other texts adds to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.cache.fingerprint import FORMATS
from kv_memory.config import PassageOrder


def place_ranked(
    caches: Sequence[DistilledCache], *, order: PassageOrder = "best_last", rank_bias: float = 0.0
) -> list[DistilledCache]:
    """The caches of a ranking as `compose` takes them.

    Args:
        caches: Caches of the passages, best first; they are not changed.
        order: Order of their positions. The model attends most to what is next to the question. In one prefill of all
            texts it answers better from the first, so this is for caches only.
        rank_bias: Bias of all passages but the best, at most 0; 0 for none.
    """
    biased = [_biased(cache, rank_bias if rank else 0.0) for rank, cache in enumerate(caches)]
    return biased if order == "best_first" else biased[::-1]


# Caches that were biased before, so that what was composed of them is found again (`HotCaches`).
_known: WeakKeyDictionary[DistilledCache, dict[float, DistilledCache]] = WeakKeyDictionary()


def _biased(cache: DistilledCache, bias: float) -> DistilledCache:
    if bias == 0:
        return cache
    known = _known.setdefault(cache, {})
    return known.setdefault(bias, known.get(bias) or add_bias(cache, bias))


def add_bias(cache: DistilledCache, bias: float) -> DistilledCache:
    """A copy of the cache with a constant added to the biases of its entries; the cache itself if it is 0."""
    if bias == 0:
        return cache
    own = torch.zeros(cache.keys.shape[:-1], device=cache.keys.device) if cache.bias is None else cache.bias.float()
    version = max(cache.fingerprint.format_version, FORMATS[1])  # the first format with biases
    return replace(
        cache, bias=(own + bias).to(torch.float16), fingerprint=replace(cache.fingerprint, format_version=version)
    )
