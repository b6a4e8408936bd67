"""Hot caches: composed caches that stay in memory between questions, within a byte limit."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from kv_memory.model.kv_cache import PositionedCache
from kv_memory.model.rope import Rope


@dataclass(eq=False, kw_only=True)
class Composed:
    """Prefix and documents at their positions: a `PositionedCache` before a question, whose arguments these are.

    Attributes:
        room: Number of entries that fit behind them.
        in_use: Whether a question is writing to that room.
    """

    keys: Sequence[torch.Tensor]  # (1, num_kv_heads, length + room, head_dim) per layer
    values: Sequence[torch.Tensor]
    positions: torch.Tensor | Sequence[torch.Tensor]
    next_position: int
    room: int
    starts: Sequence[Sequence[int]] | None = None
    bias: Sequence[torch.Tensor] | None = None
    in_use: bool = field(default=False, init=False)

    @property
    def size_bytes(self) -> int:
        """Size of the buffers in bytes, including padding and room."""
        rows = [self.positions] if isinstance(self.positions, torch.Tensor) else self.positions
        return sum(part.nbytes for part in (*self.keys, *self.values, *(self.bias or ()), *rows))

    def cache(self, n_positions: int, *, batch_size: int = 1) -> PositionedCache:
        """A cache for questions that end at `n_positions`, over these buffers; with a larger batch, over copies."""
        keys, values = self.keys, self.values
        if batch_size > 1:
            keys, values = ([part.repeat(batch_size, 1, 1, 1) for part in parts] for parts in (keys, values))
        return _Cache(
            keys,
            values,
            positions=self.positions,
            next_position=self.next_position,
            n_positions=n_positions,
            starts=self.starts,
            bias=self.bias,
        )


class HotCaches:
    """The composed caches used last, within a byte limit. Thread-safe.

    The buffers of a kept cache are lent to one question at a time, which writes behind the documents, so nothing is
    copied. They are free again when the `PositionedCache` over them is, which must be held as long as its tensors are
    used. Meanwhile another question about the same documents composes its own. Rejected: a copy for each question,
    which takes as long as composing.

    What is kept is keyed by the `DistilledCache` objects themselves, and keeps them alive. A store hands out one object
    for one blob as long as it is alive (see `Store.get`), after it has looked at the catalog. So nothing is found here
    of documents that were removed or replaced.

    Args:
        size_bytes: Size limit in bytes of what is kept, with the distilled caches; 0 keeps nothing. Memory that a
            question uses counts, unless it does not stay afterwards.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Composed, int]] = OrderedDict()  # least recently used first
        self._size_bytes = 0
        self.limit_bytes = size_bytes

    def lend(self, key: Hashable, room: int, n_positions: int) -> PositionedCache | None:
        """A cache over kept buffers; None if none are kept under this key, or others use them, or `room` is larger."""
        with self._lock:
            composed, _ = self._kept.get(key, (None, 0))
            if composed is None or composed.in_use or composed.room < room:
                return None
            self._kept.move_to_end(key)
            composed.in_use = True
        return self._lent(key, composed, n_positions)

    def keep(self, key: Hashable, composed: Composed, n_positions: int, *, size_bytes: int) -> PositionedCache:
        """Keep buffers, and lend them; `size_bytes` is the size of the distilled caches that the key keeps alive."""
        size_bytes += composed.size_bytes
        composed.in_use = True
        with self._lock:
            if size_bytes <= self.limit_bytes:
                self._drop(key)
                self._kept[key] = composed, size_bytes
                self._size_bytes += size_bytes
                while self._size_bytes > self.limit_bytes:
                    self._drop(next(iter(self._kept)))
        return self._lent(key, composed, n_positions)

    @property
    def size_bytes(self) -> int:
        """Size of what is kept, in bytes."""
        return self._size_bytes

    def limit(self, size_bytes: int) -> None:
        """Set the size limit, and drop what exceeds it."""
        with self._lock:
            self.limit_bytes = size_bytes
            while self._size_bytes > size_bytes:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        self._size_bytes -= self._kept.pop(key, (None, 0))[1]

    def _lent(self, key: Hashable, composed: Composed, n_positions: int) -> PositionedCache:
        cache = composed.cache(n_positions)
        assert isinstance(cache, _Cache)
        cache.home = self, key, composed
        # One assignment and no lock: it may run at any moment, even in a thread that holds the lock.
        weakref.finalize(cache, setattr, composed, "in_use", False).atexit = False
        return cache

    def forget(self, key: Hashable, composed: Composed) -> None:
        """Drop buffers whose entries are about to be overwritten."""
        with self._lock:
            if self._kept.get(key, (None, 0))[0] is composed:
                self._drop(key)


class _Cache(PositionedCache):
    """A `PositionedCache` over buffers that may be kept."""

    home: tuple[HotCaches, Hashable, Composed] | None = None

    def rerotate(self, rope: Rope, n_positions: int) -> None:
        """`PositionedCache.rerotate`; it overwrites keys whose frequencies change, so these are kept no longer."""
        if self.home is not None and rope.regime(self.n_positions) != rope.regime(n_positions):
            hot, key, composed = self.home
            hot.forget(key, composed)
            self.home = None
        super().rerotate(rope, n_positions)
