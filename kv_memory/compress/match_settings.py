"""How entries are chosen and fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kv_memory.errors import ConfigError

__all__ = ["MatchSettings"]


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """How entries are chosen and fitted; part of the fingerprint.

    Attributes:
        score: What entries are chosen by: `output`, see `output_errors`; or `attention`, the highest that any row pays.
        depth_weight: Natural logarithm of how much more an error counts in the last layer than in the first; 0 for all
            alike.
        stages: Multiples of the budget kept in each stage before the last; empty for a single choice.
        fit: Whether what is kept is fitted; without it the stages have no effect.
        weight_ridge: How strongly weights are pulled to 1, in mean diagonals of their system.
        value_ridges: How strongly values are pulled to what they were, in mean diagonals; the best on held-out rows.
        part_tokens: Length of the parts in which the document is repeated.
        max_rows: Queries of a head that stages are fitted to, at most; of a longer document evenly spread ones.
        max_final_rows: The same for the last fit.
        key_steps: Steps of gradient descent that move keys, values and biases after the last fit; 0 leaves keys alone.
        key_rate: Size of the first of these steps, in standard deviations of the head's keys and values.
        rows_per_step: Queries of a head that a step looks at, at most; the next step at others.
    """

    score: Literal["output", "attention"] = "output"
    depth_weight: float = 1.5
    stages: tuple[float, ...] = (4.0, 2.0, 1.4)
    fit: bool = True
    weight_ridge: float = 1e-2
    value_ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 100.0)
    part_tokens: int = 1024
    max_rows: int = 4096
    max_final_rows: int = 8192
    key_steps: int = 60
    key_rate: float = 0.02
    rows_per_step: int = 512

    def __post_init__(self) -> None:
        checks = {
            "depth_weight": (math.isfinite(self.depth_weight), "a finite number"),
            "stages": (all(1 < stage < math.inf for stage in self.stages), "numbers above 1"),
            "weight_ridge": (0 < self.weight_ridge < math.inf, "above 0"),
            "value_ridges": (all(0 < v < math.inf for v in self.value_ridges) and self.value_ridges, "numbers above 0"),
            "part_tokens": (self.part_tokens >= 1, "at least 1"),
            "max_rows": (self.max_rows >= 1, "at least 1"),
            "max_final_rows": (self.max_final_rows >= 1, "at least 1"),
            "key_steps": (self.key_steps >= 0, "at least 0"),
            "key_rate": (0 < self.key_rate < math.inf, "above 0"),
            "rows_per_step": (self.rows_per_step >= 1, "at least 1"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}", where=name)

    @property
    def name(self) -> str:
        """For the fingerprint."""
        stages = ",".join(f"{stage:g}" for stage in self.stages) if self.fit else "score"
        ridges = ",".join(f"{ridge:g}" for ridge in self.value_ridges)
        sizes = f"{self.part_tokens}:{self.max_rows}:{self.max_final_rows}"
        moved = f":keys:{self.key_steps}:{self.key_rate:g}:{self.rows_per_step}" if self.fit and self.key_steps else ""
        depth = f":depth:{self.depth_weight:g}" if self.depth_weight else ""
        return f"matched:{self.score}:{stages}:{self.weight_ridge:g}:{ridges}:{sizes}{moved}{depth}"
