"""Held-out splits and samples of documents, by the hash of their ids.

A random generator was rejected: with hashes, the side of a document depends only on its id. It stays the same when
other documents are added, removed or reordered, and on every machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable

from kv_memory.datasets.example import Example
from kv_memory.errors import ConfigError


def split_by_hash(id: str, share: float) -> bool:
    """Whether the document with this id belongs to the held-out `share`.

    A document held out at one share is held out at every larger one.

    Raises:
        ConfigError: `share` is outside [0, 1].
    """
    _check_share(share, where="share")
    return _place(id) < share


def corpus_split(examples: Iterable[Example], held_out: float = 0.2) -> tuple[list[Example], list[Example]]:
    """Divide a corpus into a training part and a part held out for evaluation, each in the order given.

    The split is by `split_by_hash`, so the held-out part has about, not exactly, this share. If one side would be empty
    and there are at least two documents, the document closest to the border changes sides.

    Returns:
        `(training, held out)`; examples with the same id are on the same side.

    Raises:
        ConfigError: `held_out` is outside (0, 1).
    """
    _check_share(held_out, where="held_out", open_ends=True)
    everything = list(examples)
    places = {example.id: _place(example.id) for example in everything}
    chosen = {id for id, place in places.items() if place < held_out}
    if len(places) > 1 and not chosen:
        chosen = {min(places, key=places.__getitem__)}
    elif len(places) > 1 and len(chosen) == len(places):
        chosen.remove(max(places, key=places.__getitem__))
    return [e for e in everything if e.id not in chosen], [e for e in everything if e.id in chosen]


def sample(examples: Iterable[Example], n: int, seed: int = 0) -> list[Example]:
    """Draw `n` examples without holding the others in memory; all of them, shuffled, if there are at most `n`.

    The same examples in any order give the same sample, and a smaller sample is the beginning of a larger one.

    Raises:
        ConfigError: `n` is negative.
    """
    if n < 0:
        raise ConfigError(f"n must be 0 or more, got {n}", where="n")
    # The number only decides between equal ids, since examples cannot be compared.
    drawn = ((_place(f"{seed}:{example.id}"), number, example) for number, example in enumerate(examples))
    return [example for _, _, example in heapq.nsmallest(n, drawn)]


def _place(text: str) -> float:
    """The hash of a text as a number in [0, 1)."""
    # 53 bits are exact in a float; more could round up to 1.
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def _check_share(share: float, *, where: str, open_ends: bool = False) -> None:
    inside = isinstance(share, int | float) and not isinstance(share, bool)
    inside = inside and (0 < share < 1 if open_ends else 0 <= share <= 1)
    if not inside:
        raise ConfigError(f"{where} must lie in {'(0, 1)' if open_ends else '[0, 1]'}, got {share!r}", where=where)
