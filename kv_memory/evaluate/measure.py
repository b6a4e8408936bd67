"""Measure: scores a method's cache on the questions about a document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.evaluate.answer_metrics import ALL_WANTED, TEXT_METRICS, kl_divergence, negative_log_likelihood
from kv_memory.evaluate.cases import Case, EncodedQuery, Query
from kv_memory.evaluate.prefilled_questions import PrefilledQuestions, batches
from kv_memory.evaluate.reference_answers import KL_TOKENS, TeacherAnswer
from kv_memory.evaluate.task import Task
from kv_memory.generate import first_token_rule
from kv_memory.model.backbone import Backbone

__all__ = ["METRICS", "Measured", "measure"]

METRICS = ("kl", "nll", "f1", "em", "contains", "accuracy", "rouge_l", "kl_joined")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measures of one question; a measure that does not apply, or was not requested, is None.

    Attributes:
        kl: KL(full || method) in nats; the mean over the tokens of the full model's own answer, or of the reference,
            see `Task.kl_on`.
        nll: Mean negative log-likelihood per token of the first reference, in nats; or of a list of all references, if
            all are required.
        f1: F1, see `metrics`.
        em: Exact match, see `metrics`.
        contains: Containment, see `metrics`.
        accuracy: 1 if the correct choice has the highest mean log-likelihood per token, else 0.
        rouge_l: ROUGE-L, see `metrics`.
        kl_joined: The same as `kl`, against the joined full caches of the single documents; None for one document.
        answer: The greedy answer.
    """

    kl: float
    nll: float
    f1: float | None = None
    em: float | None = None
    contains: float | None = None
    accuracy: float | None = None
    rouge_l: float | None = None
    kl_joined: float | None = None
    answer: str | None = None


def measure(
    backbone: Backbone,
    caches: Sequence[DistilledCache],
    case: Case,
    encoded: Sequence[EncodedQuery],
    taught: Sequence[TeacherAnswer],
    task: Task,
    *,
    layout: Layout,
    generate: bool,
) -> list[Measured]:
    """Measure all questions of a document.

    Args:
        backbone: The model.
        caches: The method's caches of the document; empty for the floor.
        case: The document and its questions.
        encoded: Those questions, as tokens.
        taught: The full model's answers to them.
        task: The task, which determines the metrics.
        layout: Placement of documents, see `compose`.
        generate: True to decode answers if the task has text metrics.

    Raises:
        ContextWindowError: Document, question and answer do not fit the model.
    """
    settings = DecodeSettings(max_new_tokens=task.max_new_tokens) if generate and task.text_metrics else None
    n_new = max(KL_TOKENS, *(len(row) for query in encoded for row in (query.reference, *query.choices)))
    n_new = max(n_new, settings.max_new_tokens) if settings else n_new
    n_entries = len(backbone.prefix_ids) + sum(cache.n_kept for cache in caches)
    n_tokens = max(len(query.prompt) for query in encoded) + n_new
    scored: list[_Scored] = []
    texts: list[str | None] = []
    for part in batches(backbone, len(encoded), n_entries=n_entries, n_tokens=n_tokens):
        asked = PrefilledQuestions(
            backbone, caches, [query.prompt for query in encoded[part]], layout=layout, n_new=n_new
        )
        found = _score(backbone, asked, case.queries[part], encoded[part], taught[part])
        scored += found
        texts += [None] * len(found) if settings is None else _texts(asked, taught[part], found, settings)
    return [
        Measured(
            kl=one.kl,
            nll=one.nll,
            accuracy=one.accuracy,
            kl_joined=one.kl_joined,
            answer=text,
            **_judged(text, query, task),
        )
        for one, text, query in zip(scored, texts, case.queries, strict=True)
    ]


def _judged(text: str | None, query: Query, task: Task) -> dict[str, float]:
    if text is None:
        return {}
    metrics = ALL_WANTED if query.all_wanted else TEXT_METRICS
    return {name: metrics[name](text, query.references) for name in task.text_metrics}


@dataclass(frozen=True, kw_only=True)
class _Scored:
    kl: float
    nll: float
    accuracy: float | None
    kl_joined: float | None
    agrees: bool  # greedy tokens equal those of the full model at every token of its answer


def _score(
    backbone: Backbone,
    asked: PrefilledQuestions,
    queries: Sequence[Query],
    encoded: Sequence[EncodedQuery],
    taught: Sequence[TeacherAnswer],
) -> list[_Scored]:
    kl, agrees, kl_joined = [], [], list[float | None]()
    for log_probs, teacher, query in zip(asked.follow([one.ids for one in taught]), taught, encoded, strict=True):
        kl.append(kl_divergence(teacher.log_probs, log_probs))
        best = first_token_rule(backbone, query.prompt).greedy(log_probs, teacher.ids)
        agrees.append(best == list(teacher.ids))
        joined = teacher.joined_log_probs
        kl_joined.append(None if joined is None else kl_divergence(joined, log_probs))
    nll = _losses(asked, [query.reference for query in encoded])
    accuracy = _accuracy(asked, queries, encoded)
    return [
        _Scored(kl=kl[i], nll=nll[i], accuracy=accuracy[i], kl_joined=kl_joined[i], agrees=agrees[i])
        for i in range(len(queries))
    ]


def _losses(asked: PrefilledQuestions, rows: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood per token of each row; infinite for an empty one."""
    return [
        negative_log_likelihood(log_probs, row) if row else math.inf
        for log_probs, row in zip(asked.follow(rows), rows, strict=True)
    ]


def _accuracy(
    asked: PrefilledQuestions, queries: Sequence[Query], encoded: Sequence[EncodedQuery]
) -> list[float | None]:
    n_choices = max(len(query.choices) for query in encoded)
    losses = [
        _losses(asked, [query.choices[i] if i < len(query.choices) else () for query in encoded])
        for i in range(n_choices)
    ]
    result: list[float | None] = []
    for row, query in enumerate(queries):
        own = [losses[i][row] for i in range(len(query.choices))]
        result.append(float(own.index(min(own)) == query.correct) if own else None)
    return result


def _texts(
    asked: PrefilledQuestions, taught: Sequence[TeacherAnswer], scored: Sequence[_Scored], settings: DecodeSettings
) -> list[str | None]:
    """Greedy answers.

    If the method's likeliest token (of those that may open an answer) equals the full model's at every token of its
    answer, greedy decoding would follow the same path to the same end. The answer is then known, and is not decoded.
    """
    texts: list[str | None] = [
        teacher.text if one.agrees and teacher.whole else None for teacher, one in zip(taught, scored, strict=True)
    ]
    open_rows = [row for row, text in enumerate(texts) if text is None]
    for row, text in zip(open_rows, asked.decode(open_rows, settings) if open_rows else (), strict=True):
        texts[row] = text
    return texts
