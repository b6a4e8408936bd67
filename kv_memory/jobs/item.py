"""Sources: small items, possibly millions of them, and the documents read from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kv_memory.documents import Document
from kv_memory.errors import DuplicateDocumentError

__all__ = ["ReadItem", "Source", "SourceItem", "duplicate_error"]


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """A document of a source, without its text.

    Attributes:
        document_id: Id of the document in the collection.
        uri: Address from which a worker reads this document: `file:///a.md`, `file:///a.jsonl#BYTE OFFSET`.
        size_bytes: Size of the source in bytes; 0 if unknown. Larger documents are processed first, so that none is
            left alone at the end, and consecutive documents have about the same length.
        error: Error found while listing the source, in the form of `KVMemoryError.to_dict`; None if it can be read.
    """

    document_id: str
    uri: str
    size_bytes: int = 0
    error: dict[str, str | None] | None = None

    @property
    def locator(self) -> str:
        """The place of the document in its source: the part of the uri after the `#`."""
        return self.uri.partition("#")[2]


@dataclass(frozen=True, kw_only=True)
class ReadItem:
    """A document read by a worker.

    Attributes:
        document: Document with its text.
        whole: True if the document is already a passage and must not be split.
    """

    document: Document
    whole: bool = False


class Source(Protocol):
    """A source of documents."""

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


def duplicate_error(item: SourceItem, first: str) -> SourceItem:
    """A failed item for a second document with the same id."""
    error = DuplicateDocumentError(
        "two documents have the same id",
        where=f"{item.document_id}: {first} and {item.uri}",
        next_step="Pass a field with unique values as --id-field, or leave out one of the two documents.",
    )
    return SourceItem(document_id=f"{item.document_id} [{item.uri}]", uri=item.uri, error=error.to_dict())
