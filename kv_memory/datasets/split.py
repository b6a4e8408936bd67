"""Holding documents out and drawing samples, by the hash of their ids.

Hashes rather than a random generator: what a document falls to depends on its id alone, so that it stays on its side
when others are added, removed or put into another order, and on every machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable

from kv_memory.datasets.example import Example
from kv_memory.errors import ConfigError

__all__ = ["corpus_split", "sample", "split_by_hash"]


def split_by_hash(id: str, share: float) -> bool:
    """Whether the document of this id belongs to the held-out `share`.

    A document held out at one share is held out at every larger one.

    Args:
        id: Of the example.
        share: Part of all documents that is held out, in [0, 1].

    Raises:
        ConfigError: `share` is outside its range.
    """
    _check_share(share, where="share")
    return _place(id) < share


def corpus_split(examples: Iterable[Example], held_out: float = 0.2) -> tuple[list[Example], list[Example]]:
    """Divide a corpus into what may be trained on and what is held out for evaluation, each in the order given.

    By `split_by_hash`, so the held-out part is about, not exactly, this share. Where one side would be empty and there
    are two documents, the document nearest to the border changes sides.

    Args:
        examples: All of them; they are held in memory.
        held_out: Share of the second part, in (0, 1).

    Returns:
        `(training, held out)`; examples with the same id are on the same side.

    Raises:
        ConfigError: `held_out` is outside its range.
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
    """Draw `n` examples without holding the others; all of them, shuffled, where there are no more.

    The same examples in any order give the same sample, and a smaller sample is the beginning of a larger one.

    Args:
        examples: Read once, to the end.
        n: How many.
        seed: Another seed draws others.

    Raises:
        ConfigError: `n` is negative.
    """
    if n < 0:
        raise ConfigError(f"n must be 0 or more, got {n}", where="n")
    # The number only decides between equal ids, whose examples cannot be compared.
    drawn = ((_place(f"{seed}:{example.id}"), number, example) for number, example in enumerate(examples))
    return [example for _, _, example in heapq.nsmallest(n, drawn)]


def _place(text: str) -> float:
    """Where its hash falls in [0, 1)."""
    # 53 bits: what a float holds exactly. More could round up to 1.
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def _check_share(share: float, *, where: str, open_ends: bool = False) -> None:
    inside = isinstance(share, int | float) and not isinstance(share, bool)
    inside = inside and (0 < share < 1 if open_ends else 0 <= share <= 1)
    if not inside:
        raise ConfigError(f"{where} must lie in {'(0, 1)' if open_ends else '[0, 1]'}, got {share!r}", where=where)
