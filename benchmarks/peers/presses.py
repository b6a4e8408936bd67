"""kvpress's presses, made to compress a document after a prefix that is never pruned, to an exact number of entries.

kvpress removes a share of a whole sequence. Here the sequence is the shared prefix and the document, as in
kv-memory, and what remains must be the prefix and `n_kept` entries of the document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from behind import Behind, Whole
from kvpress import (
    AdaKVPress,
    BasePress,
    CapPress,
    CompactorPress,
    CriticalAdaKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    MergingPress,
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from replay import Held, KVComposeBehind, KVgradBehind, KVzipBehind

__all__ = ["METHODS", "Budget", "Recipe"]

logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip logs on every use that it takes several passes


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Number of entries that a press keeps.

    Attributes:
        n_prefix: Tokens of the prefix.
        n_tokens: Tokens of the document.
        n_kept: Entries that remain of the document, per head on average; fewer than `n_tokens`.
        tail_ids: Tokens that follow a request before the model speaks.
    """

    n_prefix: int
    n_tokens: int
    n_kept: int
    tail_ids: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """The `compression_ratio` at which `int(n_tokens * (1 - ratio))` is exactly `n_kept`, whatever floats do."""
        return 1 - (self.n_kept + 0.5) / self.n_tokens

    @property
    def whole_ratio(self) -> float:
        """The same for prefix and document together, of which the prefix remains."""
        return 1 - (self.n_prefix + self.n_kept + 0.5) / (self.n_prefix + self.n_tokens)

    def total_ratio(self, slack: float) -> float:
        """The same for one ranking over all heads.

        kvpress multiplies it by the entries of a layer or of the model and cuts the fraction off; `slack`, in entries
        of one head, makes sure it cuts nothing else off.
        """
        return (self.n_tokens - self.n_kept + slack) / (self.n_prefix + self.n_tokens)


@dataclass(frozen=True)
class Recipe:
    """How one method is built.

    Attributes:
        make: The press for a budget.
        eager: Whether the press needs the attention weights, which only Transformers' eager attention returns.
        settings: Differences from kvpress's defaults, for the record.
    """

    make: Callable[[Budget], BasePress]
    eager: bool = False
    settings: str = ""


def scored(
    scorer: Callable[[Budget], ScorerPress],
    around: Callable[[ScorerPress], Any] | None = None,
    *,
    eager: bool = False,
    settings: str = "",
) -> Recipe:
    """A recipe for a press that scores, and for one of kvpress's wrappers around it."""

    def make(budget: Budget) -> BasePress:
        whole = Whole(budget.ratio, scorer=scorer(budget), n_prefix=budget.n_prefix)
        return Behind(whole if around is None else around(whole), whole)

    return Recipe(make, eager=eager, settings=settings)


def replayed(press: type[KVzipBehind] = KVzipBehind, *, settings: str = "", **options: bool) -> Recipe:
    """A recipe for a press of the KVzip family."""
    held = Held()

    def make(budget: Budget) -> BasePress:
        return press(
            budget.total_ratio(1e-4),
            n_prefix=budget.n_prefix,
            n_kept=budget.n_kept,
            tail_ids=budget.tail_ids,
            held=held,
            **options,
        )

    return Recipe(make, settings=settings)


def kvcompose(budget: Budget) -> BasePress:
    """KVCompose in its form without structure; it counts what is kept, not what goes, so the slack is the other way."""
    return KVComposeBehind(structured=False, compression_ratio=budget.total_ratio(-1e-4), n_prefix=budget.n_prefix)


# The names are those of kvpress's own evaluation where it has one, with its settings.
METHODS: dict[str, Recipe] = {
    "kvpress:kvzip_plus": replayed(kvzip_plus_normalization=True),
    "kvpress:kvzip": replayed(),
    "kvpress:kvgrad": replayed(KVgradBehind),
    "kvpress:adakv_expected_attention": scored(
        lambda _: ExpectedAttentionPress(epsilon=1e-2), AdaKVPress, settings="epsilon=1e-2"
    ),
    "kvpress:adakv_compactor": scored(lambda budget: CompactorPress(budget.ratio), AdaKVPress),
    "kvpress:expected_attention": scored(lambda _: ExpectedAttentionPress()),
    "kvpress:compactor": scored(lambda budget: CompactorPress(budget.ratio)),
    "kvpress:snapkv": scored(lambda budget: SnapKVPress(window_size=min(64, budget.n_prefix + budget.n_tokens - 1))),
    # With the default window of 64, every budget below that is a draw among the last 64 tokens: kvpress gives them all
    # the same score. Here half the budget goes to the window and half to what it looks at.
    "kvpress:snapkv_short": scored(
        lambda budget: SnapKVPress(window_size=max(1, min(64, budget.n_kept // 2))), settings="window_size=n_kept/2<=64"
    ),
    "kvpress:kvcompose_unstructured": Recipe(kvcompose, eager=True, settings="structured=False"),
    "kvpress:critical_adakv_expected_attention": scored(
        lambda _: ExpectedAttentionPress(use_vnorm=False), CriticalAdaKVPress, settings="use_vnorm=False"
    ),
    "kvpress:merging_expected_attention": scored(
        lambda _: ExpectedAttentionPress(epsilon=1e-2), MergingPress, settings="epsilon=1e-2"
    ),
    "kvpress:cap": scored(lambda _: CapPress()),
    "kvpress:cur": scored(lambda _: CURPress()),
    "kvpress:keydiff": scored(lambda _: KeyDiffPress()),
    "kvpress:knorm": scored(lambda _: KnormPress()),
    "kvpress:observed_attention": scored(lambda _: ObservedAttentionPress(), eager=True),
    # The sinks are the prefix, which is kept anyway, so all `n_kept` entries are the most recent ones.
    "kvpress:streaming_llm": scored(
        lambda budget: StreamingLLMPress(budget.whole_ratio, n_sink=budget.n_prefix), settings="n_sink=n_prefix"
    ),
    "kvpress:kvzip_layerwise": replayed(layerwise=True, settings="layerwise"),
    "kvpress:kvzip_per_head": replayed(per_head=True, settings="n_kept in every head"),
}
