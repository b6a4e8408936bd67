from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_memory.retrieval.tokenize import words_of


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
        ("שָׁלוֹם", ["שָׁלוֹם"]),
        ('צה"ל', ["צה", "ל", "צהל"]),
        ("ไทย", ["ไ", "ท", "ย", "ไท", "ทย"]),
        ("មែរ", ["មែ", "រ", "មែរ"]),
        ("bo\u0f0bskad", ["bo", "skad"]),
        ("Gesamt\u00adkonzept", ["gesamtkonzept"]),
        ("zero\u200bwidth کتاب\u200cها", ["zerowidth", "کتابها"]),  # noqa: RUF001
        ("har-\n  nbour", ["har", "nbour", "harnbour"]),
        ("har\u00ad\n  nbour", ["harnbour"]),
        ("1,000 kg, 2", ["1", "000", "1000", "kg", "2"]),
        ("1\ufe0f\u20e3", ["1"]),
        ("ﬁnd ΕΛΛΆΣ ελλάς", ["find", "ελλάσ", "ελλάσ"]),
        ("?! -- \n", []),
        ("", []),
    ],
)
def test_text_is_split_into_words(text, words):
    assert words_of(text) == words


@given(text=st.text())
def test_no_text_gives_an_empty_word(text):
    assert all(word.strip() for word in words_of(text))


@pytest.mark.parametrize("hard", ["a-", "a- \t", "a,1", "漢", "a\u00ad \t", "a", "\u0301", "a-\n"])
def test_the_time_grows_with_the_length_only(hard):
    started = time.perf_counter()
    words_of(hard * (300_000 // len(hard)))
    assert time.perf_counter() - started < 5
