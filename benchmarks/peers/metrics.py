"""SQuAD's measures of an answer: the normalisation, F1 and exact match of its official evaluation script."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["score_answer"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words; two empty texts agree."""
    ours, theirs = normalise(prediction).split(), normalise(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def score_answer(text: str | None, references: Sequence[str], names: Sequence[str]) -> dict[str, float | None]:
    """`f1`, `em` and `contains` of one answer, the best over the references; None for those not named."""
    scores: dict[str, float | None] = dict.fromkeys(("f1", "em", "contains"))
    if text is not None:
        answer, wanted = normalise(text), [normalise(reference) for reference in references]
        scores["f1"] = max(f1(text, reference) for reference in references)
        scores["em"] = float(answer in wanted)
        scores["contains"] = float(any(f" {reference} " in f" {answer} " for reference in wanted if reference))
    return {name: score if name in names else None for name, score in scores.items()}
