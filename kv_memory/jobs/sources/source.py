"""Sources: they list small items, possibly millions of them, and read the document of an item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Protocol

from kv_memory.documents import Document
from kv_memory.documents.decoding import normalise_newlines
from kv_memory.errors import UnreadableDocumentError
from kv_memory.jobs.job_records import JobSettings, SourceItem

_MOST_CHARS = 1000  # longest value kept as metadata; longer ones are texts themselves


@dataclass(frozen=True, kw_only=True)
class ReadItem:
    """A document read by a worker; `whole` if it is already a passage and must not be split."""

    document: Document
    whole: bool = False


class Source(Protocol):
    """A source of documents; `uri` is the beginning of their uris, up to the `#`."""

    uri: str

    def items(self) -> Iterator[SourceItem]:
        """Yield every document; only a few are in memory at a time.

        Raises:
            KVMemoryError: The source as a whole cannot be read, or its reading breaks off.
        """

    def read(self, item: SourceItem) -> ReadItem:
        """Read one document.

        Raises:
            KVMemoryError: The document no longer exists, or is not text.
        """

    def close(self) -> None:
        """Release files and connections."""
        return


def record_id(record: Mapping[str, Any], id_field: str, otherwise: str) -> str:
    """The id of a record in a form that SQL accepts; `otherwise` if the record has no id."""
    value = record.get(id_field)
    if value is None or not str(value).strip():
        return otherwise
    return str(value).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def read_record(record: Mapping[str, Any], item: SourceItem, settings: JobSettings) -> ReadItem:
    """Convert a record to a document; short values of other fields become its metadata.

    Raises:
        UnreadableDocumentError: The record has no text, or its id has changed since discovery.
        DocumentError: The text is blank or cannot be stored.
    """
    if record_id(record, settings.id_field, item.document_id) != item.document_id:
        raise changed(item)
    text = record.get(settings.text_field)
    if not isinstance(text, str):
        what = "no field" if text is None else f"expected text, got {type(text).__name__} in field"
        raise UnreadableDocumentError(
            f"{what} {settings.text_field!r}",
            where=item.uri,
            next_step=f"Pass the text field as --text-field; the fields are {', '.join(map(str, record))}.",
        )
    kept = {
        key: value.isoformat() if isinstance(value, date | datetime) else value
        for key, value in record.items()
        if key not in {settings.id_field, settings.text_field} and _is_short(value)
    }
    text = normalise_newlines(text)
    return ReadItem(document=Document(id=item.document_id, text=text, source_uri=item.uri, metadata=kept))


def changed(item: SourceItem) -> UnreadableDocumentError:
    """The error for a record that is no longer in its place."""
    return UnreadableDocumentError(
        "the source has changed since the job listed its documents",
        where=f"{item.document_id} at {item.uri}",
        next_step="Start a new job for it; documents that are already stored cost almost nothing.",
    )


def uri_of(path: Path) -> str:
    """The uri of a file as named; links are not resolved, because the name determines the type."""
    return path.absolute().as_uri()


def _is_short(value: Any) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")  # JSON has neither NaN nor infinity
    return isinstance(value, bool | int | date | datetime) or (isinstance(value, str) and len(value) <= _MOST_CHARS)
