"""`kv-memory list`: the documents of a collection."""

from __future__ import annotations

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting

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
        rows = [(d.id, f"{d.n_passages:,}", f"{d.n_tokens:,}", f"{d.updated_at:%Y-%m-%d %H:%M}") for d in documents]
        out.table(("Document", "Passages", "Tokens", "Stored (UTC)"), rows, right=("Passages", "Tokens"))
