"""Recommend: from what was measured at each keep_ratio to one setting, and the command that uses it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kv_memory.errors import ConfigError
from kv_memory.evaluate.aggregate import Interval
from kv_memory.evaluate.report import kept_text
from kv_memory.settings import NO_ADAPTER, MemorySettings, resolve_settings

__all__ = ["LEAST_PASSAGES", "LEAST_QUESTIONS", "AdviceRow", "Recommendation", "Wish", "add_command", "recommend"]

LEAST_PASSAGES, LEAST_QUESTIONS = 3, 12  # fewer say too little


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked of a setting.

    Attributes:
        max_kl: The KL to the full cache, in nats, at most.
        min_same: The share of answers that stay the same, at least.
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

    def is_met_by(self, row: AdviceRow) -> bool:
        """Whether a row keeps within both."""
        return row.kl <= self.max_kl and row.same >= self.min_same

    def __str__(self) -> str:
        return f"a KL of at most {self.max_kl:g} and at least {self.min_same:.0%} of answers the same"


@dataclass(frozen=True, kw_only=True)
class AdviceRow:
    """What a keep_ratio costs and keeps, on the same passages and questions as every other.

    Attributes:
        keep_ratio: Share of the entries kept.
        method: The selector's name, or `adapter`; with the storage behind a plus where that is not `auto`.
        n_passages: Measured.
        n_questions: About them.
        size_bytes: Of a passage's cache in the store; the mean.
        full_bytes: Of its uncompressed cache, as the model computes it; the mean.
        kl: To the full cache on its own answers, in nats; the mean over questions.
        kl_ci: 95% interval, by a bootstrap over passages; None for a single one.
        same: Share of questions whose answer stays the same, in SQuAD's normal form. Empty answers never are.
        seconds: To compress a passage; the mean.
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
        """How many times smaller than the full cache."""
        return self.full_bytes / self.size_bytes

    def __str__(self) -> str:
        return f"{kept_text(self.keep_ratio)}: KL {self.kl:.3f}, {self.same:.0%} the same"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One setting.

    Attributes:
        keep_ratio: To use.
        meets: Whether it was measured to meet the wish.
        enough: Whether there were passages and questions enough to judge.
        reason: In a sentence or two.
        command: The `kv-memory add` command that uses it.
    """

    keep_ratio: float
    meets: bool
    enough: bool
    reason: str
    command: str


def recommend(
    rows: Sequence[AdviceRow], *, wish: Wish, settings: MemorySettings, what: Sequence[str]
) -> Recommendation:
    """The smallest keep_ratio measured that meets the wish; where none does, the one with the least KL.

    With fewer than 12 questions about 3 passages there is too little to judge: then it is never smaller than that of
    the settings.

    Args:
        rows: What was measured; none at all where no question could be asked.
        wish: What it should meet.
        settings: What was measured with.
        what: What is to be added: paths, and options about them.
    """
    meeting = [row for row in rows if wish.is_met_by(row)]
    chosen = (
        min(meeting, key=lambda row: row.keep_ratio) if meeting else min(rows, key=lambda row: row.kl, default=None)
    )
    enough = bool(rows) and rows[0].n_passages >= LEAST_PASSAGES and rows[0].n_questions >= LEAST_QUESTIONS
    asked = settings.keep_ratio
    assert asked is not None  # a budget of tokens or bytes is not what advice is about
    ratio = asked if chosen is None else chosen.keep_ratio
    if chosen is None:
        reason = "nothing was measured"
    elif meeting:
        below = [row for row in rows if row.keep_ratio < ratio]
        reason = f"the smallest measured that has {wish} ({chosen})"
        reason += f"; the next smaller one has not ({max(below, key=lambda row: row.keep_ratio)})" if below else ""
    else:
        reason = f"none measured has {wish}; nearest comes {chosen}. Keep more (--keep-ratio), or ask for less"
    if not enough:
        ratio = max(ratio, asked)
        n_questions, n_passages = (rows[0].n_questions, rows[0].n_passages) if rows else (0, 0)
        reason = (
            f"too little to judge: questions {n_questions}, passages {n_passages}, and it takes {LEAST_QUESTIONS} and "
            f"{LEAST_PASSAGES}; so no less than {kept_text(asked)} is recommended. As far as it goes: "
            f"{reason}"
        )
    return Recommendation(
        keep_ratio=ratio,
        meets=any(row.keep_ratio == ratio for row in meeting),
        enough=enough,
        reason=reason,
        command=add_command(settings, ratio, what),
    )


def add_command(settings: MemorySettings, keep_ratio: float, what: Sequence[str]) -> str:
    """The `kv-memory add` command that makes a store with these settings; what is default for the model is left out."""
    default = resolve_settings({"model": settings.model}, {})
    words: list[Any] = ["kv-memory", "add", *what, "--keep-ratio", keep_ratio]
    if settings.model != MemorySettings.model:
        words += ["--model", settings.model]
    for name, option in (
        ("adapter", "--adapter"),
        ("selector", "--selector"),
        ("passage_tokens", "--passage-tokens"),
        ("prompt", "--prompt"),
        ("storage", "--storage"),
    ):
        value = getattr(settings, name)
        if value != getattr(default, name):
            none = NO_ADAPTER if name == "adapter" else "whole"
            words += [option, none if value is None else value]
    return shlex.join(map(str, words))
