"""A document store of LlamaIndex, as `StorageContext.persist` and `IngestionPipeline.persist` write it.

It is read as JSON rather than through LlamaIndex, which would hold all of it in memory, once per worker. A node is
addressed by its byte range in the file.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_memory.documents import Document
from kv_memory.errors import UnreadableDocumentError
from kv_memory.jobs.job_records import SourceItem
from kv_memory.jobs.sources.source import ReadItem, Source, changed, uri_of

_DATA = b'"docstore/data"'
_DEPTH = 3  # of an entry
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}]', re.DOTALL)  # a string, or a brace outside of strings
_DOCUMENT = "4"  # type of a document; any other type is a node, which is already split
_BAD = (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError)


def is_docstore(path: Path) -> bool:
    """Whether a file is a document store: its JSON then begins with a key `docstore/...`."""
    try:
        with path.open("rb") as file:
            return re.match(rb'\s*\{\s*"docstore/', file.read(256)) is not None
    except OSError:
        return False


class DocstoreSource(Source):
    """The nodes or documents of a store.

    Nodes are kept whole, with the metadata for the model in front of their text, so that an index over them finds their
    caches. Documents are split like any other.
    """

    def __init__(self, path: Path) -> None:
        self.uri = uri_of(path)
        self._path = path

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; nodes without text, such as images, are skipped."""
        try:
            for id_, entry, start, end in _entries(self._path):
                content = _content(entry)
                if content.strip():
                    size_bytes = len(content.encode("utf-8", "replace"))
                    yield SourceItem(document_id=id_, uri=f"{self.uri}#{start}-{end}", size_bytes=size_bytes)
        except _BAD as error:
            raise UnreadableDocumentError(
                f"not a LlamaIndex document store: {error}",
                where=str(self._path),
                next_step="Pass the docstore.json that `storage_context.persist()` wrote.",
            ) from error

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        start, end = map(int, item.locator.split("-"))
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                entry = json.loads(file.read(end - start))
            data = _data(entry)
            if str(data["id_"]) != item.document_id:
                raise changed(item)
            metadata = dict(data.get("metadata") or {})
            if split_from := ((data.get("relationships") or {}).get("1") or {}).get("node_id"):
                metadata["ref_doc_id"] = str(split_from)
            document = Document(id=item.document_id, text=_content(entry), source_uri=item.uri, metadata=metadata)
        except _BAD as error:
            raise changed(item) from error
        return ReadItem(document=document, whole=entry.get("__type__") != _DOCUMENT)


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


def _entries(path: Path) -> Iterator[tuple[str, Any, int, int]]:
    """Yield id, value, start and end offset in bytes of every entry.

    An entry is an object in the object `docstore/data` of the file's object. The file is mapped, and one entry at a
    time is decoded.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        depth, start, keys = 0, 0, {1: b"", 2: b""}  # the last string at these depths
        for token in _TOKEN.finditer(data):
            if token[0] == b"{":
                depth += 1
                if depth == _DEPTH:
                    start = token.start()
            elif token[0] == b"}":
                if depth == _DEPTH and keys[1] == _DATA:
                    yield json.loads(keys[2]), json.loads(data[start : token.end()]), start, token.end()
                depth -= 1
            elif depth < _DEPTH:
                keys[depth] = token[0]
        if depth:
            raise ValueError("the file ends too early")
