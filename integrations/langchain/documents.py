"""Converts LangChain's documents to references. The key of a document is the hash of its text, never its id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.documents import Document

from kv_memory import ConfigError, KVMemory
from kv_memory.query import key_of
from kv_memory.retrieval.bm25 import Hit

from ..references import KV_ID, OnMissing, mark_of, reference_to

__all__ = ["check_k", "found", "marked", "without_mark"]


def found(hit: Hit, *, id: str, metadata: dict[str, Any]) -> Document:
    """A passage of the memory as a document that names its cache; without content if the text is not kept."""
    return Document(id=id, page_content=hit.text or "", metadata={**metadata, KV_ID: mark_of(hit.text_sha256)})


def without_mark(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy of the metadata without the mark, which may be stale or from another store."""
    return {name: value for name, value in metadata.items() if name != KV_ID}


def marked(memory: KVMemory, documents: Iterable[Document], *, on_missing: OnMissing) -> list[Document]:
    """Copies of the documents with their caches named in the metadata; see `reference_to` for documents without one."""
    copies: list[Document] = []
    for document in documents:
        text, metadata, mark = document.page_content, without_mark(document.metadata), document.metadata.get(KV_ID)
        # A document that is not stored yet is stored under its id, its source, or the key of its text.
        id_ = document.id or str(metadata.get("source") or key_of(text))
        reference = reference_to(
            memory, text, on_missing=on_missing, document_id=id_, mark=None if mark is None else str(mark)
        )
        if reference is None:
            continue
        if reference.text is None:
            metadata[KV_ID] = mark_of(reference.key)
        copies.append(document.model_copy(update={"metadata": metadata}))
    return copies


def check_k(k: int | None) -> int | None:
    """Return `k` if it is None or at least 1.

    Raises:
        ConfigError: `k` is below 1.
    """
    if k is not None and k < 1:
        raise ConfigError(f"k must be at least 1, got {k}", where="k")
    return k
