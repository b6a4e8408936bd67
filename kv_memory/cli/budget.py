"""`kv-memory budget`, `pin`, `unpin`: what caches may take, how long they live, which of them stay."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from kv_memory.cli.naming import find_document_id
from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import Output, plain, reporting, size_text
from kv_memory.cli.sizes import seconds_of, size_of

__all__ = ["budget", "pin", "unpin"]

_NONE = "none"
DocumentsArgument = Annotated[
    list[str], typer.Argument(metavar="ID", help="Ids, paths or names of files, or beginnings of ids.")
]


def budget(
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the collection's caches may take: 500MB, 20GB; none for no bound."),
    ] = None,
    store_max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the caches of all collections may take together, or none.")
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long caches that are added from now on live: 12h, 30d; none for ever."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Show what caches may take, or change it.

    What is too much goes at once, that used longest ago first; what is pinned or being read stays. Documents stay
    listed: a cache that went is made again by `kv-memory add --stale`.
    """
    with reporting(as_json=as_json) as out:
        changes: dict[str, Any] = {}
        for name, text, read in (
            ("max_size_bytes", max_size, size_of),
            ("store_max_size_bytes", store_max_size, size_of),
            ("ttl_s", ttl, seconds_of),
        ):
            if text is not None:
                option = {"max_size_bytes": "--max-size", "ttl_s": "--ttl"}.get(name, "--store-max-size")
                changes[name] = None if text.lower() == _NONE else read(text, where=option)
        with open_store(out, store, collection) as opened:
            n_evicted = 0
            if changes:
                out.stopped = "The budget may be set; run it again to make sure."
                n_evicted = opened.set_limits(dataclasses.replace(opened.limits(), **changes))
            limits, found = opened.limits(), opened.stats()
        if as_json:
            out.json({**plain(limits), "cache_bytes": found.cache_bytes, "n_evicted": n_evicted})
            return
        if n_evicted:
            out.line(f"{n_evicted:,} caches went.")
        out.table(
            ("", "Limit", "Now"),
            [
                (f"Collection {collection}", _size(limits.max_size_bytes), size_text(found.cache_bytes)),
                ("All collections", _size(limits.store_max_size_bytes), ""),
                ("Age", "none" if limits.ttl_s is None else f"{limits.ttl_s:,.0f} s", ""),
            ],
        )


def pin(
    documents: DocumentsArgument,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Keep the caches that documents have now, whatever the budget; they still expire."""
    with reporting(as_json=as_json) as out:
        _pin(out, documents, store, collection, pinned=True)


def unpin(
    documents: DocumentsArgument,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Let the budget decide about documents' caches again."""
    with reporting(as_json=as_json) as out:
        _pin(out, documents, store, collection, pinned=False)


def _pin(out: Output, documents: list[str], store: Any, collection: str, *, pinned: bool) -> None:
    done: dict[str, int] = {}
    with open_store(out, store, collection) as opened:
        ids = [summary.id for summary in opened.documents()]
        for id_ in dict.fromkeys(find_document_id(name, ids) for name in documents):
            done[id_] = opened.pin(id_, pinned=pinned)
    if out.as_json:
        out.json({"pinned" if pinned else "unpinned": done})
        return
    for id_, n_caches in done.items():
        out.line(f"{'Pinned' if pinned else 'Unpinned'} {id_}: {n_caches:,} caches")


def _size(size_bytes: int | None) -> str:
    return "none" if size_bytes is None else size_text(size_bytes)
