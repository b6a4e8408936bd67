"""Several documents: questions about one passage of SQuAD, answered from k passages that are used together.

This is how questions are answered after retrieval: each passage was compressed separately, long before the question,
and the caches are joined. The cost of that has two parts, which the table separates. `full` is one prefill of all
texts, the reference of KL. `full+joined` shows the loss when each passage is prefilled without seeing the others.
Every other row adds compression to that, and `KL to joined` is its distance to `full+joined` alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from kv_memory.datasets import Example, read_examples
from kv_memory.errors import DatasetError
from kv_memory.evaluate.cases import Case
from kv_memory.evaluate.metrics import normalise
from kv_memory.evaluate.tasks.task import MAX_QUESTIONS, Distractors, TaskSettings, choose, queries_of
from kv_memory.model.backbone import Backbone

_WHOSE: dict[Distractors, str] = {"other": "other articles", "same": "its own article"}


def multidoc_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Passages of SQuAD 1.1 dev, chosen as for `squad`; each among k - 1 others, at every place.

    The other passages are drawn once: those of a smaller k are the first of a larger k, in the same order, so that
    rows differ in k alone. None of them contains an answer to any of the questions.

    Raises:
        DatasetError: The set is missing, or no passage has enough others.
        ConfigError: The window is too small for this number of passages.
    """
    most = max(settings.k)
    examples = list(read_examples("squad", split="dev", data=settings.data))
    every = replace(settings, n_documents=len(examples))
    fitting = choose(examples, backbone, every, what="multidoc", together=most)
    seeded = (
        (one, _others(one, fitting, most - 1, settings.distractors, f"{settings.seed}:{one.id}")) for one in fitting
    )
    enough = ((example, others) for example, others in seeded if len(others) == most - 1)
    cases = [case for pair in islice(enough, settings.n_documents) for case in _placed(*pair, settings)]
    if not cases:
        raise DatasetError(
            f"no passage has {most - 1} distractors from {_WHOSE[settings.distractors]} without its answers",
            where="multidoc",
            next_step="Set k to a smaller number, or choose other distractors.",
        )
    return cases


def _others(example: Example, pool: Sequence[Example], n: int, distractors: Distractors, seed: str) -> tuple[str, ...]:
    """Passages that do not contain an answer; fewer than `n` if there are not enough."""
    asked = [answer for question in example.questions[:MAX_QUESTIONS] for answer in question.answers]
    answers = {f" {text} " for answer in asked if (text := normalise(answer))}
    same = distractors == "same"
    candidates = [one for one in pool if one.id != example.id and (one.title == example.title) == same]
    random.Random(seed).shuffle(candidates)  # a str is hashed by SHA-512: the same on every machine
    texts = ((one.context, f" {normalise(one.context)} ") for one in candidates)
    return tuple(islice((text for text, words in texts if not any(answer in words for answer in answers)), n))


def _placed(example: Example, others: Sequence[str], settings: TaskSettings) -> Iterator[Case]:
    """Cases with the passage among others, the largest k first: its caches are reused by the smaller ones."""
    for k in sorted(set(settings.k), reverse=True):
        n = min(k, settings.n_places or k)  # places, evenly spread from the first to the last
        for place in (round(i * (k - 1) / max(1, n - 1)) for i in range(n)):
            yield Case(
                id=example.id,
                text=example.context,
                queries=queries_of(example),
                passages=(*others[:place], example.context, *others[place : k - 1]),
                group={"k": k, "place": place + 1},
            )
