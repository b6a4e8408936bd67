"""Terms: hashes of the words and stems of passages and questions, by which BM25 compares them.

A passage has a term for each word and another for its stem, unless that is the word itself. Stems alone were rejected:
with the words beside them every name stays findable as it is written, whatever language a passage was taken for and
whatever a stemmer makes of the name; and recall is 1 point higher.

A question has a term for each word and one for each stem of it in the languages of the collection. Its own language is
not detected, because a question is short and may be a name only. A word counts as often as its stem, also where both
are one: otherwise words that happen to be inflected would count twice.

A passage whose text is not kept is found by its terms, with their counts. They keep plain words out of files, backups
and logs, but are not encryption: every store hashes in the same public way, so anyone with the database can look up the
hashes of a dictionary. A random key for each store was rejected: it would stand in the same database, and passages of
merged stores could not be compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from kv_memory.retrieval.language import stem, without_stop_words
from kv_memory.retrieval.tokenize import names_of, words_of, words_of_name


def terms_of(text: str, language: str = "") -> dict[str, int]:
    """The hashes of a text's words and stems with their counts.

    They are in the order of the hashes, which reveals nothing of the text.

    Args:
        text: Any text.
        language: ISO 639 code of its language; empty if it has no stems.
    """
    counts: Counter[str] = Counter()
    for word, n in Counter(words_of(text)).items():
        for term in {word, stem(word, language)}:
            counts[hash_word(term)] += n
    return dict(sorted(counts.items()))


def terms_of_question(question: str, languages: Sequence[str]) -> list[str]:
    """The terms to look for, repeated as often as they count.

    Args:
        question: Any text.
        languages: ISO 639 codes of the passages' languages, the most frequent first; empty for one without stems.
    """
    terms: list[str] = []
    for name in without_stop_words(names_of(question), languages):
        for word in words_of_name(name):
            stems = {stem(word, language) for language in languages or ("",)}
            terms += map(hash_word, [word, *sorted(stems)])
    return terms


# A few words make up most of any text.
@lru_cache(maxsize=1 << 16)
def hash_word(word: str) -> str:
    """The hash of a word: 8 bytes of BLAKE2b, in hex."""
    return hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).hexdigest()
