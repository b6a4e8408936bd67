"""A document store of LlamaIndex, as `StorageContext.persist` and `IngestionPipeline.persist` write it.

It is read as JSON rather than through LlamaIndex, which would hold all of it in memory, once per worker. A node is
addressed by its byte range in the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_memory.documents import Document
from kv_memory.errors import UnreadableDocumentError
from kv_memory.jobs.item import ReadItem, SourceItem
from kv_memory.jobs.sources.files import uri_of
from kv_memory.jobs.sources.rows import changed

__all__ = ["DocstoreSource", "is_docstore"]

_DATA = "docstore/data"
_DOCUMENT = "4"  # type of a document; any other type is a node, which is already split
_CHUNK_BYTES = 1 << 16
_MARKS, _ENDS = re.compile(rb'["{}\[\]]'), re.compile(rb"[,}\]]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def is_docstore(path: Path) -> bool:
    """Whether a file is a document store: its JSON then begins with a key `docstore/...`."""
    try:
        with path.open("rb") as file:
            return re.match(rb'\s*\{\s*"docstore/', file.read(256)) is not None
    except OSError:
        return False


class DocstoreSource:
    """The nodes or documents of a store.

    Nodes are kept whole, with the metadata for the model in front of their text, so that an index over them finds their
    caches. Documents are split like any other.

    Args:
        path: Path of `docstore.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._uri = uri_of(path)

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; nodes without text, such as images, are skipped."""
        try:
            for id_, raw, start, end in _entries(self.path):
                content = _content(json.loads(raw))
                if content.strip():
                    uri = f"{self._uri}#{start}-{end}"
                    yield SourceItem(document_id=id_, uri=uri, size_bytes=len(content.encode("utf-8", "replace")))
        except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
            raise UnreadableDocumentError(
                f"not a LlamaIndex document store: {error}",
                where=str(self.path),
                next_step="Pass the docstore.json that `storage_context.persist()` wrote.",
            ) from error

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        start, end = map(int, item.locator.split("-"))
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                entry = json.loads(file.read(end - start))
            data = _data(entry)
            if str(data["id_"]) != item.document_id:
                raise changed(item)
            metadata = data.get("metadata") or {}
            document = Document(
                id=item.document_id, text=_content(entry), source_uri=item.uri, metadata={**metadata, **_source(data)}
            )
        except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
            raise changed(item) from error
        return ReadItem(document=document, whole=entry.get("__type__") != _DOCUMENT)

    def close(self) -> None:
        """Do nothing; no file stays open."""


def _data(entry: dict[str, Any]) -> dict[str, Any]:
    data = entry["__data__"]
    found: dict[str, Any] = json.loads(data) if isinstance(data, str) else data  # a string in old versions
    return found


def _content(entry: dict[str, Any]) -> str:
    """The result of `node.get_content(MetadataMode.LLM)` for a node; the bare text of a document, which is split."""
    data = _data(entry)
    resource = data.get("text_resource") or {}
    text: str = data.get("text") or resource.get("text") or ""
    if entry.get("__type__") == _DOCUMENT or not text.strip():
        return text
    hidden = set(data.get("excluded_llm_metadata_keys") or ())
    template = data.get("metadata_template") or data.get("metadata_tmpl") or "{key}: {value}"
    separator = data.get("metadata_separator") or data.get("metadata_seperator") or "\n"  # the spelling of old versions
    shown = {key: value for key, value in (data.get("metadata") or {}).items() if key not in hidden}
    metadata = separator.join(template.format(key=key, value=str(value)) for key, value in shown.items()).strip()
    if not metadata:
        return text
    whole = data.get("text_template") or data.get("text_tmpl") or "{metadata_str}\n\n{content}"
    return str(whole.format(content=text, metadata_str=metadata).strip())


def _source(data: dict[str, Any]) -> dict[str, str]:
    """Metadata that names the document a node was split from; empty if unknown."""
    relation = (data.get("relationships") or {}).get("1") or {}
    return {"ref_doc_id": str(relation["node_id"])} if relation.get("node_id") else {}


def _entries(path: Path) -> Iterator[tuple[str, bytes, int, int]]:
    """Yield id, JSON, start and end offset of every entry; one entry at a time is in memory."""
    with path.open("rb") as file:
        scanner = _Scanner(file)
        for key in scanner.members():
            if key != _DATA:
                scanner.value()
                continue
            for id_ in scanner.members():
                raw, start = scanner.value()
                yield id_, raw, start, start + len(raw)


class _Scanner:
    """Scans a JSON file of nested objects, value by value."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._buffer = b""
        self._base = 0  # offset of the buffer in the file
        self._at = 0  # position in the buffer

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that begins here; the caller must consume each value before the next key."""
        self._expect(b"{")
        if self._peek() == b"}":
            self._at += 1
            return
        while True:
            raw, _ = self.value()
            self._expect(b":")
            yield json.loads(raw)
            if self._peek() == b"}":
                self._at += 1
                return
            self._expect(b",")

    def value(self) -> tuple[bytes, int]:
        """Consume the value that begins here; return its JSON and its offset in the file."""
        first = self._peek()
        self._drop()
        if first == b'"':
            self._string()
        elif first in {b"{", b"["}:
            depth = 0
            while True:
                mark = self._seek(_MARKS)
                if mark == b'"':
                    self._string()
                    continue
                self._at += 1
                depth += 1 if mark in {b"{", b"["} else -1
                if depth == 0:
                    break
        else:
            self._seek(_ENDS)
        return self._buffer[: self._at], self._base

    def _seek(self, marks: re.Pattern[bytes]) -> bytes:
        """Advance to the next byte that matches `marks`, and return it."""
        while (match := marks.search(self._buffer, self._at)) is None:
            self._at = len(self._buffer)
            self._fill(0)
        self._at = match.start()
        return match.group()

    def _string(self) -> None:
        while (match := _STRING.match(self._buffer, self._at)) is None:
            self._fill(len(self._buffer) - self._at)
        self._at = match.end()

    def _expect(self, mark: bytes) -> None:
        if self._next() != mark:
            raise ValueError(f"missing {mark.decode()!r} at byte {self._base + self._at - 1}")

    def _next(self) -> bytes:
        mark = self._peek()
        self._at += 1
        return mark

    def _peek(self) -> bytes:
        """Skip white space, and return the next byte without consuming it."""
        while True:
            while self._at < len(self._buffer):
                mark = self._buffer[self._at : self._at + 1]
                if not mark.isspace():
                    return mark
                self._at += 1
            self._fill(0)

    def _fill(self, least: int) -> None:
        # A string is matched from its beginning after each fill, so read at least as much again as there is of it.
        more = self._file.read(max(_CHUNK_BYTES, least))
        if not more:
            raise ValueError("the file ends too early")
        self._buffer += more

    def _drop(self) -> None:
        self._base += self._at
        self._buffer = self._buffer[self._at :]
        self._at = 0
