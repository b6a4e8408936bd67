"""Settings: frozen dataclasses that refuse wrong values when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kv_memory.errors import ConfigError

__all__ = [
    "Budget",
    "DecodeSettings",
    "DtypeName",
    "Layout",
    "SelectorName",
    "StorageName",
    "check_choice",
    "check_keep_ratio",
    "n_kept_for",
    "stored_dtype",
]

Layout = Literal["source", "packed"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
# The form of keys and values in a file; `auto` is the type the model computes in.
StorageName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
# How the entries of a document are shared out among the heads. `head`: as many in every layer and KV head. `model`: one
# ranking over all of them, so that a head keeps many or none (as KVzip does); the total is the same.
Budget = Literal["head", "model"]
# `combined`: an adapter's scorer and the scores of `matched` together. The others are without an adapter.
SelectorName = Literal["matched", "reconstruction", "attention", "sink_recent", "combined"]


def check_keep_ratio(keep_ratio: float, *, where: str = "keep_ratio") -> float:
    """Return `keep_ratio` if it lies in (0, 1].

    Raises:
        ConfigError: It does not, or is no number.
    """
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
        raise ConfigError(
            f"keep_ratio must lie in (0, 1], got {keep_ratio!r}",
            where=where,
            next_step="Pass the share of tokens to keep, e.g. 0.125 for a cache 8 times smaller.",
        )
    return float(keep_ratio)


def n_kept_for(n_tokens: int, keep_ratio: float) -> int:
    """How many of `n_tokens` are kept: rounded half up, at least one."""
    return min(n_tokens, max(1, math.floor(n_tokens * keep_ratio + 0.5)))


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: The longest answer, in tokens.
        temperature: 0 decodes greedily; above 0 samples.
        top_k: Sample from the k likeliest tokens only; 0 means all.
        top_p: Sample from the smallest set of tokens with this much probability.
        stop: Strings that end the answer; they are not part of it.
        seed: Makes sampling repeatable. Each question of a batch draws from a generator of its own, so an answer
            does not depend on what it was batched with.
        timeout_s: Decoding that takes longer than this, prefill included, is broken off with `DecodeTimeoutError`.
            Looked at after every token.
        json_schema: A JSON schema; only tokens that lead to JSON of this form are picked. Needs the extra `structured`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout_s: float | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "timeout_s": (self.timeout_s is None or self.timeout_s > 0, "above 0 or None"),
            "json_schema": (self.json_schema is None or isinstance(self.json_schema, str), "JSON, as a str"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of non-empty strings"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}", where=name)


def check_choice(value: str, choices: object, *, where: str) -> str:
    """Return `value` if it is one of a Literal's choices.

    Raises:
        ConfigError: It is not; the choices are named.
    """
    names = get_args(choices)
    if value not in names:
        raise ConfigError(f"unknown {where} {value!r}", where=where, next_step=f"Use one of {', '.join(names)}.")
    return value


def stored_dtype(storage: str, dtype: str) -> str:
    """The type that keys and values computed in `dtype` have in a file.

    Raises:
        ConfigError: `storage` is no `StorageName`.
    """
    return dtype if check_choice(storage, StorageName, where="storage") == "auto" else storage
