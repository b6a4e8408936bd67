"""Words of passages and questions for BM25, and the hashes by which they are compared.

The default pattern of bm25s was rejected: it drops single characters, so that `C`, `HTTP/2` and most Chinese words
cannot be found, and it treats `nats-server` as two unrelated words. Here:

- text is normalised to NFKC and case-folded;
- names of several parts (`nats-server`, `JetStream`, `HTTP/2`, `keep_ratio`) yield the parts and the whole, so that
  `jetstream`, `Jet-Stream` and `jet stream` all find `JetStream`;
- scripts without spaces yield single characters and pairs; the pairs are as in Lucene's CJK analyzer.

A passage whose text is not kept is found by its *terms*: hashes of its words with their counts. They keep plain words
out of files, backups and logs, but are not encryption: every store hashes in the same public way, so anyone with the
database can look up the hashes of a dictionary. A random key for each store was rejected: it would stand in the same
database, and passages of merged stores could not be compared.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

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
# A longer chain is a path or a sentence without spaces; joined, it would match nothing.
_MAX_JOINED_PARTS = 4


def words_of(text: str) -> list[str]:
    """The words of a text in any script, in order, repeated as often as they occur."""
    words: list[str] = []
    for name in _NAME.findall(unicodedata.normalize("NFKC", text)):
        # A stretch of Chinese or a long path hardly recurs; caching it would fill the memory with its parts.
        once = len(name) > 32 or _UNSPACED.search(name)
        words += (_words_of_name.__wrapped__ if once else _words_of_name)(name)
    return words


def terms_of(text: str) -> dict[str, int]:
    """The hashes of a text's words with their counts, in the order of the hashes, which reveals nothing of the text."""
    return dict(sorted((hash_word(word), n) for word, n in Counter(words_of(text)).items()))


# A few words make up most of any text; splitting and hashing them takes most of the time of indexing.
@lru_cache(maxsize=1 << 16)
def hash_word(word: str) -> str:
    """The hash of a word: 8 bytes of BLAKE2b, in hex."""
    return hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).hexdigest()


@lru_cache(maxsize=1 << 16)
def _words_of_name(name: str) -> tuple[str, ...]:
    """The parts of a name, and the whole."""
    words: list[str] = []
    parts = _PART.findall(name)
    for part in parts:
        pieces = _CAMEL.split(part)
        for piece in pieces:
            words += _split_unspaced(piece.casefold())
        if len(pieces) > 1:
            words.append(part.casefold())
    if 1 < len(parts) <= _MAX_JOINED_PARTS:
        words.append("".join(parts).casefold())
    return tuple(words)


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
