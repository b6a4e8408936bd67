"""Metrics: the similarity of an answer to its references, and of two distributions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from kv_memory.errors import ConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBERING = re.compile(r"(?:^|(?<=\s))\d{1,2}[.)]\s")  # numbers of a list: `1. pier 2. lamp`


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces (as in its evaluation script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1]; the best over the references."""
    said = Counter(normalise(answer).split())
    wanted = [Counter(normalise(reference).split()) for reference in references]
    return max(2 * (said & words).total() / n if (n := said.total() + words.total()) else 1.0 for words in wanted)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references in normal form, else 0."""
    return float(any(normalise(answer) == normalise(reference) for reference in references))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references as whole words in normal form, else 0."""
    words = f" {normalise(answer)} "
    wanted = [normalise(reference) for reference in references]
    return float(any(f" {reference} " in words for reference in wanted if reference))


def contains_all(answer: str, references: Sequence[str]) -> float:
    """Share of references that the answer contains, ignoring case: RULER's measure (arXiv 2404.06654)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def exact_match_all(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a list of all references in normal form, in any order and with nothing else, else 0."""
    words = normalise(re.sub(r"[,;]", " ", _NUMBERING.sub(" ", answer))).split()
    wanted = [word for reference in references for word in normalise(reference).split()]
    return float(sorted(word for word in words if word != "and") == sorted(wanted))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with stemming, in [0, 1]; the best over the references. Errors as in `check_rouge`."""
    scores = check_rouge().score_multi(list(references), answer)
    return float(scores["rougeL"].fmeasure)


@lru_cache
def check_rouge() -> Any:
    """The scorer of `rouge-score`; called early, so that a missing package is found before hours of work.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "ROUGE-L needs the package rouge-score", where="squality", next_step="pip install 'kv-memory[eval]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "f1": f1,
    "em": exact_match,
    "contains": contains,
    "rouge_l": rouge_l,
}
ALL_WANTED = TEXT_METRICS | {"em": exact_match_all, "contains": contains_all}
"""The same metrics if all references are required."""


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher || student) in nats, the mean over tokens; of log-probabilities, `(n_tokens, vocab_size)`, float32."""
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return max(0.0, float(divergence.mean()))  # rounding can give -1e-8 for two equal distributions


def negative_log_likelihood(log_probs: torch.Tensor, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of token ids, in nats; of log-probabilities, `(len(ids), vocab_size)`, float32."""
    wanted = torch.tensor(list(ids), device=log_probs.device)[:, None]
    return float(-log_probs.gather(1, wanted).mean())
