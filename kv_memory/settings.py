"""What a store remembers about how its documents are compressed and asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kv_memory.config import Layout, SelectorName, check_choice, check_keep_ratio
from kv_memory.embedded import EMBEDDED
from kv_memory.errors import ConfigError
from kv_memory.prompts import PromptName

__all__ = ["MemorySettings", "given_settings", "resolve_settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How a store's documents are compressed and asked; remembered in the store.

    Attributes:
        model: `embedded`, a model folder, or a hub id.
        adapter: An adapter folder, or None.
        keep_ratio: Share of the tokens kept, in (0, 1]; 0.5 for the embedded model and 0.25 for others, unless set.
        selector: The training-free selector used without an adapter.
        passage_tokens: Longest passage, 256 tokens for the embedded model and 1,024 for others, unless set; None
            keeps documents whole.
        prompt: The name of the prompt form.
        layout: How documents are placed, see `generate.compose`.
    """

    model: str = EMBEDDED
    adapter: str | None = None
    keep_ratio: float = 0.5
    selector: SelectorName = "reconstruction"
    passage_tokens: int | None = 256
    prompt: PromptName = "auto"
    layout: Layout = "source"

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep_ratio)
        check_choice(self.selector, SelectorName, where="selector")
        check_choice(self.prompt, PromptName, where="prompt")
        check_choice(self.layout, Layout, where="layout")
        if self.passage_tokens is not None and self.passage_tokens < 16:
            raise ConfigError(
                f"passage_tokens must be at least 16 or None, got {self.passage_tokens}", where="passage_tokens"
            )

    @property
    def top_k(self) -> int:
        """How many passages a question is answered from by default: the embedded model copes with one only."""
        return 1 if self.model == EMBEDDED else 3


def given_settings(
    *,
    model: str | Path | None,
    adapter: str | Path | None,
    keep_ratio: float | None,
    selector: SelectorName | None,
    passage_tokens: int | Literal["auto"] | None,
    prompt: PromptName | None,
    layout: Layout | None,
) -> dict[str, Any]:
    """The settings a caller gave, checked; those left at None (`auto` for passage_tokens) are not among them.

    Raises:
        ConfigError: One is out of range.
    """
    values = {
        "model": None if model is None else str(model),
        "adapter": None if adapter is None else str(adapter),
        "keep_ratio": keep_ratio,
        "selector": selector,
        "prompt": prompt,
        "layout": layout,
    }
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if passage_tokens != "auto":
        given["passage_tokens"] = passage_tokens
    MemorySettings(**given)
    return given


def resolve_settings(given: Mapping[str, Any], stored: Mapping[str, Any]) -> MemorySettings:
    """What was given, else what the store remembers, else the defaults.

    Args:
        given: From `given_settings`.
        stored: From the last `add`; empty for a new store.
    """
    names = {field.name for field in dataclasses.fields(MemorySettings)}
    kept = {name: value for name, value in stored.items() if name in names}
    if "model" in given and given["model"] != kept.get("model"):
        # Adapter and prompt belong to one model, and passages to what it can read.
        for name in ("adapter", "prompt"):
            kept.pop(name, None)
    merged = {**kept, **given}
    # A model of 135M parameters loses the thread in long passages, and has little to spare in its caches.
    defaults: dict[str, Any] = {"passage_tokens": 1024, "keep_ratio": 0.25}
    if merged.get("model", EMBEDDED) == EMBEDDED:
        defaults = {"passage_tokens": 256, "keep_ratio": 0.5}
    return MemorySettings(**{**defaults, **merged})
