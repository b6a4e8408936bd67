"""Aggregate: turns records into rows of a table, with bootstrap intervals over documents."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_memory.errors import ConfigError
from kv_memory.evaluate.cases import Group
from kv_memory.evaluate.methods import METHODS
from kv_memory.evaluate.question_records import METRICS, Record
from kv_memory.evaluate.tasks import TASKS
from kv_memory.model.first_token import is_visible

CONFIDENCE = 0.95
RESAMPLES = 1000

Floats = NDArray[np.float64]
Interval = tuple[float, float]
_Case = tuple[str, Hashable]
_Column = dict[_Case, Record]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a method at a keep_ratio, None for `full` and `none`. Values that do not apply are None.

    Attributes:
        means: Mean over the questions, by metric.
        retention: (score - floor) / (ceiling - floor) of the task's main score. Floor and ceiling are `none` and
            `full` on the same documents; 1 means no loss. None if they are missing or equal.
        ci: 95% intervals of `kl`, `score` and `retention`, by a bootstrap over documents. The questions of a document
            stay together, including those at its different places. None with fewer than two documents.
        seconds_per_document: Mean time in seconds to compress a document, or all documents that are used together.
        prefills: The same time as a multiple of a plain prefill of the same text; the median over documents.
        empty: Share of the decoded answers without a visible character; None if none was decoded.
        group: Subset of the task that the row covers if the task has several, e.g. `{"k": 3}`; see `Case.group`.
    """

    task: str
    method: str
    keep_ratio: float | None
    n: int
    n_documents: int
    means: dict[str, float | None]
    retention: float | None = None
    ci: dict[str, Interval | None] = field(default_factory=lambda: {"kl": None, "score": None, "retention": None})
    seconds_per_document: float | None = None
    prefills: float | None = None
    empty: float | None = None
    group: Group = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The task's main score."""
        return self.means.get(score_of(self.task) or "")

    def to_dict(self) -> dict[str, Any]:
        """The row as one flat, printable object; apart from the group, with the same keys for all tasks and methods."""
        data: dict[str, Any] = {
            "task": self.task,
            **self.group,
            "method": self.method,
            "keep_ratio": self.keep_ratio,
            "n": self.n,
        }
        data |= {name: self.means.get(name) for name in METRICS}
        return data | {name: getattr(self, name) for name in ("retention", "ci", "seconds_per_document", "prefills")}


def score_of(task: str) -> str | None:
    """The main score of a task; None if it has none, or if the task is not one of `TASKS`."""
    return TASKS[task].score if task in TASKS else None


def aggregate(
    records: Iterable[Record], *, seed: int = 0, paired: bool = True, by: Sequence[str] | None = None
) -> list[Row]:
    """Rows of one or several tasks, by task as given, rising group, method as in `METHODS`, and falling keep_ratio.

    Args:
        records: Records to aggregate; of several for the same case and column, the last counts.
        seed: Random seed of the bootstrap.
        paired: True to use only cases that every column of the task has; False uses all cases of each column, so that
            rows may cover different documents.
        by: Names of groups with separate rows, e.g. `k` and `place`; rows are averaged over all other groups. None
            means `Task.by`.
    """
    tasks: dict[str, dict[tuple[tuple[str, int | str], ...], dict[tuple[str, float | None], _Column]]] = {}
    for record in records:
        names = (TASKS[record.task].by if record.task in TASKS else ()) if by is None else by
        group = tuple((name, record.group[name]) for name in names if name in record.group)
        columns = tasks.setdefault(record.task, {}).setdefault(group, {})
        columns.setdefault((record.method, record.keep_ratio), {})[record.case] = record
    return [
        row
        for task, groups in tasks.items()
        for group, columns in sorted(groups.items())
        for row in _rows(task, dict(group), columns, seed, paired)
    ]


def check_groups(task: str, by: Sequence[str]) -> None:
    """Raise a ConfigError, which names the available groups, unless rows of this task can be grouped by these names."""
    groups = TASKS[task].groups
    if unknown := [name for name in by if name not in groups]:
        raise ConfigError(
            f"rows of {task} cannot be grouped by {unknown[0]!r}",
            where="by",
            next_step=f"Use one or more of {', '.join(groups)}." if groups else "Omit the option.",
        )


def table_of(row: Row) -> tuple[str, tuple[tuple[str, int | str], ...]]:
    """Task and group of a row; rows are compared within these."""
    return row.task, tuple(row.group.items())


def _rows(
    task: str, group: Group, columns: dict[tuple[str, float | None], _Column], seed: int, paired: bool
) -> list[Row]:
    common = set.intersection(*map(set, columns.values()))
    ends = [columns.get((name, None)) for name in ("full", "none")]
    score = score_of(task)
    rows = []
    for (method, ratio), column in sorted(columns.items(), key=lambda item: order(*item[0])):
        cases = sorted(common if paired else column)
        if not cases:
            continue
        sums = {metric: _sums(column, metric, cases) for metric in METRICS}
        retention, interval = _retention(score, [column, *ends], cases, seed)
        taken = [column[case] for case in cases]
        seconds = [record.compress_s for record in taken if record.compress_s is not None]
        answers = [q.answer for record in taken for q in record.questions if q.answer is not None]
        ratios = [r.compress_s / r.prefill_s for r in taken if r.compress_s is not None and r.prefill_s]
        rows.append(
            Row(
                task=task,
                method=method,
                keep_ratio=ratio,
                n=sum(len(record.questions) for record in taken),
                n_documents=len({record.document for record in taken}),
                means={name: None if two is None else float(two[0].sum() / two[1].sum()) for name, two in sums.items()},
                retention=retention,
                ci={
                    "kl": _interval(sums["kl"], seed),
                    "score": _interval(sums[score] if score else None, seed),
                    "retention": interval,
                },
                seconds_per_document=sum(seconds) / len(seconds) if seconds else None,
                prefills=median(ratios) if ratios else None,  # since single documents may have shared the machine
                empty=sum(not is_visible(answer) for answer in answers) / len(answers) if answers else None,
                group=group,
            )
        )
    return rows


def order(method: str, keep_ratio: float | None) -> tuple[int, str, float]:
    """Sort key of columns: methods as in `METHODS`, then others (`kvpress:snapkv`), by falling keep_ratio."""
    names: tuple[str, ...] = METHODS
    own = plain_name(method)  # `paper:adapter` and `kvpress:full` are sorted beside ours
    return names.index(own) if own in names else len(names), method, -(2.0 if keep_ratio is None else keep_ratio)


def plain_name(method: str) -> str:
    """A method's name without label and storage: `adapter` for `paper:adapter+int8`."""
    return method.rpartition(":")[2].partition("+")[0]


def _retention(
    score: str | None, columns: Sequence[_Column | None], cases: Sequence[_Case], seed: int
) -> tuple[float | None, Interval | None]:
    """Retention of the first column between the others, `full` and `none`, with its interval."""
    three = [column for column in columns if column is not None]
    shared = [case for case in cases if all(case in column for column in three)]
    found = [_sums(column, score, shared) for column in three] if score and shared else []
    sums = [one for one in found if one is not None]
    if len(sums) < 3:
        return None, None
    own, ceiling, floor = (total.sum() / n.sum() for total, n in sums)
    if ceiling == floor:
        return None, None
    value = float((own - floor) / (ceiling - floor))
    if (n_documents := len(sums[0][0])) < 2:
        return value, None
    draws = _draws(n_documents, seed)
    own_b, ceiling_b, floor_b = ((draws @ total) / (draws @ n) for total, n in sums)
    some = ceiling_b != floor_b  # without a gap between floor and ceiling, retention is undefined
    return value, _percentiles((own_b[some] - floor_b[some]) / (ceiling_b[some] - floor_b[some]))


def _sums(column: _Column, metric: str, cases: Sequence[_Case]) -> tuple[Floats, Floats] | None:
    """Sum over questions and number of questions for each document; None if the metric does not apply."""
    documents: dict[str, list[float | None]] = {}
    for case in cases:
        documents.setdefault(case[0], []).extend(getattr(question, metric) for question in column[case].questions)
    if any(None in values for values in documents.values()):
        return None
    sums = [sum(filter(None, values)) for values in documents.values()]
    return np.array(sums, float), np.array([len(values) for values in documents.values()], float)


def _interval(sums: tuple[Floats, Floats] | None, seed: int) -> Interval | None:
    if sums is None or len(sums[0]) < 2:
        return None
    draws = _draws(len(sums[0]), seed)
    return _percentiles((draws @ sums[0]) / (draws @ sums[1]))


def _draws(n_documents: int, seed: int) -> Floats:
    """Number of times each document is drawn in each resample; the same for every method, so that they stay paired."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=RESAMPLES).astype(float)


def _percentiles(values: Floats) -> Interval | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
