"""Terms: keyed hashes of a passage's words with their counts, for retrieval without the text.

This keeps plain words out of files, backups and logs, but is not encryption. The key is stored beside the hashes, so
anyone with the database can test guesses, word by word. The key only prevents one precomputed table for all stores.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = ["Terms", "hash_word", "new_key"]

_KEY = re.compile("[0-9a-f]{32}")
_HASH = re.compile("[0-9a-f]{16}")


def new_key() -> str:
    """A random key of 16 bytes, in hex."""
    return secrets.token_hex(16)


def hash_word(word: str, key: str) -> str:
    """The keyed hash of a word: 8 bytes of BLAKE2b, in hex."""
    return hashlib.blake2b(word.encode(errors="surrogatepass"), key=bytes.fromhex(key), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The words of one passage, hashed and counted.

    Attributes:
        key: Hash key of the words, in hex. It is stored with them, so that passages may come from another collection.
        counts: Number of occurrences of each word, keyed by `hash_word`, in the order of the hashes, which reveals
            nothing about the text.
    """

    key: str
    counts: Mapping[str, int] = field(hash=False)

    @classmethod
    def of(cls, words: Iterable[str], key: str) -> Self:
        """The terms of a text, from its words."""
        return cls(key=key, counts=dict(sorted((hash_word(word, key), n) for word, n in Counter(words).items())))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: `values` is not a valid terms dict.
        """
        key, counts = values.get("key"), values.get("counts")
        if not isinstance(key, str) or _KEY.fullmatch(key) is None or not isinstance(counts, dict):
            raise ValueError("terms without a key or counts")
        if not all(_HASH.fullmatch(word) and type(n) is int and n > 0 for word, n in counts.items()):
            raise ValueError("counts must map word hashes to positive integers")
        return cls(key=key, counts=counts)

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can represent."""
        return {"key": self.key, "counts": dict(self.counts)}

    def __iter__(self) -> Iterator[str]:
        """Yield the hashes, each as often as its word occurs."""
        for word, n in self.counts.items():
            yield from [word] * n
