"""`kv-memory stats`: counts and sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import plain, reporting, size_text
from kv_memory.errors import ConfigError
from kv_memory.settings import resolve_settings

__all__ = ["stats"]


def stats(
    prometheus: Annotated[
        bool,
        typer.Option("--prometheus", help="Print Prometheus's text format: sizes, hits, misses, evictions, times."),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Show how much is stored, how it was used, and the settings the store remembers."""
    with reporting(as_json=as_json) as out:
        if prometheus and as_json:
            raise ConfigError("--prometheus and --json exclude each other", where="--prometheus", next_step="Drop one.")
        with open_store(out, store, collection) as opened:
            if prometheus:
                from kv_memory.store.metrics import prometheus_text

                out.piece(prometheus_text(opened))
                return
            found, folder, counts = opened.stats(), opened.path, opened.counters()
            settings = resolve_settings({}, opened.settings())
        if as_json:
            out.json(
                {**plain(found), "store": folder, "collection": collection, "settings": settings, "counters": counts}
            )
            return
        asked = counts.get("hits", 0) + counts.get("misses", 0)
        alone = settings.adapter is not None and settings.selector != "combined"
        rows: list[tuple[str, object]] = [
            ("Store", folder),
            ("Collection", collection),
            ("Documents", f"{found.n_documents:,}"),
            ("Passages", f"{found.n_passages:,}, {found.n_tokens:,} tokens"),
            ("Distilled caches", f"{found.n_caches:,}, {size_text(found.cache_bytes)}"),
            ("On disk", size_text(found.disk_bytes)),
            ("Found", f"{counts.get('hits', 0) / asked:.0%} of {asked:,.0f} look-ups" if asked else "no look-ups yet"),
            ("Evicted", f"{counts.get('evictions', 0):,.0f}"),
            ("In quarantine", f"{found.n_quarantined:,}"),
            ("Model", settings.model),
            ("Adapter", settings.adapter or "none"),
            ("Selector", "the adapter's" if alone else settings.selector),
            ("Keep ratio", f"{settings.keep_ratio:g}") if settings.keep_ratio else ("Kept", settings.keep),
            ("Passage tokens", settings.passage_tokens or "whole"),
            ("Stored as", "the model computes" if settings.storage == "auto" else settings.storage),
        ]
        out.table(("", ""), rows)
