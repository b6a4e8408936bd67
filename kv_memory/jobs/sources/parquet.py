"""Parquet: each row is a document, addressed by its row group and its place in the group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError, UnreadableDocumentError
from kv_memory.jobs.item import ReadItem, SourceItem
from kv_memory.jobs.sources.files import uri_of
from kv_memory.jobs.sources.rows import Fields, changed

__all__ = ["ParquetSource"]

_BATCH_ROWS = 256  # held in memory at once


class ParquetSource:
    """The rows of a file.

    The sizes of texts are unknown before they are read, so rows are processed in their order: a worker then reads a row
    group once, instead of starting over for each row.

    Args:
        path: Path of the file.
        fields: Names of the fields of a record.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path = path
        self._fields = fields
        self._uri = uri_of(path)
        self._file: Any = None
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._start = 0  # row number of the batch's first row in its group

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        file, number = self._open(), 0
        columns = [self._fields.id_field] if self._fields.id_field in file.schema_arrow.names else []
        for group in range(file.num_row_groups):
            for row, id_ in enumerate(self._ids(file, group, columns)):
                number += 1
                otherwise = f"{self.path.name}#{number}"
                document_id = self._fields.id_of({self._fields.id_field: id_}, otherwise)
                yield SourceItem(document_id=document_id, uri=f"{self._uri}#{group}/{row}")

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        group, row = map(int, item.locator.split("/"))
        file = self._open()
        try:
            if group != self._group or row < self._start:
                self._group, self._start, self._batch = group, 0, None
                self._batches = file.iter_batches(_BATCH_ROWS, row_groups=[group])
            while self._batch is None or row >= self._start + self._batch.num_rows:
                self._start += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._batches)
            record = self._batch.slice(row - self._start, 1).to_pylist()[0]
        except (StopIteration, IndexError) as error:
            self._group = -1
            raise changed(item) from error
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
            self._group = -1
            raise self._unreadable(error) from error
        return self._fields.document(record, item)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file, self._group = None, -1

    def _ids(self, file: Any, group: int, columns: list[str]) -> Iterator[Any]:
        if not columns:
            yield from [None] * file.metadata.row_group(group).num_rows
            return
        try:
            for batch in file.iter_batches(8 * _BATCH_ROWS, row_groups=[group], columns=columns):
                yield from batch.column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _open(self) -> Any:
        if self._file is None:
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise ConfigError(
                    "reading Parquet files needs pyarrow, which is not installed",
                    where=str(self.path),
                    next_step="Run `pip install 'kv-memory[jobs]'`.",
                ) from error
            try:
                self._file = parquet.ParquetFile(self.path)
            except (OSError, ValueError) as error:
                raise self._unreadable(error) from error
            names = self._file.schema_arrow.names
            if self._fields.text_field not in names:
                raise ConfigError(
                    f"no column {self._fields.text_field!r}",
                    where=str(self.path),
                    next_step=f"Pass the text column as --text-field; the columns are {', '.join(names)}.",
                )
        return self._file

    def _unreadable(self, error: Exception) -> UnreadableDocumentError:
        return UnreadableDocumentError(
            f"not a readable Parquet file: {error}",
            where=str(self.path),
            next_step="Check or rewrite the file.",
        )
