from __future__ import annotations

import json
from typing import Any

import pytest

from kv_memory.retrieval.hashed_terms import Terms, hash_word, new_key

KEY = "0" * 32


def test_words_are_counted_under_their_hashes() -> None:
    terms = Terms.of(["ferry", "pier", "ferry"], KEY)
    assert dict(terms.counts) == {hash_word("ferry", KEY): 2, hash_word("pier", KEY): 1}
    assert sorted(terms) == sorted([hash_word("ferry", KEY)] * 2 + [hash_word("pier", KEY)])


def test_terms_reveal_neither_words_nor_their_order() -> None:
    words = ["the", "ferry", "leaves", "at", "seven", "from", "pier", "four", "every", "morning"]
    written = json.dumps(Terms.of(words, KEY).to_dict())
    assert not any(word in written for word in words)
    assert written == json.dumps(Terms.of(words[::-1], KEY).to_dict())


def test_another_key_gives_other_hashes() -> None:
    key = new_key()
    assert len(key) == 32 and key != new_key()
    assert hash_word("ferry", key) != hash_word("ferry", KEY) == hash_word("ferry", KEY)


def test_any_text_has_a_hash() -> None:
    assert len({hash_word(word, KEY) for word in ("", "\ud800", "猫", "x" * 10_000)}) == 4


def test_terms_round_trip_through_json() -> None:
    terms = Terms.of(["a", "b", "a"], new_key())
    assert Terms.from_dict(json.loads(json.dumps(terms.to_dict()))) == terms


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"walrus": 2},
        {"key": "short", "counts": {}},
        {"key": KEY, "counts": []},
        {"key": KEY, "counts": {"walrus": 2}},
        {"key": KEY, "counts": {"0" * 16: 0}},
        {"key": KEY, "counts": {"0" * 16: True}},
        {"key": KEY, "counts": {"0" * 16: "2"}},
        {"key": 7, "counts": {}},
    ],
)
def test_invalid_terms_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"terms|counts"):
        Terms.from_dict(values)
