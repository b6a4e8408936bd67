"""Several documents: a question about one passage of SQuAD, asked of k passages that are read together.

This is how a retriever's findings are answered from: each passage was compressed by itself, long before the question,
and the caches are joined. What that costs has two parts, which the table tells apart. `full` is one prefill of all
texts, the reference of KL; `full+joined` is what remains when each passage is read without having seen the others;
every other row adds compression to that, and `KL to joined` is its distance to `full+joined` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kv_memory.datasets import Example, read_examples
from kv_memory.errors import DatasetError
from kv_memory.evaluate.cases import Case, Query, choose, in_hash_order
from kv_memory.evaluate.metrics import normalise
from kv_memory.evaluate.task import MAX_QUESTIONS, Distractors, TaskSettings
from kv_memory.model.backbone import Backbone

__all__ = ["multidoc_cases"]

_WHOSE: dict[Distractors, str] = {"other": "other articles", "same": "its own article"}


def multidoc_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Passages of SQuAD 1.1 dev, chosen as for `squad`; each among k - 1 others, at every place.

    The others of a passage are drawn once: those of a smaller k are the first of a larger one's, in the same order, so
    that k alone makes the difference. None of them holds an answer to any of the questions.

    Raises:
        DatasetError: The set is missing, or no passage has enough others.
        ConfigError: The window is too small for so many passages.
    """
    most = max(settings.k)
    low, high = settings.token_range(backbone, together=most)
    examples = in_hash_order(read_examples("squad", split="dev", data=settings.data))
    fitting = choose(examples, backbone, n_documents=len(examples), min_tokens=low, max_tokens=high, what="multidoc")
    cases: list[Case] = []
    n_taken = 0
    for example in fitting:
        others = _others(example, fitting, most - 1, settings.distractors, seed=f"{settings.seed}:{example.id}")
        if len(others) < most - 1 or not example.questions:
            continue
        n_taken += 1
        cases += _placed(example, others, settings)
        if n_taken == settings.n_documents:
            break
    if not cases:
        raise DatasetError(
            f"no passage has {most - 1} others of {_WHOSE[settings.distractors]} without its answers",
            where="multidoc",
            next_step="Pass a smaller --k, or other --distractors.",
        )
    return cases


def _others(
    example: Example, pool: Sequence[Example], n: int, distractors: Distractors, *, seed: str
) -> tuple[str, ...]:
    """Passages that do not hold an answer, fewer where there are not enough."""
    answers = {f" {text} " for question in _asked(example) for a in question if (text := normalise(a))}
    same = distractors == "same"
    candidates = [one for one in pool if one.id != example.id and (one.title == example.title) == same]
    random.Random(seed).shuffle(candidates)  # a str seeds through SHA-512: the same everywhere
    found: list[str] = []
    for candidate in candidates:
        if len(found) == n:
            break
        text = f" {normalise(candidate.context)} "
        if not any(answer in text for answer in answers):
            found.append(candidate.context)
    return tuple(found)


def _asked(example: Example) -> list[tuple[str, ...]]:
    return [question.answers for question in example.questions[:MAX_QUESTIONS]]


def _placed(example: Example, others: Sequence[str], settings: TaskSettings) -> list[Case]:
    """The passage among its others, the largest k first: what the smaller ones need was compressed by then."""
    queries = tuple(Query(text=q.text, references=q.answers) for q in example.questions[:MAX_QUESTIONS])
    return [
        Case(
            id=example.id,
            text=example.context,
            queries=queries,
            passages=(*others[:place], example.context, *others[place : k - 1]),
            group={"k": k, "place": place + 1},
        )
        for k in sorted(set(settings.k), reverse=True)
        for place in _places(k, settings.n_places)
    ]


def _places(k: int, n_places: int | None) -> list[int]:
    """Places of the passage with the answer, from 0 on; all, or so many from the first to the last."""
    if n_places is None or n_places >= k:
        return list(range(k))
    return [round(i * (k - 1) / max(1, n_places - 1)) for i in range(n_places)]
