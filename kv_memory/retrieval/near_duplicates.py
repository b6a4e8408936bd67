"""Near-duplicates: retrieved passages that repeat one before them are skipped, so that the next one takes their place.

The same text in two documents, an older version, or a copy under another heading costs room in the model's window and
adds nothing. Texts may not be kept, so passages are compared by their words and counts (`terms_of`), without order:
case, punctuation and swapped paragraphs make no difference. Shingles and MinHash were rejected: a store without texts
cannot make them, and only the few passages at the top of a ranking are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

SIMILAR = 0.8  # weighted Jaccard similarity from which on two passages are near-duplicates
PART = 0.5  # least length of a part of a passage, as a share of it; shorter ones share all their words by chance
FEW = 32  # number of words below which every word counts: only a passage with the same words is a near-duplicate


class Distinct:
    """Passages that were taken, by their terms.

    A passage repeats one that was taken if their words are nearly the same (weighted Jaccard similarity of at least
    0.8), or if it is a part of the other, without a word of its own. The whole is taken after the part, because it has
    more. In a short passage every word counts: "Room 12 is free." is not repeated by "Room 14 is free."

    Versions that differ in a date or a number are near-duplicates, unless the question has a word that the earlier one
    lacks: to compare two years, a question needs both.

    Args:
        question: Terms of the question.
    """

    def __init__(self, question: Collection[str]) -> None:
        self._question = frozenset(question)
        self._taken: list[Mapping[str, int]] = []

    def take(self, terms: Mapping[str, int]) -> bool:
        """Take a passage by its terms; False if it repeats one that was taken. One without terms repeats none."""
        if any(self._repeats(terms, taken) for taken in self._taken):
            return False
        self._taken.append(terms)
        return True

    def _repeats(self, terms: Mapping[str, int], taken: Mapping[str, int]) -> bool:
        n, n_taken = sum(terms.values()), sum(taken.values())
        shared = sum(min(count, taken.get(term, 0)) for term, count in terms.items())
        same = shared >= (SIMILAR if n >= FEW else 1) * (n + n_taken - shared)
        part = shared == n >= max(PART * n_taken, FEW)
        return n > 0 and (same or part) and self._question.isdisjoint(terms.keys() - taken.keys())
