from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_memory.retrieval.tokenize import question_words, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Plain words, twice: words.", ["plain", "words", "twice", "words"]),
        ("nats-server", ["nats", "server", "natsserver"]),
        ("JetStream", ["jet", "stream", "jetstream"]),
        ("HTTP/2", ["http", "2", "http2"]),
        ("HTTPServer", ["http", "server", "httpserver"]),
        ("keep_ratio=0.5", ["keep", "ratio", "keepratio", "0", "5", "05"]),
        ("C and R", ["c", "and", "r"]),
        ("a/b/c/d/e", ["a", "b", "c", "d", "e"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("\uff21\uff22\uff23 e\u0301", ["abc", "\u00e9"]),
        ("don\u2019t", ["don", "t", "dont"]),
        ("日本語", ["日", "本", "語", "日本", "本語"]),
        ("Python言語", ["python", "言", "語", "言語"]),
        ("हिन्दी।", ["हिन्दी"]),
        ("?! -- \n", []),
        ("", []),
    ],
)
def test_text_is_split_into_words(text, words):
    assert words_of(text) == words


def test_english_words_are_stemmed():
    assert words_of("compressing compressed compression", language="en") == ["compress"] * 3
    assert words_of("compressing") == ["compressing"]


def test_stop_words_are_dropped_from_questions_with_other_words():
    assert question_words("What is the compression of it?", language="en") == ["compress"]
    assert question_words("To be or not to be", language="en") == ["to", "be", "or", "not", "to", "be"]
    assert question_words("Why don\u2019t you?", language="en") == words_of("Why don\u2019t you?", language="en")
    assert question_words("Why don\u2019t you run?", language="en") == ["run"]
    assert question_words("What is it") == ["what", "is", "it"]


@given(text=st.text(), language=st.sampled_from([None, "en"]))
def test_no_text_gives_an_empty_word(text, language):
    assert all(word.strip() for word in words_of(text, language=language))
    assert set(question_words(text, language=language)) <= set(words_of(text, language=language))
