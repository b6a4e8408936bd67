from __future__ import annotations

from dataclasses import replace

import pytest

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError, FingerprintMismatchError
from tests.cache.samples import FINGERPRINT


def test_a_fingerprint_survives_a_round_trip_through_json() -> None:
    assert Fingerprint.from_json(FINGERPRINT.to_json()) == FINGERPRINT
    assert len(FINGERPRINT.digest) == 64
    assert replace(FINGERPRINT, eta=3).digest != FINGERPRINT.digest


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "null", "3"])
def test_an_unreadable_fingerprint_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptCacheError):
        Fingerprint.from_json(text)


def test_differences_name_both_sides() -> None:
    other = replace(FINGERPRINT, weights="f" * 64, eta=6)
    FINGERPRINT.check(FINGERPRINT)
    with pytest.raises(FingerprintMismatchError) as caught:
        FINGERPRINT.check(other, where="document x")
    said = "weights is aaaaaaaaaaaa in the cache, ffffffffffff loaded; eta is none in the cache, 6 loaded"
    assert caught.value.what == f"cache does not match the loaded model and settings: {said}"
    assert caught.value.where == "document x"
    assert caught.value.next_step is not None and "kv-memory add --stale" in caught.value.next_step
