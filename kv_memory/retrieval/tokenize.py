"""Tokenization for BM25: split passages and questions into the words that are compared.

The default pattern of bm25s was rejected: it drops single characters, so that `C`, `HTTP/2` and most Chinese words
cannot be found, and it treats `nats-server` as two unrelated words. Here:

- text is normalised to NFKC and case-folded;
- names of several parts (`nats-server`, `JetStream`, `HTTP/2`, `keep_ratio`) yield the parts and the whole, so that
  `jetstream`, `Jet-Stream` and `jet stream` all find `JetStream`;
- scripts without spaces yield single characters and pairs; the pairs are as in Lucene's CJK analyzer;
- `language="en"` reduces words to Snowball stems, and drops words such as `the` from questions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import Stemmer
from bm25s.stopwords import STOPWORDS_EN_PLUS

__all__ = ["Language", "question_words", "words_of"]

Language = Literal["en"]

# `re` does not count vowel signs as \w, which would split Hindi and Thai words; so these blocks are listed. The danda
# (U+0964 and U+0965) is left out: it is a full stop.
_MARKS = (
    "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0fff\u1000-\u109f\u1780-\u17d3"
)
_CHARACTER = rf"(?:[^\W_]|[{_MARKS}])"
# A name of several parts: words joined by one sign, as in nats-server, keep_ratio, HTTP/2, node.js, user@host, don't.
_NAME = re.compile(rf"{_CHARACTER}+(?:[-_./:@'\u2019+&]{_CHARACTER}+)*")
_PART = re.compile(rf"{_CHARACTER}+")
_CAMEL = re.compile(r"(?<=[a-zß-öø-ÿ0-9])(?=[A-ZÀ-ÖØ-Þ])|(?<=[A-ZÀ-ÖØ-Þ])(?=[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ])")
# Han, kana, Thai, Lao, Burmese, Khmer, and Hangul, where particles are attached without a space.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17d3\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]+"
)
_STOP_WORDS = frozenset(STOPWORDS_EN_PLUS)
# A longer chain is a path or a sentence without spaces; joined, it would match nothing.
_MAX_JOINED_PARTS = 4


def words_of(text: str, *, language: Language | None = None) -> list[str]:
    """The words of a text, in order, repeated as often as they occur.

    Args:
        text: Any text, in any script.
        language: `en` to reduce English words to their stems; None to leave all words unchanged.
    """
    return _taken_apart(_names(text), language)


def question_words(question: str, *, language: Language | None = None) -> list[str]:
    """The words of a question; `language="en"` drops stop words, unless the question has only those.

    Passages keep their stop words, so that a question such as `To be or not to be?` still finds something.
    """
    names = _names(question)
    if language == "en":
        names = [name for name in names if name.casefold().replace("\u2019", "'") not in _STOP_WORDS] or names
    return _taken_apart(names, language)


def _taken_apart(names: list[str], language: Language | None) -> list[str]:
    words: list[str] = []
    for name in names:
        # A stretch of Chinese or a long path hardly recurs; caching it would fill the memory with its parts.
        once = len(name) > 32 or _UNSPACED.search(name)
        words.extend(_words_of_name.__wrapped__(name, language) if once else _words_of_name(name, language))
    return words


# A few words make up most of any text, and splitting them takes most of the time of indexing.
@lru_cache(maxsize=1 << 16)
def _words_of_name(name: str, language: Language | None) -> tuple[str, ...]:
    words = tuple(_parts_and_wholes(name))
    # Creating a stemmer takes 2 microseconds. A global one was rejected: stemmers are not thread-safe.
    return tuple(Stemmer.Stemmer("english").stemWords(words)) if language == "en" else words


def _names(text: str) -> list[str]:
    return _NAME.findall(unicodedata.normalize("NFKC", text))


def _parts_and_wholes(name: str) -> Iterator[str]:
    parts = _PART.findall(name)
    for part in parts:
        pieces = _CAMEL.split(part)
        for piece in pieces:
            yield from _split_unspaced(piece.casefold())
        if len(pieces) > 1:
            yield part.casefold()
    if 1 < len(parts) <= _MAX_JOINED_PARTS:
        yield "".join(parts).casefold()


def _split_unspaced(word: str) -> Iterator[str]:
    position = 0
    for run in _UNSPACED.finditer(word):
        if position < run.start():
            yield word[position : run.start()]
        characters = run[0]
        yield from characters
        yield from (characters[i : i + 2] for i in range(len(characters) - 1))
        position = run.end()
    if position < len(word):
        yield word[position:]
