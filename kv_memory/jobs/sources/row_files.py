"""Files and data sets of records, where each record is a document: JSON lines, Parquet, the Hugging Face hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from kv_memory.datasets.hub_sets import load_hub_set
from kv_memory.documents.loaders import unreadable
from kv_memory.errors import BrokenLineError, ConfigError, KVMemoryError, UnreadableDocumentError
from kv_memory.jobs.job_records import JobSettings, SourceItem
from kv_memory.jobs.sources.source import ReadItem, Source, changed, read_record, record_id, uri_of

_BATCH_ROWS = 256  # held in memory at once


class JsonLinesSource(Source):
    """The lines of a file, each an object, addressed by byte offsets, which a compressed file would rule out."""

    def __init__(self, path: Path, settings: JobSettings) -> None:
        self.uri = uri_of(path)
        self._path = path
        self._settings = settings

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; broken lines are items too, and `read` raises their errors."""
        offset = 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        id_ = otherwise = f"{self._path.name}#{number}"
                        with suppress(ValueError):
                            id_ = record_id(_object(line), self._settings.id_field, otherwise)
                        yield SourceItem(document_id=id_, uri=f"{self.uri}#{offset}", size_bytes=len(line))
                    offset += len(line)
        except OSError as error:
            raise unreadable(error, self._path) from error

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        try:
            with self._path.open("rb") as file:
                file.seek(int(item.locator))
                record = _object(file.readline())
        except OSError as error:
            raise unreadable(error, self._path) from error
        except ValueError as error:
            raise BrokenLineError(
                f"not a JSON object: {error}", where=item.uri, next_step="Fix the line, or leave it out."
            ) from error
        return read_record(record, item, self._settings)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}")
    return value


class ParquetSource(Source):
    """The rows of a Parquet file, addressed by their row groups and their places in the groups.

    The sizes of texts are unknown before they are read, so rows are processed in their order: a worker then reads a row
    group once, a batch at a time, instead of starting over for each row.
    """

    def __init__(self, path: Path, settings: JobSettings) -> None:
        self.uri = uri_of(path)
        self._path = path
        self._settings = settings
        self._file: Any = None
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._last = -1, -1  # group and row that `_rows` has yielded last

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        with _parquet_errors(self._path):
            file, number = self._open(), 0
            names = file.schema_arrow.names
            _check_column(self._settings.text_field, names, str(self._path))
            id_field = self._settings.id_field
            columns = [id_field if id_field in names else self._settings.text_field]
            for group in range(file.num_row_groups):
                for row, record in self._rows_of(group, columns):
                    number += 1
                    id_ = record_id(record.to_pylist()[0], id_field, f"{self._path.name}#{number}")
                    yield SourceItem(document_id=id_, uri=f"{self.uri}#{group}/{row}")

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        group, row = map(int, item.locator.split("/"))
        last, self._last = self._last, (-1, -1)
        with _parquet_errors(self._path):
            if group >= self._open().num_row_groups:
                raise changed(item)
            if group != last[0] or row <= last[1]:
                self._rows = self._rows_of(group)
            for number, record in self._rows:
                if number == row:
                    self._last = group, row
                    return read_record(record.to_pylist()[0], item, self._settings)
        raise changed(item)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file, self._last = None, (-1, -1)

    def _rows_of(self, group: int, columns: list[str] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the rows of a group, each with its number, as tables of one row; one batch at a time is in memory."""
        number = 0
        for batch in self._open().iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for place in range(len(batch)):
                yield number, batch.slice(place, 1)
                number += 1

    def _open(self) -> Any:
        if self._file is None:
            from pyarrow import parquet

            self._file = parquet.ParquetFile(self._path)
        return self._file


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            "reading Parquet files needs pyarrow, which is not installed",
            where=str(path),
            next_step="Run `pip install 'kv-memory[jobs]'`.",
        ) from error
    except KVMemoryError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise UnreadableDocumentError(
            f"not a readable Parquet file: {error}", where=str(path), next_step="Check or rewrite the file."
        ) from error


class HubSource(Source):
    """The rows of one split of a data set, addressed by their numbers.

    The set is downloaded once per machine, as Arrow files that are memory-mapped: a row is found by its number without
    loading the others. Streaming, as in training, was rejected: it would start over for every row.
    """

    def __init__(self, name: str, settings: JobSettings) -> None:
        self.uri = f"hub:{name}"
        self._name = name
        self._settings = settings

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        id_field = self._settings.id_field
        _check_column(self._settings.text_field, self._rows.column_names, self.uri)
        ids = self._rows.select_columns([id_field]) if id_field in self._rows.column_names else None
        for number in range(len(self._rows)):
            id_ = record_id({} if ids is None else ids[number], id_field, f"{self._name}#{number}")
            yield SourceItem(document_id=id_, uri=f"{self.uri}#{number}")

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        number = int(item.locator)
        if number >= len(self._rows):
            raise changed(item)
        return read_record(self._rows[number], item, self._settings)

    @cached_property
    def _rows(self) -> Any:
        path, config, split = parse_hub_name(self._name)
        return load_hub_set(path, config, where=self.uri, split=split)


def parse_hub_name(name: str) -> tuple[str, str | None, str]:
    """Path, configuration and split (`train` by default) of a set, from `OWNER/NAME[:[CONFIGURATION:]SPLIT]`.

    Raises:
        ConfigError: The name has another form.
    """
    path, *rest = name.split(":")
    if len(rest) > 2 or not all((path, *rest)):
        raise ConfigError(
            f"a data set must be given as OWNER/NAME[:[CONFIGURATION:]SPLIT], got {name!r}",
            where="SOURCE",
            next_step="For example hub:rajpurkar/squad:validation.",
        )
    return path, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _check_column(name: str, names: list[str], where: str) -> None:
    if name not in names:
        raise ConfigError(
            f"no column {name!r}",
            where=where,
            next_step=f"Pass the text column as --text-field; the columns are {', '.join(names)}.",
        )
