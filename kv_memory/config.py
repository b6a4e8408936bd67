"""Decoding settings, and the names and checks that several modules share. Invalid values raise on construction."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args, get_origin, get_type_hints

from kv_memory.errors import ConfigError

Layout = Literal["source", "packed"]
PassageOrder = Literal["best_last", "best_first"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
WeightsName = Literal["plain", "int8"]
# The type of keys and values in a file; `auto` is the type the model computes in.
StorageName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
# How a document's entries are divided among the heads. `head`: the same number in every layer and KV head. `model`: one
# ranking over all heads, so that a head may keep many entries or none (as in KVzip); the total is the same.
Budget = Literal["head", "model"]
# How passages are found: by words, by vectors of an encoder, or by both together.
RetrieverName = Literal["bm25", "hybrid", "embedding"]
# ISO 639 codes of the languages with stems, and the names of their Snowball stemmers.
# fmt: off
LANGUAGES = {
    "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english",
    "eo": "esperanto", "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish",
    "fr": "french", "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian",
    "it": "italian", "lt": "lithuanian", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pl": "polish",
    "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian", "st": "sesotho", "sv": "swedish",
    "ta": "tamil", "tr": "turkish", "yi": "yiddish"
}
# fmt: on
# `combined`: an adapter's scorer and the scores of `matched` together. The others work without an adapter.
SelectorName = Literal["matched", "reconstruction", "attention", "sink_recent", "combined"]


def check_keep_ratio(keep_ratio: float, *, where: str = "keep_ratio") -> float:
    """Return `keep_ratio` if it lies in (0, 1].

    Raises:
        ConfigError: `keep_ratio` is not a number in (0, 1].
    """
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
        raise ConfigError(
            f"keep_ratio must lie in (0, 1], got {keep_ratio!r}",
            where=where,
            next_step="Pass the share of tokens to keep, e.g. 0.125 for a cache 8 times smaller.",
        )
    return float(keep_ratio)


def ratio_of(text: str) -> float:
    """The value of a share written as `0.25` or `1/4`.

    Raises:
        ConfigError: `text` is neither, or the value is not in (0, 1].
    """
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(
            f"keep_ratio must be a number or a fraction in (0, 1], got {text!r}",
            where="keep_ratio",
            next_step="Pass for example 0.125 or 1/8.",
        ) from None
    return check_keep_ratio(value)


def check_rank_bias(bias: float) -> float:
    """Return `bias` if it is a finite number, 0 or less.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -math.inf < bias <= 0:
        raise ConfigError(
            f"rank_bias must be a number, 0 or less, got {bias!r}",
            where="rank_bias",
            next_step="Pass for example -1, or 0 to treat all passages alike.",
        )
    return bias


_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def size_of(text: str, *, where: str) -> int:
    """The number of bytes of a size, e.g. `500MB` (10^6) or `2GiB` (2^30).

    Raises:
        ConfigError: `text` is not a size above 0.
    """
    return int(_of(text, _SIZES, where, "500MB, 20GB or 2GiB"))


def seconds_of(text: str, *, where: str) -> float:
    """The number of seconds of a duration, e.g. `90s`, `12h`, `30d`.

    Raises:
        ConfigError: `text` is not a duration above 0.
    """
    return _of(text, _TIMES, where, "90s, 12h or 30d")


def _of(text: str, units: dict[str, int], where: str, examples: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ConfigError(f"invalid value {text!r}", where=where, next_step=f"Write it like {examples}.")
    return float(found[1]) * units[found[2].lower()]


def n_kept_for(n_tokens: int, keep_ratio: float) -> int:
    """Number of `n_tokens` that are kept: rounded half up, at least one."""
    return min(n_tokens, max(1, math.floor(n_tokens * keep_ratio + 0.5)))


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Settings for decoding an answer.

    Attributes:
        max_new_tokens: Length limit of the answer, in tokens.
        temperature: Sampling temperature; 0 decodes greedily.
        top_k: Number of likeliest tokens to sample from; 0 means all.
        top_p: Cumulative probability of the smallest set of tokens to sample from.
        stop: Strings that end the answer. They are removed from it, and are ignored before its first visible
            character.
        seed: Random seed that makes sampling repeatable. Each question of a batch has its own generator, so an answer
            does not depend on the rest of its batch.
        timeout_s: Time limit in seconds, including prefill, after which decoding stops with `DecodeTimeoutError`. It
            is checked after every token.
        json_schema: JSON schema; only tokens that lead to JSON of this schema are picked. Needs the extra
            `structured`.
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
        check_fields(
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "at least 1"),
            temperature=(self.temperature >= 0 and math.isfinite(self.temperature), "0 or more"),
            top_k=(self.top_k >= 0, "0 or more"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            timeout_s=(self.timeout_s is None or self.timeout_s > 0, "above 0 or None"),
            json_schema=(self.json_schema is None or isinstance(self.json_schema, str), "JSON, as a str"),
            stop=(not isinstance(self.stop, str) and all(self.stop), "a tuple of non-empty strings"),
        )


def check_fields(settings: object, **checks: tuple[object, str]) -> None:
    """Raise a `ConfigError` for the first field whose check is false; the text says what it must be."""
    for name, (ok, wanted) in checks.items():
        if not ok:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(settings, name)!r}", where=name)


def check_at_least(settings: object, least: int, *names: str) -> None:
    """Raise a `ConfigError` for the first of these fields that is below `least`; None is not."""
    for name in names:
        value = getattr(settings, name)
        check_fields(settings, **{name: (value is None or value >= least, f"at least {least}")})


def check_choices(settings: object) -> None:
    """Check the fields of a dataclass that are Literals; errors as in `check_choice`."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            check_choice(getattr(settings, name), hint, where=name)


def check_choice(value: str, choices: object, *, where: str) -> str:
    """Return `value` if it is one of a Literal's choices.

    Raises:
        ConfigError: `value` is not one of the choices; the error names them.
    """
    names = get_args(choices)
    if value not in names:
        raise ConfigError(f"unknown {where} {value!r}", where=where, next_step=f"Use one of {', '.join(names)}.")
    return value


def check_names(
    given: Iterable[str], known: Collection[str], *, what: str = "option", where: str = "", every: str = ""
) -> None:
    """Refuse names that are not known.

    Raises:
        ConfigError: A name is unknown; the error names the nearest one. Without any, its next step is the sentence
            `every`, or all names. It is in `where`, or the name itself.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            step = f"Did you mean {near[0]!r}?" if near else every or f"Use one of {', '.join(sorted(known))}."
            raise ConfigError(f"unknown {what} {name!r}", where=where or name, next_step=step)


def stored_dtype(storage: str, dtype: str) -> str:
    """The dtype in a file of keys and values that were computed in `dtype`.

    Raises:
        ConfigError: `storage` is not a `StorageName`.
    """
    return dtype if check_choice(storage, StorageName, where="storage") == "auto" else storage


_UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates


def check_name(name: object, *, where: str, most: int | None = None) -> None:
    """Raise unless every database and log can take this name of a document, a collection or a conversation.

    Raises:
        ConfigError: It is not a str, it is blank or too long, or it contains control characters or half a surrogate
            pair.
    """
    fits = isinstance(name, str) and name.strip() and not _UNFIT_FOR_NAMES.search(name)
    if not fits or (most is not None and len(str(name)) > most):
        kind = "non-empty str" if most is None else f"str of 1 to {most} characters"
        raise ConfigError(f"not a name: {where} must be a {kind} without control characters, got {name!r}", where=where)
