"""Documents: reading texts, files and folders, and cutting long texts into passages."""

from __future__ import annotations

from kv_memory.documents.document import Document
from kv_memory.documents.passages import split_passages
from kv_memory.documents.sources import DocumentLike, ReadResult, read_documents, read_file

__all__ = ["Document", "DocumentLike", "ReadResult", "read_documents", "read_file", "split_passages"]
