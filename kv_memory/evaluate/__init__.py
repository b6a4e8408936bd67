"""Evaluation: the loss in answers at each keep_ratio, compared with the full cache and with no document at all."""

from __future__ import annotations

from kv_memory.evaluate.advise import Advice, advise
from kv_memory.evaluate.aggregate import Row, aggregate
from kv_memory.evaluate.measure import EvalProgress
from kv_memory.evaluate.methods import METHODS, MethodName, RandomSelector
from kv_memory.evaluate.question_records import Record
from kv_memory.evaluate.recommend import AdviceRow, Criteria, Recommendation
from kv_memory.evaluate.report import markdown, write_report
from kv_memory.evaluate.runner import DEFAULT_KEEP_RATIOS, Evaluation, evaluate
from kv_memory.evaluate.saved_rows import Loaded, load_rows
from kv_memory.evaluate.tasks import TASKS, TaskName
from kv_memory.evaluate.tasks.task import TaskSettings

__all__ = [
    "DEFAULT_KEEP_RATIOS",
    "METHODS",
    "TASKS",
    "Advice",
    "AdviceRow",
    "Criteria",
    "EvalProgress",
    "Evaluation",
    "Loaded",
    "MethodName",
    "RandomSelector",
    "Recommendation",
    "Record",
    "Row",
    "TaskName",
    "TaskSettings",
    "advise",
    "aggregate",
    "evaluate",
    "load_rows",
    "markdown",
    "write_report",
]
