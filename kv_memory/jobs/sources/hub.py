"""A data set of the Hugging Face hub: each row is a document, addressed by its number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kv_memory.errors import ConfigError, DatasetError
from kv_memory.jobs.item import ReadItem, SourceItem
from kv_memory.jobs.sources.rows import Fields, changed

__all__ = ["HubSource"]


class HubSource:
    """The rows of one split.

    The set is downloaded once per machine, as Arrow files that are memory-mapped: a row is found by its number without
    loading the others. Streaming, as in training, was rejected: it would start over for every row.

    Args:
        name: `OWNER/NAME` or a folder, optionally followed by `:SPLIT` or `:CONFIGURATION:SPLIT`; the default split is
            `train`.
        fields: Names of the fields of a record.
    """

    def __init__(self, name: str, fields: Fields) -> None:
        self.name = name
        parts = name.split(":")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise ConfigError(
                f"a data set must be given as OWNER/NAME[:[CONFIGURATION:]SPLIT], got {name!r}",
                where="SOURCE",
                next_step="For example hub:rajpurkar/squad:validation.",
            )
        self._path, self._split = parts[0], parts[-1] if len(parts) > 1 else "train"
        self._config = parts[1] if len(parts) == 3 else None
        self._fields = fields
        self._rows: Any = None

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        rows = self._open()
        if self._fields.text_field not in rows.column_names:
            raise ConfigError(
                f"no column {self._fields.text_field!r}",
                where=f"hub:{self.name}",
                next_step=f"Pass the text column as --text-field; the columns are {', '.join(rows.column_names)}.",
            )
        named = self._fields.id_field in rows.column_names
        ids = rows.select_columns([self._fields.id_field]) if named else None
        for number in range(len(rows)):
            record = {} if ids is None else ids[number]
            id_ = self._fields.id_of(record, f"{self.name}#{number}")
            yield SourceItem(document_id=id_, uri=f"hub:{self.name}#{number}")

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
            try:
                from datasets import load_dataset
            except ImportError as error:
                raise DatasetError(
                    "reading data sets from the hub needs the library `datasets`, which is not installed",
                    where=f"hub:{self.name}",
                    next_step="Run `pip install 'kv-memory[train]'`.",
                ) from error
            try:
                self._rows = load_dataset(self._path, self._config, split=self._split)
            except Exception as error:  # its own errors, and those of httpx, fsspec and pyarrow
                reason = str(error).strip().split("\n")[0][:200].rstrip(".") or type(error).__name__
                raise DatasetError(
                    f"cannot be read from the hub: {reason}",
                    where=f"hub:{self.name}",
                    next_step="Check the name, its splits and the connection.",
                ) from error
        return self._rows
