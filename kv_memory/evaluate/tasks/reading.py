"""The reading tasks of the paper: SQuAD, QuALITY and SQuALITY, on their development sets."""

from __future__ import annotations

from collections.abc import Iterable

from kv_memory.datasets import Example, read_examples
from kv_memory.errors import DatasetError
from kv_memory.evaluate.cases import Case, Query
from kv_memory.evaluate.metrics import check_rouge
from kv_memory.evaluate.tasks.task import MAX_QUESTIONS, TaskSettings, choose
from kv_memory.model.backbone import Backbone


def squad_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Paragraphs of SQuAD 1.1 dev; the question is never seen at compression."""
    return _cases("squad", backbone, settings, cut_long=False)


def quality_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Long stories of QuALITY dev, truncated to the window, with multiple choice questions."""
    return _cases("quality", backbone, settings, cut_long=True, multiple_choice=True)


def squality_cases(backbone: Backbone, settings: TaskSettings) -> list[Case]:
    """Long stories of SQuALITY dev, truncated to the window, with questions that ask for a summary."""
    check_rouge()
    return _cases("squality", backbone, settings, cut_long=True)


def _cases(
    name: str, backbone: Backbone, settings: TaskSettings, *, cut_long: bool, multiple_choice: bool = False
) -> list[Case]:
    examples = _with_questions(read_examples(name, split="dev", data=settings.data), multiple_choice)
    return [
        Case(
            id=example.id,
            text=example.context,
            queries=tuple(
                Query(
                    text=question.text,
                    references=question.answers,
                    choices=question.choices if multiple_choice else (),
                    correct=question.correct if multiple_choice else None,
                )
                for question in example.questions[:MAX_QUESTIONS]
            ),
        )
        for example in choose(examples, backbone, settings, what=name, cut_long=cut_long)
    ]


def _with_questions(examples: Iterable[Example], multiple_choice: bool) -> Iterable[Example]:
    for example in examples:
        if multiple_choice and any(q.correct is None or not q.choices for q in example.questions):
            raise DatasetError("a question without choices in a multiple choice set", where=example.id)
        if example.questions:
            yield example
