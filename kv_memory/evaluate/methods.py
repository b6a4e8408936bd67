"""Methods: the evaluated methods by name; each makes a cache of a document, or needs none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from kv_memory.compress import Adapter, Compressor, Matched, MatchSettings, RefineSettings
from kv_memory.config import Budget, check_choice
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

MethodName = Literal[
    "full",
    "none",
    "random",
    "sink_recent",
    "attention",
    "reconstruction",
    "matched_score",
    "matched_fit",
    "matched_one_stage",
    "matched_fixed_keys",
    "matched_even_layers",
    "matched",
    "adapter_selection",
    "adapter",
    "combined",
    "refined",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
RefineFrom = Literal["auto", "adapter", "combined", "matched", "reconstruction", "attention", "sink_recent"]
# `matched` without some of its parts: the scores alone; the fit alone, of entries selected by attention; in one stage;
# without moving keys; with equal weights for all layers.
PARTS = {
    "matched_score": MatchSettings(fit=False),
    "matched_fit": MatchSettings(score="attention", stages=(), key_steps=0),
    "matched_one_stage": MatchSettings(stages=()),
    "matched_fixed_keys": MatchSettings(key_steps=0),
    "matched_even_layers": MatchSettings(depth_weight=0.0),
}
_NEED_ADAPTER = {"adapter_selection", "adapter", "combined"}


@dataclass(frozen=True, eq=False)
class Method:
    """One way to compress a document; its compressor is None for `none`.

    `digest` is a hash of everything that determines its caches: equal digests, equal results.
    """

    name: str
    compressor: Compressor | None
    digest: str

    @property
    def ratios(self) -> bool:
        """Whether it has a keep_ratio; the ceiling (`full`) and the floor (`none`) have none."""
        return self.name not in ("full", "none")


class RandomSelector:
    """Keeps random tokens, different in every layer and head, but the same for the same document and seed."""

    extra_tokens = 0
    budget: Budget = "head"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self.name = f"random:{seed}"

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Random scores, drawn on the CPU so that a GPU keeps the same tokens."""
        backbone.prefill(ids, cache)
        text = f"{self._seed}:{ids.tolist()}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(backbone.num_layers, backbone.num_kv_heads, ids.shape[1], generator=draw)


def make_methods(
    names: Sequence[str] | None,
    backbone: Backbone,
    *,
    adapter: Adapter | None = None,
    refine: RefineSettings | None = None,
    refine_from: RefineFrom = "auto",
    seed: int = 0,
) -> list[Method]:
    """The methods with these names, in the order of `METHODS`; `seed` is that of `random`.

    Without names, these are all that can be run except for the parts of `matched`. Without an adapter, methods that
    need one are left out; so are those that an adapter's form rules out: `combined` where it routes the tokens it keeps
    or has restore tokens, `adapter_selection` and `refined` where it has restore tokens. `refine` and `refine_from`
    are settings and starting point of `refined`; `auto` means the adapter if there is one, else `matched`.

    Raises:
        ConfigError: A name is unknown, or a method needs an adapter and `adapter` is None.
    """
    wanted = check_methods(names, has_adapter=adapter is not None, refine_from=refine_from)
    if names is None and adapter is not None and adapter.config.restore_tokens:
        wanted = [name for name in wanted if name not in ("adapter_selection", "combined", "refined")]
    elif names is None and adapter is not None and adapter.config.routed == "kept":
        wanted.remove("combined")  # see `combined_selector`
    start = ("matched" if adapter is None else "adapter") if refine_from == "auto" else refine_from
    refine = refine or RefineSettings()
    methods = []
    for name in wanted:
        if name == "none":
            methods.append(Method(name, None, backbone.fingerprint(method="none").digest))
            continue
        refined = name == "refined"
        compressor = _compressor(start if refined else name, backbone, adapter, seed, refine if refined else None)
        # The fingerprint is about decoding and may omit some settings of refinement, so they are added here.
        settings = f"|{refine!r}" if refined else ""
        digest = hashlib.sha256(f"{name}|{compressor.fingerprint().digest}{settings}".encode()).hexdigest()
        methods.append(Method(name, compressor, digest))
    return methods


def check_methods(names: Sequence[str] | None, *, has_adapter: bool, refine_from: str) -> list[MethodName]:
    """The names in the order of `METHODS`. Arguments and errors as in `make_methods`, but no model is needed."""
    check_choice(refine_from, RefineFrom, where="refine_from")
    if names is None:
        return [name for name in METHODS if name not in PARTS and (has_adapter or name not in _NEED_ADAPTER)]
    for name in names:
        check_choice(name, MethodName, where="method")
    if not names:
        raise ConfigError("no method is given", where="method", next_step=f"Use one or more of {', '.join(METHODS)}.")
    needing = sorted({*names} & _NEED_ADAPTER)
    needing += ["refined"] if "refined" in names and refine_from in _NEED_ADAPTER else []
    if needing and not has_adapter:
        raise ConfigError(
            f"method {needing[0]!r} needs an adapter", where="adapter", next_step="Pass one, e.g. --adapter FOLDER."
        )
    return [name for name in METHODS if name in names]


def _compressor(
    name: str, backbone: Backbone, adapter: Adapter | None, seed: int, refine: RefineSettings | None
) -> Compressor:
    if name == "combined":
        return Compressor(backbone, adapter=adapter, selector="combined", refine=refine)
    if name in _NEED_ADAPTER:
        return Compressor(backbone, adapter=adapter, routed=name == "adapter", refine=refine)
    selector: Any = "sink_recent" if name == "full" else name  # at keep_ratio 1 the selector is unused
    if name == "random":
        selector = RandomSelector(seed=seed)
    elif name in PARTS:
        selector = Matched(replace(PARTS[name], part_tokens=min(1024, backbone.context_window // 4)))
    return Compressor(backbone, selector=selector, refine=refine)
