"""Sources: reads the results of evaluations and of peers from their folders into one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.aggregate import Row, aggregate, order, plain_name, table_of
from kv_memory.evaluate.question_records import FILE_NAME, METRICS, Measured, Record, latest, read_lines
from kv_memory.evaluate.tasks import TASKS

_Thing = TypeVar("_Thing", Record, Row)
_PEER_FILE = "questions.jsonl"
_LEARNED = {"adapter", "adapter_selection", "combined", "refined"}  # a table may hold several of each, by label


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Contents of several folders.

    Attributes:
        rows: Rows of the table.
        records: Records from which the rows were aggregated, including those of peers.
    """

    rows: tuple[Row, ...]
    records: tuple[Record, ...]


def load_rows(
    paths: Sequence[Path | str],
    *,
    seed: int = 0,
    paired: bool = True,
    by: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    keep_ratios: Sequence[float] | None = None,
) -> Loaded:
    """One table from several sources.

    Args:
        paths: Folders of `evaluate(out=...)`, folders of `benchmarks/peers`, or JSONL files of either. Rows of a file
            that `kv-memory eval --json` printed are used unchanged and unpaired. `LABEL=PATH` names the learned
            methods `LABEL:adapter` and so on, so that one table can hold several adapters.
        seed: Random seed of the intervals.
        paired: True to use only documents that every column of a task has.
        by: Groups with separate rows, see `aggregate`; finished rows from files stay unchanged.
        methods: Methods to include, by their names in the table; None means all.
        keep_ratios: Ratios to include, in addition to methods without one; None means all.

    Raises:
        DatasetError: A path contains no evaluation.
        BrokenLineError: A line is not a result; the error names its number.
        ConfigError: Two sources hold different results under one name, two models are mixed, no document is common to
            all columns, or no result has one of the names.
    """
    records: list[Record] = []
    finished: list[Row] = []
    for path in paths:
        label, found, file = "", Path(path), str(path)
        if not found.exists() and "=" in file:
            label, _, file = file.partition("=")
            found = Path(file)
        own, rows = _read(found)
        records += [_labelled(record, label) for record in latest(own)]
        finished += rows
    records, finished = _chosen(records, methods, keep_ratios), _chosen(finished, methods, keep_ratios)
    names = {record.method for record in records} | {row.method for row in finished}
    for name in methods or ():
        if name not in names:
            raise ConfigError(
                f"no result has the method {name!r}", where="method", next_step="Use a name from the table."
            )
    for group in by or ():
        if not any(group in record.group for record in records):
            raise ConfigError(
                f"no result has the group {group!r}", where="by", next_step="Use a column name of the table."
            )
    _check(records)
    rows = aggregate(records, seed=seed, paired=paired, by=by)
    lost = sorted({record.task for record in records} - {row.task for row in rows})
    if lost:
        raise ConfigError(
            f"no document of {lost[0]} was measured by all methods",
            where="report",
            next_step="Report fewer methods together, or pass --unpaired.",
        )
    taken = {(table_of(row), row.method, row.keep_ratio) for row in rows}
    rows += [row for row in finished if (table_of(row), row.method, row.keep_ratio) not in taken]
    rows.sort(key=lambda row: (table_of(row), *order(row.method, row.keep_ratio)))
    return Loaded(rows=tuple(rows), records=tuple(records))


def _chosen(
    things: Sequence[_Thing], methods: Sequence[str] | None, keep_ratios: Sequence[float] | None
) -> list[_Thing]:
    return [
        thing
        for thing in things
        if (methods is None or thing.method in methods)
        and (keep_ratios is None or thing.keep_ratio is None or any(isclose(thing.keep_ratio, r) for r in keep_ratios))
    ]


def _read(path: Path) -> tuple[list[Record], list[Row]]:
    files = [path] if path.is_file() else [path / n for n in (FILE_NAME, _PEER_FILE) if (path / n).is_file()]
    if not files:
        raise DatasetError(
            "no evaluation results found",
            where=str(path),
            next_step="Pass a folder that `kv-memory eval --out` wrote to.",
        )
    records: list[Record] = []
    finished: list[Row] = []
    for file in files:
        found = read_lines(file, _parsed)
        records += [one for one in found if isinstance(one, Record)]
        records += _gathered([one for one in found if isinstance(one, tuple)])
        finished += [one for one in found if isinstance(one, Row)]
    return records, finished


def _parsed(data: dict[str, Any]) -> Record | Row | tuple[dict[str, Any], Measured]:
    """A line: a record of ours, a question of a peer, or a row of a table."""
    if "questions" in data:
        return Record.from_dict(data)
    return (data, _measured(data)) if "question" in data else _row(data)


def _measured(data: dict[str, Any]) -> Measured:
    for name in ("task", "document", "method", "keep_ratio"):
        data[name]
    others = {name: data.get(name) for name in METRICS[2:]}
    return Measured(kl=float(data["kl"]), nll=float(data["nll"]), **others)


def _gathered(questions: Sequence[tuple[dict[str, Any], Measured]]) -> list[Record]:
    """Records from rows per question, which is what peers write."""
    groups: dict[tuple[str, str, str, float | None], dict[Any, tuple[dict[str, Any], Measured]]] = {}
    for data, measured in questions:
        group = (data["task"], data["document"], data["method"], data["keep_ratio"])
        groups.setdefault(group, {})[data["question"]] = (data, measured)  # a repeated measurement counts once
    source = next((method.partition(":")[0] for _, _, method, _ in groups if ":" in method), "peer")
    records = []
    for (task, document, method, ratio), rows in groups.items():
        first = next(iter(rows.values()))[0]
        seconds, prefills = first.get("seconds_per_document"), first.get("prefills")
        records.append(
            Record(
                key="",
                config=source,
                task=task,
                document=document,
                method=method if ":" in method else f"{source}:{method}",  # its `full` cross-checks ours
                keep_ratio=ratio,
                compress_s=seconds,
                prefill_s=seconds / prefills if seconds and prefills else None,
                questions=tuple(measured for _, measured in rows.values()),
            )
        )
    return records


def _row(data: dict[str, Any]) -> Row:
    pairs = {name: None if pair is None else (pair[0], pair[1]) for name, pair in (data.get("ci") or {}).items()}
    return Row(
        task=data["task"],
        method=data["method"],
        keep_ratio=data["keep_ratio"],
        n=data["n"],
        n_documents=0,
        means={name: data.get(name) for name in METRICS},
        retention=data.get("retention"),
        ci={name: pairs.get(name) for name in ("kl", "score", "retention")},
        seconds_per_document=data.get("seconds_per_document"),
        prefills=data.get("prefills"),
        group={name: data[name] for name in TASKS[data["task"]].groups if name in data}
        if data["task"] in TASKS
        else {},
    )


def _labelled(record: Record, label: str) -> Record:
    return (
        replace(record, method=f"{label}:{record.method}")
        if label and plain_name(record.method) in _LEARNED
        else record
    )


def _check(records: Iterable[Record]) -> None:
    """Raise if the table would compare results that are not comparable."""
    configs: dict[tuple[str, str, float | None], str] = {}
    weights: dict[str, str] = {}
    for record in records:
        column = (record.task, record.method, record.keep_ratio)
        if configs.setdefault(column, record.config) != record.config:
            raise ConfigError(
                f"two different results have the name {record.method!r} at keep_ratio {record.keep_ratio}",
                where=record.task,
                next_step="Name the folders: LABEL=FOLDER.",
            )
        if record.weights:
            weights[record.weights] = record.model
    if len(weights) > 1:
        raise ConfigError(
            f"results of several models: {', '.join(weights.values())}",
            where="report",
            next_step="Report one model at a time.",
        )
