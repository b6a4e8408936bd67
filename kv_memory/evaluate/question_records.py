"""Records: one line of results per document, method and keep_ratio, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kv_memory.errors import BrokenLineError, DatasetError
from kv_memory.evaluate.cases import Group

T = TypeVar("T")

FILE_NAME = "examples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measures of one question, as in `metrics`; one that does not apply, or was not requested, is None.

    Attributes:
        kl: KL(full || method) in nats; the mean over the tokens of the full model's own answer, or of the reference,
            see `Task.kl_on`.
        nll: Mean negative log-likelihood per token of the first reference, in nats; or of a list of all references, if
            all are required.
        accuracy: 1 if the correct choice has the highest mean log-likelihood per token, else 0.
        kl_joined: The same as `kl`, against the joined full caches of the single documents; None for one document.
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


METRICS = tuple(field.name for field in fields(Measured) if field.name != "answer")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Results of one document, or several used together, with one method at one keep_ratio.

    Attributes:
        key: Hash of everything that determines the figures: equal keys, equal figures.
        config: The same hash without the document; the lines of one column of a table share it.
        document: Id of the example; cases with the same id differ in `group`.
        method: Name of the method; `adapter+int8` if its caches were stored as int8 and loaded again.
        weights: Hash of the model's weights.
        n_tokens: Number of tokens of the document in its wrapper, or of all documents.
        n_kept: Entries kept in every layer and head, summed over the documents.
        compress_s: Time in seconds in which the method compressed the document; None for `none`.
        prefill_s: Time in seconds of a plain prefill of the same document, measured alongside.
        size_bytes: Size of the cache in a store, in bytes; None for `full` and `none`, and in older files.
    """

    key: str
    config: str
    task: str
    document: str
    method: str
    keep_ratio: float | None
    model: str = ""
    weights: str = ""
    n_tokens: int = 0
    n_kept: int = 0
    compress_s: float | None = None
    prefill_s: float | None = None
    size_bytes: int | None = None
    cell: tuple[int, float] | None = None
    group: Group = field(default_factory=dict)
    questions: tuple[Measured, ...]

    @property
    def case(self) -> tuple[str, Hashable]:
        """Document and group: equal for the records of one case by several methods."""
        return self.document, tuple(self.group.items())

    @property
    def column(self) -> tuple[str, str, float | None]:
        """Task, method and keep_ratio: equal for the records of one row of a table that covers all groups."""
        return self.task, self.method, self.keep_ratio

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The record of a line's object; a TypeError or KeyError if the object is not a record."""
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        values["questions"] = tuple(Measured(**question) for question in data["questions"])
        values["cell"] = tuple(data["cell"]) if data.get("cell") else None
        return cls(**values)


def read_lines(path: Path, parse: Callable[[dict[str, Any]], T], *, repair: bool = False) -> list[T]:
    """The lines of a file of results, without an incomplete last one: cut off by a kill, or still being written.

    `parse` makes a result of a line's object; `repair` removes the incomplete line from the file.

    Raises:
        BrokenLineError: A line is not a result; the error names its number.
        DatasetError: The file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", where=str(path)) from error
    whole = content.rfind(b"\n") + 1
    if repair and whole < len(content):
        os.truncate(path, whole)
    found = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise BrokenLineError(
                f"not an evaluation result: {error!r}",
                where=f"{path}, line {number}",
                next_step="Remove the line, or evaluate into another folder.",
            ) from error
    return found


def load_records(folder: Path) -> list[Record]:
    """The records of a folder, in the order written; an incomplete last line is removed. Errors as in `read_lines`."""
    path = folder / FILE_NAME
    return read_lines(path, Record.from_dict, repair=True) if path.exists() else []


def append_record(folder: Path, record: Record) -> None:
    """Write a record to a folder; it is in the file when this returns, even if the process is killed afterwards.

    Raises:
        DatasetError: The folder, which need not exist, cannot be written to.
    """
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise DatasetError(
            f"cannot be written: {error.strerror}", where=str(path), next_step="Pass another --out."
        ) from error


def latest(records: Iterable[Record]) -> list[Record]:
    """One record for each case of a column, from the configuration that was written last.

    A folder may contain lines of an earlier adapter beside those of the adapter that replaced it.
    """
    found: dict[tuple[str, str, float | None], tuple[str, dict[Hashable, Record]]] = {}
    for record in records:
        if found.get(record.column, (None,))[0] != record.config:
            found[record.column] = record.config, {}
        found[record.column][1][record.case] = record
    return [record for _, cases in found.values() for record in cases.values()]
