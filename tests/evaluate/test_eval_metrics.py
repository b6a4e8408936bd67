from __future__ import annotations

import math
import sys

import pytest
import torch

from kv_memory.errors import ConfigError
from kv_memory.evaluate import metrics
from kv_memory.evaluate.metrics import (
    contains,
    exact_match,
    f1,
    kl_divergence,
    negative_log_likelihood,
    normalise,
    rouge_l,
)


def test_answers_are_normalised_like_squad() -> None:
    assert normalise(" The  Denver-Broncos, a team!\n") == "denverbroncos team"


@pytest.mark.parametrize(
    ("answer", "references", "values"),
    [
        ("the cat", ["Cat."], (1.0, 1.0, 1.0)),
        ("a black cat sat", ["cat", "black dog"], (0.5, 0.0, 1.0)),
        ("concatenate", ["cat"], (0.0, 0.0, 0.0)),
        ("cat cat", ["cat dog cat"], (0.8, 0.0, 0.0)),
        ("", ["cat"], (0.0, 0.0, 0.0)),
        ("the", ["an"], (1.0, 1.0, 0.0)),  # two empty texts agree, as in the official script
    ],
)
def test_f1_exact_match_and_contains_of_answers(
    answer: str, references: list[str], values: tuple[float, float, float]
) -> None:
    assert (f1(answer, references), exact_match(answer, references), contains(answer, references)) == pytest.approx(
        values
    )


def test_rouge_takes_the_best_reference() -> None:
    assert rouge_l("the dog ran home", ["nothing here", "the dogs ran home"]) == pytest.approx(1.0)
    assert rouge_l("the dog ran", ["the dog ran far away now"]) == pytest.approx(2 / 3)


def test_a_missing_rouge_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics.check_rouge.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'kv-memory\[eval\]'"):
        metrics.check_rouge()


def test_kl_of_known_distributions() -> None:
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    student = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(teacher, student) == pytest.approx(first / 2)
    assert kl_divergence(teacher, teacher) == 0
    assert kl_divergence(student, teacher) != pytest.approx(first / 2)  # it has a direction


def test_negative_log_likelihood_of_known_distributions() -> None:
    log_probs = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert negative_log_likelihood(log_probs, [0, 1]) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
