"""JSON lines: each line is an object and a document, addressed by its byte offset."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kv_memory.errors import BrokenLineError, UnreadableDocumentError
from kv_memory.jobs.item import ReadItem, SourceItem
from kv_memory.jobs.sources.files import uri_of
from kv_memory.jobs.sources.rows import Fields

__all__ = ["JsonLinesSource"]


class JsonLinesSource:
    """The lines of a file.

    Args:
        path: Path of the file, which must not be compressed: that would rule out seeking to a line.
        fields: Names of the fields of a record.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path = path
        self._fields = fields
        self._uri = uri_of(path)
        self._file: IO[bytes] | None = None

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; broken lines are items too, and `read` raises their errors."""
        try:
            with self.path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        otherwise = f"{self.path.name}#{number}"
                        try:
                            record = _object(line)
                            id_ = self._fields.id_of(record, otherwise)
                        except ValueError:
                            id_ = otherwise
                        uri = f"{self._uri}#{offset}"
                        yield SourceItem(document_id=id_, uri=uri, size_bytes=len(line))
                    offset += len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            self._file.seek(int(item.locator))
            line = self._file.readline()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        try:
            record = _object(line)
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


def _unreadable(path: Path, error: OSError) -> UnreadableDocumentError:
    return UnreadableDocumentError(
        f"cannot be read: {error.strerror or error}", where=str(path), next_step="Check the path and its permissions."
    )
