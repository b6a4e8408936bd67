"""Settings that a store records: how its documents are compressed and asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kv_memory.cache.keep import Keep, given_keep
from kv_memory.config import Layout, SelectorName, StorageName, check_choice
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import BUILT_IN, DEFAULTS, EMBEDDED, SHIPPED, built_in, concrete_name, recorded_settings
from kv_memory.model.prompts import PromptName

__all__ = ["MemorySettings", "given_settings", "resolve_settings"]

NO_ADAPTER = "none"  # the name a caller passes for "no adapter"
REFINE_STEPS = 48  # if only min_fidelity is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How a store's documents are compressed and asked; recorded in the store.

    Attributes:
        model: Name of a built-in model, a model folder, or a hub id. `embedded`, which stands for different models on
            different machines, is never recorded.
        adapter: Adapter folder, `shipped` for the one inside this package, or None. `smollm2` uses `shipped` unless an
            adapter or a selector is named.
        keep_ratio: Share of the tokens kept, in (0, 1]. 0.25 unless set; None if keep_tokens or max_bytes is set.
        selector: Training-free selector, used without an adapter; or `combined`, an adapter and the scores of
            `matched` together.
        passage_tokens: Length of the longest passage in tokens: 256 for `smollm2` and 1,024 for others, unless set.
            None keeps documents whole.
        prompt: Name of the prompt form.
        layout: Placement of documents, see `generate.compose`.
        refine_steps: Refinement steps for every passage, see `RefineSettings`; 0 for none.
        min_fidelity: Target for the held-out KL in nats. Refinement continues until it is reached, or for 192 steps,
            or for `refine_steps` if that is more. None stops after `refine_steps`.
        storage: Storage type of keys and values that are added: `auto` (as the model computes them), `float32`,
            `bfloat16`, `float16` or `int8`, which takes half the bytes of bfloat16. `int8` for `smollm2` and `auto`
            for others, unless set. Stored caches keep their type.
        keep_text: True to keep the texts of added documents. Without texts a store holds the caches, the documents'
            ids and metadata, and hashes of words; see `kv_memory.retrieval.tokenize` for what the hashes protect.
        keep_tokens: Number of tokens kept of each passage in every layer and head, instead of keep_ratio.
        max_bytes: Largest file size of a passage's cache in bytes, instead of keep_ratio.
    """

    model: str = DEFAULTS[0]
    adapter: str | None = None
    keep_ratio: float | None = None
    selector: SelectorName = "matched"
    passage_tokens: int | None = 1024
    prompt: PromptName = "auto"
    layout: Layout = "source"
    refine_steps: int = 0
    min_fidelity: float | None = None
    storage: StorageName = "auto"
    keep_text: bool = False
    keep_tokens: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.keep_ratio is self.keep_tokens is self.max_bytes is None:
            object.__setattr__(self, "keep_ratio", 0.25)
        _ = self.keep  # raises for values that `Keep` rejects
        check_choice(self.selector, SelectorName, where="selector")
        check_choice(self.prompt, PromptName, where="prompt")
        check_choice(self.layout, Layout, where="layout")
        check_choice(self.storage, StorageName, where="storage")
        if self.passage_tokens is not None and self.passage_tokens < 16:
            raise ConfigError(
                f"passage_tokens must be at least 16 or None, got {self.passage_tokens}", where="passage_tokens"
            )
        if self.refine_steps < 0:
            raise ConfigError(f"refine_steps must be 0 or more, got {self.refine_steps}", where="refine_steps")
        if self.min_fidelity is not None and not 0 < self.min_fidelity < math.inf:
            raise ConfigError(
                f"min_fidelity must be above 0 or None, got {self.min_fidelity}",
                where="min_fidelity",
                next_step="Pass a KL in nats, e.g. 0.1.",
            )

    @property
    def keep(self) -> Keep:
        """The keep_ratio, token budget or size limit of each passage."""
        return Keep(
            keep_ratio=self.keep_ratio,
            keep_tokens=self.keep_tokens,
            max_bytes=self.max_bytes,
            storage=self.storage,
        )

    @property
    def top_k(self) -> int:
        """Default number of passages to answer from: 1 for `smollm2`, which cannot handle more, otherwise 3."""
        return 1 if built_in(self.model) is BUILT_IN["smollm2"] else 3


def given_settings(
    *,
    model: str | Path | None,
    adapter: str | Path | None,
    keep_ratio: float | None,
    selector: SelectorName | None,
    passage_tokens: int | Literal["auto"] | None,
    prompt: PromptName | None,
    layout: Layout | None,
    refine_steps: int | None = None,
    min_fidelity: float | None = None,
    storage: StorageName | None = None,
    keep_text: bool | None = None,
    keep_tokens: int | None = None,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """The settings that a caller gave, checked; those left at None (`auto` for passage_tokens) are omitted.

    The adapter name `none` means no adapter. Naming a training-free selector without an adapter means the same. Of
    keep_ratio, keep_tokens and max_bytes, the given one replaces the recorded one.

    Raises:
        ConfigError: A setting is out of range, or two settings contradict each other.
    """
    values = {
        "model": None if model is None else str(model),
        "adapter": None if adapter in {None, NO_ADAPTER} else str(adapter),
        "selector": selector,
        "prompt": prompt,
        "layout": layout,
        "refine_steps": refine_steps,
        "min_fidelity": min_fidelity,
        "storage": storage,
        "keep_text": keep_text,
    }
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    given |= given_keep(keep_ratio, keep_tokens, max_bytes)
    # Naming a training-free selector means no adapter; `combined` is the exception: it needs one.
    if adapter == NO_ADAPTER or (adapter is None and selector not in {None, "combined"}):
        given["adapter"] = None
    if passage_tokens != "auto":
        given["passage_tokens"] = passage_tokens
    MemorySettings(**given)
    if selector == "combined" and adapter == NO_ADAPTER:
        raise ConfigError(
            "selector 'combined' needs an adapter, and adapter='none' means no adapter",
            where="selector",
            next_step="Drop one, or use selector 'matched'.",
        )
    if refine_steps == 0 and min_fidelity is not None:
        raise ConfigError(
            "min_fidelity needs refinement, and refine_steps=0 turns it off",
            where="min_fidelity",
            next_step="Drop one.",
        )
    return given


def resolve_settings(given: Mapping[str, Any], stored: Mapping[str, Any]) -> MemorySettings:
    """Given settings, else recorded ones, else the defaults.

    Args:
        given: Settings from `given_settings`.
        stored: Settings recorded by the last `add`; empty for a new store. Earlier versions, which knew one built-in
            model only, recorded it as `embedded` or not at all.
    """
    names = {field.name for field in dataclasses.fields(MemorySettings)}
    kept = {name: value for name, value in recorded_settings(stored).items() if name in names}
    if stored:
        kept.setdefault("model", "smollm2")
    model = given.get("model", kept.get("model", EMBEDDED))
    if model == EMBEDDED:
        # Keep the recorded model: another default on this machine must not cause all documents to be compressed again.
        model = kept["model"] if kept.get("model") in DEFAULTS else concrete_name(EMBEDDED)
    if model != kept.get("model"):
        # Adapter and prompt belong to one model, and the cost of int8 was measured on one model only.
        for name in ("adapter", "prompt", "storage"):
            kept.pop(name, None)
    if stored:
        kept.setdefault("keep_text", True)  # older versions kept all texts, so their stores continue to
    if "refine_steps" in given:
        kept.pop("min_fidelity", None)  # newly given steps are exact, not a start towards the old fidelity
    if given.get("selector") == "combined" and kept.get("adapter") is None:
        kept.pop("adapter", None)  # the recorded None only meant a training-free selector
    merged = {**kept, **given, "model": model}
    if merged.get("min_fidelity") is not None and not merged.get("refine_steps"):
        merged["refine_steps"] = REFINE_STEPS
    # A model of 135M parameters loses the thread in long passages, and its caches tolerate little compression.
    defaults: dict[str, Any] = {"passage_tokens": 1024, "keep_ratio": 0.25}
    if built_in(model) is BUILT_IN["smollm2"]:
        # int8 costs it less than half a point of F1 at 1/4, 1/8 and 1/16: docs/fidelity.md.
        defaults = {"passage_tokens": 256, "keep_ratio": 0.25, "adapter": SHIPPED, "storage": "int8"}
    values = {**defaults, **merged}
    if values.get("adapter") is None and values.get("selector") == "combined" and "selector" not in given:
        del values["selector"]  # recorded when there was an adapter
    return MemorySettings(**values)
