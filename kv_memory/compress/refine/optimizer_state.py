"""State of one document's refinement: its optimiser, and the selection of its best state."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kv_memory.compress.refine.loss import Predictions
from kv_memory.compress.refine.probes import KINDS, SHARES, Probe, ProbeKind
from kv_memory.compress.refine.trainable_cache import TrainableCache


class ProbeTarget(NamedTuple):
    """A probe with the predictions of the full cache; for a held-out probe full logits, `(n_wanted, vocab_size)`."""

    probe: Probe
    taught: Predictions | torch.Tensor


class Progress:
    """Refinement of one document: its trainable cache, its optimiser, and the best state so far."""

    def __init__(
        self, trainable: TrainableCache, asked: Sequence[ProbeTarget], *, lr: float, draw: random.Random
    ) -> None:
        self.trainable = trainable
        self.practised = [a for a in asked if not a.probe.held_out]
        self.held_out = [a for a in asked if a.probe.held_out]
        self.n_steps = 0
        self.start: dict[ProbeKind, float] = {}
        self.best: tuple[float, int, list[torch.Tensor]] = (math.inf, 0, [])  # mean held-out KL, steps, moves
        self._lr = lr
        self._draw = draw
        self._queues: dict[ProbeKind, list[ProbeTarget]] = {kind: [] for kind in KINDS}
        self.begin_round()

    def begin_round(self) -> None:
        """Start a round with a fresh optimiser."""
        self.gained, self.stopped, self.looks_without_gain = False, False, 0  # in this round
        self._lowest = self.best[0]
        self._optimizer = torch.optim.Adam(self.trainable.moves, lr=self._lr)

    def step(self, rate: float) -> None:
        """Step along the gradients that were added to the trainable; `rate` multiplies the learning rate."""
        if not all(bool(move.grad.isfinite().all()) for move in self.trainable.moves if move.grad is not None):
            self.stopped = True  # not finite: the best state so far is kept
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr * rate
            self._optimizer.step()
            self.n_steps += 1
        self._optimizer.zero_grad()

    def halve(self) -> None:
        """Move half the way back to the best state so far."""
        for move, best in zip(self.trainable.moves, self.best[2], strict=True):
            move.lerp_(best, 0.5)

    def next_probes(self, n: int) -> list[ProbeTarget]:
        """About `n` probes, of every kind by its share; all of a kind are used once before any is used again."""
        chosen: list[ProbeTarget] = []
        for kind, queue in self._queues.items():
            own = [asked for asked in self.practised if asked.probe.kind == kind]
            for _ in range(min(len(own), max(1, round(n * SHARES[kind])))):
                if not queue:
                    queue += own
                    self._draw.shuffle(queue)
                chosen.append(queue.pop())
        return chosen

    def look(self, found: dict[ProbeKind, float], tolerance: float) -> None:
        """Record the held-out KL of every kind; in the best state none is more than `tolerance` above the start."""
        mean = sum(found.values()) / len(found)
        if not self.start:
            self.start, self.best = found, (mean, 0, [move.clone() for move in self.trainable.moves])
            return
        worse = any(not kl <= self.start[kind] * (1 + tolerance) for kind, kl in found.items())
        if mean < self.best[0] and not worse:
            self.best, self.gained = (mean, self.n_steps, [move.clone() for move in self.trainable.moves]), True
        # Patience looks at the mean alone: with large steps one kind may be worse for a while.
        self.looks_without_gain = 0 if mean < self._lowest else self.looks_without_gain + 1
        self._lowest = min(self._lowest, mean) if mean == mean else self._lowest

    def back_to_best(self) -> None:
        """Return to the best state so far."""
        for move, best in zip(self.trainable.moves, self.best[2], strict=True):
            move.copy_(best)
        self.n_steps = self.best[1]
