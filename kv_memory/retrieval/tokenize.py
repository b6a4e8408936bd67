"""Words of passages and questions for BM25.

The default pattern of bm25s was rejected: it drops single characters, so that `C`, `HTTP/2` and most Chinese words
cannot be found, and it treats `nats-server` as two unrelated words. Here:

- text is compared as Unicode's NFKC_Casefold: compatible forms, upper and lower case, and invisible characters such as
  the soft hyphen make no difference;
- words consist of letters, marks and numbers by their Unicode properties, and of the signs between them that Unicode's
  word boundaries (UAX 29) allow inside a word. `regex` knows these properties, and `re` does not;
- names of several parts (`nats-server`, `JetStream`, `HTTP/2`, `keep_ratio`) yield the parts and the whole, so that
  `jetstream`, `Jet-Stream` and `jet stream` all find `JetStream`. So does a word that is broken at the end of a line;
- scripts without spaces yield single characters and pairs; the pairs are as in Lucene's CJK analyzer.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import pairwise

import regex

_INVISIBLE = regex.compile(r"\u00ad[ \t]*\n[ \t]*|\p{Default_Ignorable_Code_Point}+")  # or a soft hyphen's line end
_PART = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}]*+")
# Signs that join the parts of a name: nats-server, keep_ratio, HTTP/2, node.js, user@host, don't, 1,000, abbreviations
# in Hebrew. A hyphen may be followed by a line end.
_JOINED = (
    r"(?:[_/@'+&\p{WB=MidLetter}\p{WB=MidNumLet}]|[-\u2010\u2011](?:[ \t]*+\n[ \t]*+)?"
    r"|(?<=\p{Nd}),(?=\p{Nd})|(?<=\p{Hebrew})\"(?=\p{Hebrew}))"
)
_NAME = regex.compile(rf"{_PART.pattern}(?:{_JOINED}{_PART.pattern})*+")
_CAMEL = regex.compile(r"(?<=[\p{Ll}\p{Nd}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})")
# Scripts that put no space between words: Han, kana and Bopomofo; Hangul, where particles are attached without one; and
# the line breaking classes of South East Asia (SA: Thai, Lao, Burmese, Khmer; the others: Javanese, Balinese and more).
_UNSPACED = regex.compile(
    r"[\p{Han}\p{scx=Hira}\p{scx=Kana}\p{Bopomofo}\p{Hangul}\p{LB=SA}\p{LB=AK}\p{LB=AP}\p{LB=AS}\p{LB=VF}\p{LB=VI}]"
    r"[\p{Mn}\p{Mc}]*+"
)
_UNSPACED_RUN = regex.compile(rf"(?:{_UNSPACED.pattern})+|(?:(?!{_UNSPACED.pattern}).)+", regex.DOTALL)
# A longer chain is a path or a sentence without spaces; joined, it would match nothing.
_MAX_JOINED_PARTS = 4


def names_of(text: str) -> list[str]:
    """The names of a text in order: words as they are written, with what is joined to them (`nats-server`)."""
    found: list[str] = _NAME.findall(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)))
    return found


def words_of(text: str) -> list[str]:
    """The words of a text in any script, in order, repeated as often as they occur."""
    return [word for name in names_of(text) for word in words_of_name(name)]


def words_of_name(name: str) -> tuple[str, ...]:
    """The parts of a name, and the whole, in lower case."""
    # A stretch of Chinese or a long path hardly recurs; caching it would fill the memory with its parts.
    once = len(name) > 32 or _UNSPACED.search(name)
    return (_split.__wrapped__ if once else _split)(name)


# A few words make up most of any text, and splitting them takes most of the time of indexing.
@lru_cache(maxsize=1 << 16)
def _split(name: str) -> tuple[str, ...]:
    words: list[str] = []
    parts = _PART.findall(name)
    for part in parts:
        pieces = _CAMEL.split(part)
        for run in (run for piece in pieces for run in _UNSPACED_RUN.findall(piece)):
            characters = _UNSPACED.findall(run)  # each with its marks
            words += characters or [run]
            words += [first + second for first, second in pairwise(characters)]
        if len(pieces) > 1:
            words.append(part)
    if 1 < len(parts) <= _MAX_JOINED_PARTS:
        words.append("".join(parts))
    return tuple(unicodedata.normalize("NFKC", word.casefold()) for word in words)
