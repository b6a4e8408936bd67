"""Recommend: chooses one setting from the measurements at each keep_ratio, and the command that uses it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_memory.errors import ConfigError
from kv_memory.evaluate.aggregate import Interval
from kv_memory.evaluate.report import kept_text
from kv_memory.settings import NO_ADAPTER, MemorySettings

LEAST_PASSAGES, LEAST_QUESTIONS = 3, 12  # below these there is too little data to judge


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Criteria for a setting.

    Attributes:
        max_kl: Largest KL to the full cache, in nats.
        min_same: Smallest share of answers that stay the same.
    """

    max_kl: float = 0.1
    min_same: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.max_kl < float("inf"):
            raise ConfigError(
                f"max_kl must be above 0, got {self.max_kl}", where="max_kl", next_step="Pass a KL in nats, e.g. 0.1."
            )
        if not 0 <= self.min_same <= 1:
            raise ConfigError(
                f"min_same must lie in [0, 1], got {self.min_same}", where="min_same", next_step="Pass e.g. 0.8."
            )

    def __str__(self) -> str:
        return f"a KL of at most {self.max_kl:g} and at least {self.min_same:.0%} of answers the same"


@dataclass(frozen=True, kw_only=True)
class AdviceRow:
    """Cost and fidelity of a keep_ratio, on the same passages and questions as all other rows.

    Attributes:
        method: Name of the selector, or `adapter`; with `+STORAGE` appended if the storage is not `auto`.
        size_bytes: Mean size of a passage's cache in the store, in bytes.
        full_bytes: Mean size of its uncompressed cache, as the model computes it, in bytes.
        kl: KL to the full cache on its own answers, in nats; the mean over questions.
        kl_ci: 95% interval of `kl`, by a bootstrap over passages; None for a single passage.
        same: Share of questions with the same answer as from the full cache, in SQuAD's normal form. Empty answers
            never count as the same.
        seconds: Mean time in seconds to compress a passage.
        prefills: The same as a multiple of a plain prefill of the passage; the median.
    """

    keep_ratio: float
    method: str
    n_passages: int
    n_questions: int
    size_bytes: float
    full_bytes: float
    kl: float
    kl_ci: Interval | None
    same: float
    seconds: float
    prefills: float

    @property
    def factor(self) -> float:
        """The full cache's size divided by the compressed one's."""
        return self.full_bytes / self.size_bytes

    def __str__(self) -> str:
        return f"{kept_text(self.keep_ratio)}: KL {self.kl:.3f}, {self.same:.0%} the same"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One recommended setting.

    Attributes:
        meets: True if it was measured to meet the criteria.
        enough: True if there were enough passages and questions to judge.
        command: The `kv-memory add` command that uses the setting.
    """

    keep_ratio: float
    meets: bool
    enough: bool
    reason: str
    command: str


def recommend(
    rows: Sequence[AdviceRow], *, criteria: Criteria, settings: MemorySettings, what: Sequence[str]
) -> Recommendation:
    """The smallest measured keep_ratio that meets the criteria; if none does, the one with the smallest KL.

    With fewer than 12 questions about 3 passages there is too little data. The result is then never smaller than the
    keep_ratio of the settings. `what` are the arguments of the `add` command: paths, and options for them.
    """
    meeting = [row for row in rows if row.kl <= criteria.max_kl and row.same >= criteria.min_same]
    closest = min(rows, key=lambda row: row.kl, default=None)
    chosen = min(meeting, key=lambda row: row.keep_ratio, default=closest)
    enough = bool(rows) and rows[0].n_passages >= LEAST_PASSAGES and rows[0].n_questions >= LEAST_QUESTIONS
    asked = settings.keep_ratio
    assert asked is not None  # advice compares ratios, not budgets of tokens or size limits
    ratio = asked if chosen is None else chosen.keep_ratio
    if chosen is None:
        reason = "nothing was measured"
    elif meeting:
        reason = f"the smallest measured keep_ratio with {criteria} ({chosen})"
        if below := [row for row in rows if row.keep_ratio < ratio]:
            next_one = max(below, key=lambda row: row.keep_ratio)
            reason += f"; the next smaller one misses a criterion ({next_one})"
    else:
        reason = (
            f"no measured keep_ratio has {criteria}; the closest is {chosen}. Keep more (--keep-ratio), or relax the "
            "criteria"
        )
    if not enough:
        ratio = max(ratio, asked)
        n_questions, n_passages = (rows[0].n_questions, rows[0].n_passages) if rows else (0, 0)
        reason = (
            f"too little data: questions {n_questions}, passages {n_passages}; at least {LEAST_QUESTIONS} and "
            f"{LEAST_PASSAGES} are needed, so nothing below {kept_text(asked)} is recommended. So far: {reason}"
        )
    return Recommendation(
        keep_ratio=ratio,
        meets=any(row.keep_ratio == ratio for row in meeting),
        enough=enough,
        reason=reason,
        command=add_command(settings, ratio, what),
    )


def add_command(settings: MemorySettings, keep_ratio: float, what: Sequence[str]) -> str:
    """The `kv-memory add` command for a store with these settings; the model's default settings are omitted."""
    default = MemorySettings.resolve({}, model=settings.model)
    words: list[Any] = ["kv-memory", "add", *what, "--keep-ratio", keep_ratio]
    if settings.model != MemorySettings.model:
        words += ["--model", settings.model]
    for name, none in {
        "adapter": NO_ADAPTER,
        "selector": "",
        "passage_tokens": "whole",
        "prompt": "",
        "storage": "",
    }.items():
        value = getattr(settings, name)
        if value != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", none if value is None else value]
    return shlex.join(map(str, words))
