"""Settings of the selector `matched`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kv_memory.config import check_at_least, check_fields


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """Settings of the selection and the fit; part of the fingerprint.

    Attributes:
        score: Criterion of the selection: `output`, see `output_errors`; or `attention`, the highest attention from
            any row.
        depth_weight: Natural logarithm of the weight of an error in the last layer relative to the first; 0 weighs all
            layers alike.
        stages: Multiples of the budget kept in each stage before the last; empty for a single selection.
        fit: True to fit what is kept; without the fit the stages have no effect.
        weight_ridge: Strength of the pull of weights towards 1, in mean diagonals of their system.
        value_ridges: Strengths of the pull of values towards their originals, in mean diagonals; the one that is best
            on held-out rows is used.
        part_tokens: Length of the parts in which the document is repeated, in tokens.
        max_rows: Most queries of a KV head that the stages are fitted to; a longer document uses evenly spread ones.
        max_final_rows: Most queries of a KV head that the last fit uses.
        key_steps: Steps of gradient descent that move keys, values and biases after the last fit; 0 leaves keys
            unchanged.
        key_rate: Size of the first of these steps, in standard deviations of the head's keys and values.
        rows_per_step: Most queries of a KV head that one step uses; the next step uses others.
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
        check_fields(
            self,
            depth_weight=(math.isfinite(self.depth_weight), "a finite number"),
            stages=(all(1 < stage < math.inf for stage in self.stages), "numbers above 1"),
            weight_ridge=(0 < self.weight_ridge < math.inf, "above 0"),
            value_ridges=(all(0 < v < math.inf for v in self.value_ridges) and self.value_ridges, "numbers above 0"),
            key_rate=(0 < self.key_rate < math.inf, "above 0"),
        )
        check_at_least(self, 1, "part_tokens", "max_rows", "max_final_rows", "rows_per_step")
        check_at_least(self, 0, "key_steps")

    @property
    def name(self) -> str:
        """Name for the fingerprint, with every setting that decides the result."""
        stages = ",".join(f"{stage:g}" for stage in self.stages) if self.fit else "score"
        ridges = ",".join(f"{ridge:g}" for ridge in self.value_ridges)
        sizes = f"{self.part_tokens}:{self.max_rows}:{self.max_final_rows}"
        moved = f":keys:{self.key_steps}:{self.key_rate:g}:{self.rows_per_step}" if self.fit and self.key_steps else ""
        depth = f":depth:{self.depth_weight:g}" if self.depth_weight else ""
        return f"matched:{self.score}:{stages}:{self.weight_ridge:g}:{ridges}:{sizes}{moved}{depth}"
