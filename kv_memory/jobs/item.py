"""What a source holds: small items, of which a million may pass by, and the documents that are read from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kv_memory.documents import Document
from kv_memory.errors import DuplicateDocumentError

__all__ = ["ReadItem", "Source", "SourceItem", "duplicate_error"]


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """A document that a source holds, without its text.

    Attributes:
        document_id: Names it in the collection.
        uri: From which a worker reads this one document: `file:///a.md`, `file:///a.jsonl#BYTE OFFSET`.
        size_bytes: Of its source, 0 where that is not known; larger ones are done first, so that none is left to the
            end alone, and those that follow each other are of about the same length.
        error: Why it cannot be read, if that is known already, as `KVMemoryError.to_dict` has it.
    """

    document_id: str
    uri: str
    size_bytes: int = 0
    error: dict[str, str | None] | None = None

    @property
    def locator(self) -> str:
        """Where in its source: what stands behind the `#`."""
        return self.uri.partition("#")[2]


@dataclass(frozen=True, kw_only=True)
class ReadItem:
    """A document as a worker has read it.

    Attributes:
        document: With its text.
        whole: It is a passage already, and is not cut.
    """

    document: Document
    whole: bool = False


class Source(Protocol):
    """Something that holds documents."""

    def items(self) -> Iterator[SourceItem]:
        """Every document, one after the other; whatever their number, few are held in memory.

        Raises:
            KVMemoryError: The source as a whole cannot be read, or not any further.
        """

    def read(self, item: SourceItem) -> ReadItem:
        """One document.

        Raises:
            KVMemoryError: It is not there any more, or is no text.
        """

    def close(self) -> None:
        """Let go of files and connections."""


def duplicate_error(item: SourceItem, first: str) -> SourceItem:
    """A second document of the same id, as an item that has failed."""
    error = DuplicateDocumentError(
        "two documents have the same id",
        where=f"{item.document_id}: {first} and {item.uri}",
        next_step="Name a field that tells them apart with --id-field, or leave one of the two out.",
    )
    return SourceItem(document_id=f"{item.document_id} [{item.uri}]", uri=item.uri, error=error.to_dict())
