"""Stems and stop words by language, and the detection of a text's language.

Detection is py3langid's: a naive Bayes model over bytes of 4.6 MB that knows 140 languages, takes 0.2 ms for a passage,
and gives the same result on every machine. Lingua, which is closer on single words, was rejected: it takes 100 MB, and
the language of a question is not needed (see `kv_memory.retrieval.hashed_terms`).

Stems are Snowball's, from the package in plain Python: 40 µs for a new word, and words recur. PyStemmer takes 3 µs, but
a machine with another release of it would make other stems for the same store.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Sequence
from typing import Any

from kv_memory.config import LANGUAGES

# The lists of bm25s, which are NLTK's. Those of the package stop-words were rejected: the English one has 1,300 words,
# "system" and "world" among them, and costs 1 point of recall on SQuAD where this one gains 1.
_STOP_WORDS = {
    "da": "DANISH",
    "de": "GERMAN",
    "en": "EN_PLUS",
    "es": "SPANISH",
    "fr": "FRENCH",
    "it": "ITALIAN",
    "nl": "DUTCH",
    "no": "NORWEGIAN",
    "pt": "PORTUGUESE",
    "ru": "RUSSIAN",
    "sv": "SWEDISH",
    "tr": "TURKISH",
}
_LEAST_CONFIDENCE = 0.2  # of code, numbers and names: 0.1 or less; of a sentence: above 0.5
_MOST_CHARACTERS = 4000  # of a text that are looked at
_SPACES = re.compile(r"\s+")
_lock = threading.Lock()  # a stemmer of snowballstemmer holds the word it works on


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str, setting: str = "auto") -> str:
    """The ISO 639 code of a text's language if there are stems for it, otherwise an empty string.

    Args:
        text: Text, or its beginning.
        setting: `auto` detects the language; `none` gives an empty string; a code is returned as it is.
    """
    if setting != "auto":
        return "" if setting == "none" else setting
    language, confidence = _identifier().classify(_SPACES.sub(" ", text[:_MOST_CHARACTERS]))
    return str(language) if language in LANGUAGES and confidence >= _LEAST_CONFIDENCE else ""


@functools.cache
def _stemmer(language: str) -> Any:
    name = LANGUAGES[language]
    module = importlib.import_module(f"snowballstemmer.{name}_stemmer")
    return getattr(module, f"{name.title()}Stemmer")()


# A few words make up most of any text.
@functools.lru_cache(maxsize=1 << 16)
def stem(word: str, language: str) -> str:
    """The stem of a word in lower case; the word itself in a language without stems."""
    if language not in LANGUAGES:
        return word
    with _lock:
        return str(_stemmer(language).stemWord(word)) or word


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    import bm25s.stopwords

    name = _STOP_WORDS.get(language)
    return frozenset(getattr(bm25s.stopwords, f"STOPWORDS_{name}")) if name else frozenset()


def without_stop_words(names: Sequence[str], languages: Sequence[str]) -> list[str]:
    """The names of a question without its stop words; all of them if nothing else is left.

    Only words in lower case, and the first one, count as stop words: `WHO`, `IT` and `The Who` are names. Of several
    languages, the one with most stop words in the question is taken: the German `die` is an English verb.

    Args:
        names: Names as in `kv_memory.retrieval.tokenize.names_of`.
        languages: Codes of languages that the question may be in; of two with as many stop words, the first is taken.
    """
    candidates = [
        {i for i, name in enumerate(names) if _is_stop_word(name, first=i == 0, words=words)}
        for words in map(_stop_words, languages)
    ]
    stopped = max(candidates, key=len, default=set())
    return [name for i, name in enumerate(names) if i not in stopped] or list(names)


def _is_stop_word(name: str, *, first: bool, words: frozenset[str]) -> bool:
    plain = name.replace("\u2019", "'")
    if not (plain.islower() or first or plain == "I"):
        return False
    plain = plain.casefold()
    return plain in words or ("'" in plain and all(part in words for part in plain.split("'")))
