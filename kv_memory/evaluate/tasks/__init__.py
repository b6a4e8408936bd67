"""The tasks, by name."""

from __future__ import annotations

from functools import partial
from typing import Literal

from kv_memory.config import check_choice
from kv_memory.evaluate.tasks.multidoc import multidoc_cases
from kv_memory.evaluate.tasks.needle import needle_cases
from kv_memory.evaluate.tasks.qa import qa_cases, reading_cases
from kv_memory.evaluate.tasks.ruler import ruler_cases
from kv_memory.evaluate.tasks.spans import spans_cases
from kv_memory.evaluate.tasks.task import Task

__all__ = ["TASKS", "TaskName", "find_task"]

TaskName = Literal["squad", "quality", "squality", "needle", "spans", "multidoc", "ruler", "qa"]

_WORDS = ("f1", "em", "contains")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="squad", cases=partial(reading_cases, "squad"), score="f1", text_metrics=_WORDS),
        Task(name="quality", cases=partial(reading_cases, "quality"), score="accuracy"),
        Task(
            name="squality",
            cases=partial(reading_cases, "squality"),
            score="rouge_l",
            text_metrics=("rouge_l",),
            max_new_tokens=160,
        ),
        Task(name="needle", cases=needle_cases, score="contains", text_metrics=("contains",), drawn=True),
        Task(name="spans", cases=spans_cases, score=None, kl_on="reference", drawn=True),
        Task(
            name="multidoc",
            cases=multidoc_cases,
            score="f1",
            text_metrics=_WORDS,
            groups=("k", "place"),
            by=("k",),
            drawn=True,
            together=True,
        ),
        Task(
            name="ruler",
            cases=ruler_cases,
            score="contains",
            text_metrics=("em", "contains"),
            max_new_tokens=96,
            groups=("length", "kind"),
            by=("length", "kind"),
            drawn=True,
        ),
        Task(name="qa", cases=qa_cases, score="f1", text_metrics=_WORDS),
    )
}


def find_task(name: str) -> Task:
    """The task with this name.

    Raises:
        ConfigError: There is no such task; the error names the available ones.
    """
    return TASKS[check_choice(name, TaskName, where="task")]
