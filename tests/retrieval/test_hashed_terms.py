from __future__ import annotations

import json

import pytest

from kv_memory.retrieval.hashed_terms import hash_word, terms_of, terms_of_question


def hashes(*words: str) -> list[str]:
    return [hash_word(word) for word in words]


def test_words_are_counted_under_their_hashes():
    assert terms_of("Ferry, pier, ferry") == {hash_word("ferry"): 2, hash_word("pier"): 1}
    assert hash_word("ferry") == "107d8d835fa7536e"  # stored, so it may not change


def test_terms_reveal_neither_words_nor_their_order():
    words = ["the", "ferry", "leaves", "at", "seven", "from", "pier", "four", "every", "morning"]
    written = json.dumps(terms_of(" ".join(words)))
    assert not any(word in written for word in words)
    assert written == json.dumps(terms_of(" ".join(words[::-1])))


def test_any_word_has_a_hash():
    assert len({hash_word(word) for word in ("", "\ud800", "猫", "x" * 10_000)}) == 4


def test_stems_are_counted_beside_the_words():
    assert terms_of("Ferries, ferry, pier", "en") == {
        hash_word("ferries"): 1,
        hash_word("ferry"): 1,
        hash_word("ferri"): 2,
        hash_word("pier"): 1,
    }


def test_a_word_counts_in_a_question_as_often_as_its_stem():
    assert terms_of_question("ferries pier", ["en"]) == hashes("ferries", "ferri", "pier", "pier")


def test_a_question_asks_for_stems_in_every_language_of_the_collection():
    asked = terms_of_question("Häusern", ["en", "de", ""])
    assert asked == hashes("häusern", "haus", "häusern")  # the English stem and no stem are the word itself


@pytest.mark.parametrize("name", ["nats-server", "JetStream", "keep_ratio", "HTTP/2", "C", "don't", "streams"])
@pytest.mark.parametrize("language", ["", "en", "de", "tr"])
def test_a_name_is_found_as_it_is_written_in_any_language(name, language):
    asked = terms_of_question(name, ["en", ""])
    assert asked
    assert set(terms_of(name)) <= terms_of(name, language).keys()
    assert set(asked) & terms_of(name, language).keys()


def test_stop_words_alone_are_looked_for():
    assert terms_of_question("to be or not to be", ["en"])
    assert terms_of_question("the ferry", ["en"]) == terms_of_question("ferry", ["en"])
