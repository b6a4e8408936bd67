"""Files and data sets of records, where each record is a document: JSON lines, Parquet, the Hugging Face hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from kv_memory.datasets.hub_sets import load_hub_set
from kv_memory.errors import BrokenLineError, ConfigError, UnreadableDocumentError
from kv_memory.jobs.sources.source import Fields, ReadItem, Source, SourceItem, changed, unreadable, uri_of

_BATCH_ROWS = 256  # held in memory at once


class JsonLinesSource(Source):
    """The lines of a file, each an object, addressed by their byte offsets.

    Args:
        path: Path of the file, which must not be compressed: that would rule out seeking to a line.
        fields: Names of the fields of a record.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.uri = uri_of(path)
        self._path = path
        self._fields = fields
        self._file: IO[bytes] | None = None

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; broken lines are items too, and `read` raises their errors."""
        offset = 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        id_ = otherwise = f"{self._path.name}#{number}"
                        with suppress(ValueError):
                            id_ = self._fields.id_of(_object(line), otherwise)
                        yield SourceItem(document_id=id_, uri=f"{self.uri}#{offset}", size_bytes=len(line))
                    offset += len(line)
        except OSError as error:
            raise unreadable(self._path, error) from error

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        try:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(int(item.locator))
            record = _object(self._file.readline())
        except OSError as error:
            raise unreadable(self._path, error) from error
        except ValueError as error:
            raise BrokenLineError(
                f"not a JSON object: {error}", where=item.uri, next_step="Fix the line, or leave it out."
            ) from error
        return self._fields.document(record, item)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _object(line: bytes) -> dict[str, Any]:
    value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}")
    return value


class ParquetSource(Source):
    """The rows of a Parquet file, addressed by their row groups and their places in the groups.

    The sizes of texts are unknown before they are read, so rows are processed in their order: a worker then reads a row
    group once, a batch at a time, instead of starting over for each row.

    Args:
        path: Path of the file.
        fields: Names of the fields of a record.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.uri = uri_of(path)
        self._path = path
        self._fields = fields
        self._file: Any = None
        self._group = -1
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._batch: Any = ()
        self._start = 0  # row number of the batch's first row in its group

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        file, number = self._open(), 0
        names = file.schema_arrow.names
        _check_column(self._fields.text_field, names, str(self._path))
        columns = [self._fields.id_field if self._fields.id_field in names else self._fields.text_field]
        for group in range(file.num_row_groups):
            for start, batch in self._batches_of(group, columns):
                for row, record in enumerate(batch.to_pylist(), start):
                    number += 1
                    id_ = self._fields.id_of(record, f"{self._path.name}#{number}")
                    yield SourceItem(document_id=id_, uri=f"{self.uri}#{group}/{row}")

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        group, row = map(int, item.locator.split("/"))
        if group != self._group or row < self._start:
            self._group, self._start, self._batch = group, 0, ()
            self._batches = self._batches_of(group)
        while row >= self._start + len(self._batch):
            self._start, self._batch = next(self._batches, (row, None))
            if self._batch is None:
                self._group = -1
                raise changed(item)
        return self._fields.document(self._batch.slice(row - self._start, 1).to_pylist()[0], item)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file, self._group = None, -1

    def _batches_of(self, group: int, columns: list[str] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the rows of a group in batches, each with the number of its first row."""
        start, file = 0, self._open()
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
                yield start, batch
                start += len(batch)
        except IndexError:  # the file has fewer groups now
            return
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
            self._group = -1
            raise self._unreadable(error) from error

    def _open(self) -> Any:
        if self._file is None:
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise ConfigError(
                    "reading Parquet files needs pyarrow, which is not installed",
                    where=str(self._path),
                    next_step="Run `pip install 'kv-memory[jobs]'`.",
                ) from error
            try:
                self._file = parquet.ParquetFile(self._path)
            except (OSError, ValueError) as error:
                raise self._unreadable(error) from error
        return self._file

    def _unreadable(self, error: Exception) -> UnreadableDocumentError:
        return UnreadableDocumentError(
            f"not a readable Parquet file: {error}", where=str(self._path), next_step="Check or rewrite the file."
        )


class HubSource(Source):
    """The rows of one split of a data set, addressed by their numbers.

    The set is downloaded once per machine, as Arrow files that are memory-mapped: a row is found by its number without
    loading the others. Streaming, as in training, was rejected: it would start over for every row.

    Args:
        name: `OWNER/NAME` or a folder, optionally followed by `:SPLIT` or `:CONFIGURATION:SPLIT`; the default split is
            `train`.
        fields: Names of the fields of a record.
    """

    def __init__(self, name: str, fields: Fields) -> None:
        parts = name.split(":")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise ConfigError(
                f"a data set must be given as OWNER/NAME[:[CONFIGURATION:]SPLIT], got {name!r}",
                where="SOURCE",
                next_step="For example hub:rajpurkar/squad:validation.",
            )
        self.uri = f"hub:{name}"
        self._name = name
        self._path, self._split = parts[0], parts[-1] if len(parts) > 1 else "train"
        self._config = parts[1] if len(parts) == 3 else None
        self._fields = fields
        self._rows: Any = None

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        rows = self._open()
        _check_column(self._fields.text_field, rows.column_names, self.uri)
        named = self._fields.id_field in rows.column_names
        ids = rows.select_columns([self._fields.id_field]) if named else None
        for number in range(len(rows)):
            id_ = self._fields.id_of({} if ids is None else ids[number], f"{self._name}#{number}")
            yield SourceItem(document_id=id_, uri=f"{self.uri}#{number}")

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        rows, number = self._open(), int(item.locator)
        if number >= len(rows):
            raise changed(item)
        return self._fields.document(rows[number], item)

    def close(self) -> None:
        """Release the files."""
        self._rows = None

    def _open(self) -> Any:
        if self._rows is None:
            self._rows = load_hub_set(self._path, self._config, where=self.uri, split=self._split)
        return self._rows


def _check_column(name: str, names: list[str], where: str) -> None:
    if name not in names:
        raise ConfigError(
            f"no column {name!r}",
            where=where,
            next_step=f"Pass the text column as --text-field; the columns are {', '.join(names)}.",
        )
