from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_memory.config import LANGUAGES
from kv_memory.retrieval.language import language_of, stem, without_stop_words
from kv_memory.retrieval.tokenize import names_of

TEXTS = {
    "en": "The ferry to Skarholm leaves at seven from pier four, every morning except on Sundays.",
    "de": "Die Fähre nach Skarholm fährt jeden Morgen außer sonntags um sieben Uhr vom vierten Pier ab.",
    "fr": "Le bac pour Skarholm part chaque matin à sept heures du quai numéro quatre, sauf le dimanche.",
    "ru": "Паром в Скархольм отправляется каждое утро в семь часов от четвёртого причала, кроме воскресенья.",
    "": "for i in range(10): x[i] += 0x7f; print(x)",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_language_of_a_text_is_detected(language):
    assert language_of(TEXTS[language]) == language


@pytest.mark.parametrize("text", ["", " \n", "1 2 3", "\ud800", "黑猫坐在垫子上。"])
def test_a_text_without_stems_has_no_language(text):
    assert language_of(text) == ""


def test_a_language_that_is_set_is_not_detected():
    assert language_of(TEXTS["de"], "en") == "en"
    assert language_of(TEXTS["de"], "none") == ""


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "compress compressed compresses compressing"),
        ("de", "fahrt fahrten"),
        ("fr", "continu continua continuait"),
        ("ru", "книга книги книгу"),
    ],
)
def test_forms_of_a_word_have_one_stem(language, words):
    assert len({stem(word, language) for word in words.split()}) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_a_stemmer(language):
    assert stem("ferry", language)


def test_stems_stay_as_they_are_stored():
    assert [stem(word, "en") for word in ("ferries", "generously", "streams")] == ["ferri", "generous", "stream"]
    assert stem("streams", "") == stem("streams", "xx") == "streams"


def test_threads_get_the_same_stems():
    words = [f"{part}{n}ings" for n in range(200) for part in ("sail", "compress", "general")]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda word: stem(word, "en"), words * 4))
    assert found == [word.removesuffix("s") if stem(word, "en") != word[:-4] else word[:-4] for word in words] * 4


@pytest.mark.parametrize(
    ("question", "languages", "left"),
    [
        ("When does the ferry leave?", ["en"], "ferry leave"),
        ("What's the WHO, and who is The Who?", ["en"], "WHO The Who"),
        ("Is IT in nats-server or off/on?", ["en"], "IT nats-server off/on"),
        ("how do fish die", ["de", "en"], "fish die"),
        ("wo liegt die Fähre", ["de", "en"], "liegt Fähre"),
        ("What should I do?", ["en"], "What should I do"),
        ("the ferry", [""], "the ferry"),
        ("the ferry", [], "the ferry"),
    ],
)
def test_stop_words_leave_a_question(question, languages, left):
    assert " ".join(without_stop_words(names_of(question), languages)) == left
