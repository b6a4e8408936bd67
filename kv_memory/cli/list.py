"""`kv-memory list`: the documents of a collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting

if TYPE_CHECKING:
    from kv_memory.store import DocumentSummary

__all__ = ["list_documents"]


def list_documents(
    store: StoreOption = DEFAULT_STORE, collection: CollectionOption = DEFAULT_COLLECTION, as_json: JsonOption = False
) -> None:
    """List the documents."""
    with reporting(as_json=as_json) as out:
        with open_store(out, store, collection) as opened:
            documents = opened.documents()
        if as_json:
            out.json({"documents": documents})
            return
        if not documents:
            out.note("There are no documents yet. Add some: kv-memory add FILE")
            return
        rows = [
            (d.id, f"{d.n_passages:,}", f"{d.n_tokens:,}", _text_of(d), f"{d.updated_at:%Y-%m-%d %H:%M}")
            for d in documents
        ]
        out.table(("Document", "Passages", "Tokens", "Text", "Stored (UTC)"), rows, right=("Passages", "Tokens"))


def _text_of(document: DocumentSummary) -> str:
    if document.n_texts == document.n_passages:
        return "kept"
    return f"of {document.n_texts:,}" if document.n_texts else "-"
