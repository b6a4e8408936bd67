"""Documents: reading texts, files and folders, and splitting long texts into passages."""

from __future__ import annotations

from kv_memory.documents.loaders import Document, DocumentLike, ReadResult, read_documents, read_file
from kv_memory.documents.splitter import split_passages

__all__ = ["Document", "DocumentLike", "ReadResult", "read_documents", "read_file", "split_passages"]
