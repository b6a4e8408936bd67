"""Every field of the fingerprint changed, one at a time: a cache that differs in it is refused, in so many words."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CacheError, FingerprintMismatchError
from kv_memory.store import Store
from tests.stress.samples import FINGERPRINT, RATIO, cache_of, sha

__all__ = ["FIELDS", "changed", "mismatch"]

FIELDS = [field.name for field in fields(Fingerprint)]


def changed(name: str, how: str) -> Fingerprint:
    """The fingerprint with one field changed: to something `else`, or in its `last` character or by one."""
    value: Any = getattr(FINGERPRINT, name)
    if isinstance(value, int):
        return replace(FINGERPRINT, **{name: value + (1 if how == "last" else 7)})
    if how == "last" and value:
        other = value[:-1] + ("0" if value[-1] != "0" else "1")
    else:
        other = 3 if name == "eta" else "9" * 64 if len(value or "") == 64 else "another"
    return replace(FINGERPRINT, **{name: other})


def mismatch(store: Store, name: str, how: str) -> list[str]:
    """Ask with the changed fingerprint for a cache that has the other; returns what is not as it must be."""
    text = f"{name} {how}"
    store.put(sha(text), cache_of(text))
    wanted = changed(name, how)
    problems = []
    if store.has(sha(text), wanted, RATIO):
        problems.append("has() returned True")
    try:
        store.get(sha(text), wanted, RATIO)
    except FingerprintMismatchError as error:
        mine, theirs = (_shown(getattr(each, name), how) for each in (FINGERPRINT, wanted))
        said = f"{name} is {mine} in the cache, {theirs} loaded"
        if said not in error.what:
            problems.append(f"the message {error.what!r} does not contain {said!r}")
        if mine == theirs:
            problems.append(f"both sides look the same: {said}")
        if ";" in error.what:
            problems.append("the message names other fields too")
        if not error.next_step or "kv-memory add --stale" not in error.next_step:
            problems.append(f"the next step is {error.next_step!r}")
        if not error.where:
            problems.append("the error has no place")
    except CacheError as error:
        problems.append(f"refused as {error!r}")
    else:
        problems.append("returned without an error")
    if store.get(sha(text), FINGERPRINT, RATIO).fingerprint != FINGERPRINT:
        problems.append("the cache itself has changed")
    return [f"{name} {how}: {problem}" for problem in problems]


def _shown(value: object, how: str) -> str:
    """One side as a person is shown it: hashes by their first letters, where these differ."""
    text = "none" if value in ("", None) else str(value)
    return text[:12] if len(text) == 64 and how == "else" else text
