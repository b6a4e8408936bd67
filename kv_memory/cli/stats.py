"""`kv-memory stats`: counts and sizes."""

from __future__ import annotations

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import plain, reporting, size_text
from kv_memory.settings import resolve_settings

__all__ = ["stats"]


def stats(
    store: StoreOption = DEFAULT_STORE, collection: CollectionOption = DEFAULT_COLLECTION, as_json: JsonOption = False
) -> None:
    """Show how much is stored, and the settings the store remembers."""
    with reporting(as_json=as_json) as out:
        with open_store(out, store, collection) as opened:
            found, folder = opened.stats(), opened.path
            settings = resolve_settings({}, opened.settings())
        if as_json:
            out.json({**plain(found), "store": folder, "collection": collection, "settings": settings})
            return
        rows: list[tuple[str, object]] = [
            ("Store", folder),
            ("Collection", collection),
            ("Documents", f"{found.n_documents:,}"),
            ("Passages", f"{found.n_passages:,}, {found.n_tokens:,} tokens"),
            ("Distilled caches", f"{found.n_caches:,}, {size_text(found.cache_bytes)}"),
            ("On disk", size_text(found.disk_bytes)),
            ("In quarantine", f"{found.n_quarantined:,}"),
            ("Model", settings.model),
            ("Adapter", settings.adapter or "none"),
            ("Selector", "the adapter's" if settings.adapter else settings.selector),
            ("Keep ratio", f"{settings.keep_ratio:g}"),
            ("Passage tokens", settings.passage_tokens or "whole"),
            ("Stored as", "the model computes" if settings.storage == "auto" else settings.storage),
        ]
        out.table(("", ""), rows)
