"""`kv-memory gc`: remove what nothing refers to."""

from __future__ import annotations

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting, size_text

__all__ = ["gc"]


def gc(
    store: StoreOption = DEFAULT_STORE, collection: CollectionOption = DEFAULT_COLLECTION, as_json: JsonOption = False
) -> None:
    """Remove what no document needs, and leftovers of crashes.

    Not while an add is running on the collection: the caches it has made so far belong to no document yet.
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "Run it again at any time."
        with open_store(out, store, collection) as opened, out.working("Removing"):
            report = opened.gc()
        if as_json:
            out.json(report)
            return
        n_caches = report.n_orphan_blobs + report.n_unreferenced_caches
        out.line(
            f"Removed {n_caches:,} caches without a document, {report.n_dangling_rows:,} entries without a cache and "
            f"{report.n_strays:,} leftovers; {size_text(report.freed_bytes)} freed."
        )
