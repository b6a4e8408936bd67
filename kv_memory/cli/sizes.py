"""Sizes, times and shares as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from kv_memory.config import check_keep_ratio
from kv_memory.errors import ConfigError

__all__ = ["ratio_of", "seconds_of", "size_of"]

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def size_of(text: str, *, where: str) -> int:
    """Bytes of a size, e.g. `500MB` (10^6) or `2GiB` (2^30).

    Raises:
        ConfigError: It is none.
    """
    return int(_of(text, _SIZES, where, "500MB, 20GB or 2GiB"))


def seconds_of(text: str, *, where: str) -> float:
    """Seconds of a time, e.g. `90s`, `12h`, `30d`.

    Raises:
        ConfigError: It is none.
    """
    return _of(text, _TIMES, where, "90s, 12h or 30d")


def ratio_of(text: str) -> float:
    """A share written as `0.25` or `1/4`.

    Raises:
        ConfigError: It is neither, or not in (0, 1].
    """
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(
            f"--keep-ratio must be a number or a fraction, got {text!r}",
            where="keep_ratio",
            next_step="Pass for example --keep-ratio 0.25 or --keep-ratio 1/4.",
        ) from None
    return check_keep_ratio(value)


def _of(text: str, units: dict[str, int], where: str, examples: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ConfigError(f"{text!r} is not understood", where=where, next_step=f"Write it like {examples}.")
    return float(found[1]) * units[found[2].lower()]
