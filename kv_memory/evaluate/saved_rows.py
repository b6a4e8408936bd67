"""Sources: reads the results of evaluations and of peers from their folders into one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.aggregate import Row, aggregate, order, plain_name, table_of
from kv_memory.evaluate.question_records import FILE_NAME, METRICS, Measured, Record, latest, read_lines
from kv_memory.evaluate.tasks import TASKS

_Thing = TypeVar("_Thing", Record, Row)
_PEER_FILE = "questions.jsonl"
_LEARNED = {"adapter", "adapter_selection", "combined", "refined"}  # a table may hold several of each, by label


class Loaded(NamedTuple):
    """Rows of a table, and the records from which they were aggregated, including those of peers."""

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
        records += latest(_labelled(own, label) if label else own)
        finished += rows
    records, finished = _chosen(records, methods, keep_ratios), _chosen(finished, methods, keep_ratios)
    names = {record.method for record in records} | {row.method for row in finished}
    if unknown := [name for name in methods or () if name not in names]:
        raise ConfigError(
            f"no result has the method {unknown[0]!r}", where="method", next_step="Use a name from the table."
        )
    if unknown := [name for name in by or () if not any(name in record.group for record in records)]:
        raise ConfigError(
            f"no result has the group {unknown[0]!r}", where="by", next_step="Use a column name of the table."
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
    return Loaded(tuple(rows), tuple(records))


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
        asked: dict[tuple[Any, ...], dict[Any, Record]] = {}
        for question, found in read_lines(file, _parsed):
            if isinstance(found, Row):
                finished.append(found)
            elif question is None:
                records.append(found)
            else:  # a repeated measurement counts once
                asked.setdefault((*found.column, found.document), {})[question] = found
        records += _joined(list(asked.values()))
    return records, finished


def _parsed(data: dict[str, Any]) -> tuple[Any, Record | Row]:
    """A line: a record of ours, a row of a table, or one question of a peer, with its id."""
    if "questions" in data:
        return None, Record.from_dict(data)
    if "question" not in data:
        return None, _row(data)
    measured: dict[str, Any] = {name: data.get(name) for name in METRICS}
    measured |= {name: float(data[name]) for name in ("kl", "nll")}
    seconds, prefills = data.get("seconds_per_document"), data.get("prefills")
    return data["question"], Record(
        key="",
        config="",
        task=data["task"],
        document=data["document"],
        method=data["method"],
        keep_ratio=data["keep_ratio"],
        compress_s=seconds,
        prefill_s=seconds / prefills if seconds and prefills else None,
        questions=(Measured(**measured),),
    )


def _joined(documents: Sequence[dict[Any, Record]]) -> Iterator[Record]:
    """One record for each document and column, from a peer's records of each question."""
    firsts = [next(iter(questions.values())) for questions in documents]
    peer = next((first.method.partition(":")[0] for first in firsts if ":" in first.method), "peer")
    for first, questions in zip(firsts, documents, strict=True):
        method = first.method if ":" in first.method else f"{peer}:{first.method}"  # its `full` cross-checks ours
        own = tuple(measured for record in questions.values() for measured in record.questions)
        yield replace(first, config=peer, method=method, questions=own)


def _row(data: dict[str, Any]) -> Row:
    ci = data.get("ci") or {}
    groups = TASKS[data["task"]].groups if data["task"] in TASKS else ()
    return Row(
        task=data["task"],
        method=data["method"],
        keep_ratio=data["keep_ratio"],
        n=data["n"],
        n_documents=0,
        means={name: data.get(name) for name in METRICS},
        retention=data.get("retention"),
        ci={name: (ci[name][0], ci[name][1]) if ci.get(name) else None for name in ("kl", "score", "retention")},
        seconds_per_document=data.get("seconds_per_document"),
        prefills=data.get("prefills"),
        group={name: data[name] for name in groups if name in data},
    )


def _labelled(records: Iterable[Record], label: str) -> Iterator[Record]:
    for record in records:
        learned = plain_name(record.method) in _LEARNED
        yield replace(record, method=f"{label}:{record.method}") if learned else record


def _check(records: Sequence[Record]) -> None:
    """Raise if the table would compare results that are not comparable."""
    configs: dict[tuple[str, str, float | None], str] = {}
    weights = {record.weights: record.model for record in records if record.weights}
    for record in records:
        if configs.setdefault(record.column, record.config) != record.config:
            raise ConfigError(
                f"two different results have the name {record.method!r} at keep_ratio {record.keep_ratio}",
                where=record.task,
                next_step="Name the folders: LABEL=FOLDER.",
            )
    if len(weights) > 1:
        raise ConfigError(
            f"results of several models: {', '.join(weights.values())}",
            where="report",
            next_step="Report one model at a time.",
        )
