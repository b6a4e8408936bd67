"""`stats`, `check`, `gc`, `budget`, `pin`, `unpin` and `db`: commands that inspect and maintain a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from kv_memory.cli.documents import find_document_id
from kv_memory.cli.open_store import open_store
from kv_memory.cli.options import (
    DEFAULT_COLLECTION,
    DEFAULT_STORE,
    CollectionOption,
    JsonOption,
    StoreOption,
    seconds_of,
    size_of,
)
from kv_memory.cli.output import FAILED, Output, plain, reporting, size_text
from kv_memory.errors import ConfigError
from kv_memory.settings import resolve_settings

__all__ = ["budget", "check", "current", "gc", "init", "pin", "stats", "unpin", "upgrade"]


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


def check(
    store: StoreOption = DEFAULT_STORE, collection: CollectionOption = DEFAULT_COLLECTION, as_json: JsonOption = False
) -> None:
    """Hash every stored cache and compare it with the catalog.

    Damaged caches are put into quarantine; questions about their passages are answered from the text, if it is kept,
    until kv-memory add --stale has made them again. Exits with 1 if anything was wrong.
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "Run it again at any time."
        with open_store(out, store, collection) as opened, out.working("Checking"):
            report = opened.check()
        if as_json:
            out.json({**plain(report), "ok": report.ok})
        else:
            rows = [
                ("Sound", f"{report.n_blobs:,} caches, {size_text(report.size_bytes)}"),
                ("Damaged", f"{len(report.damaged):,}{', now in quarantine' if report.damaged else ''}"),
                ("Of another text", f"{len(report.misfiled):,}{', now unknown' if report.misfiled else ''}"),
                ("Missing", f"{len(report.missing):,}"),
                ("Without a document", f"{len(report.orphans) + len(report.unreferenced):,}"),
                ("Leftovers", f"{len(report.strays):,}"),
            ]
            out.table(("", ""), rows)
            if report.damaged or report.misfiled or report.missing:
                out.note("Next: kv-memory gc, then kv-memory add --stale, which makes the lost caches again.")
            elif not report.ok:
                out.note("Nothing is lost. kv-memory gc removes what is left over.")
        if not report.ok:
            raise typer.Exit(FAILED)


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


def init(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The folder that will stand for the store here.")],
    catalog: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="postgresql+psycopg://USER@HOST/DATABASE, ?schema=NAME for another schema than kv_memory. The "
            "password is best left to ~/.pgpass or PGPASSWORD. Without it, SQLite in the folder.",
        ),
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///FOLDER. Credentials come "
            "from the environment, e.g. AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL. Without it, files in the folder.",
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What copies of blobs in use may take in the folder: 20GB, 500MB."),
    ] = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Make a store, or join one that others share.

    A store is always named by a folder. One that many machines share has its catalog in PostgreSQL and its blobs in an
    object store; then each machine has a folder of its own, made by this command with the same URLs, and every other
    command is given that folder.
    """
    with reporting(as_json=as_json) as out:
        tier_size_bytes = None if tier is None else size_of(tier, where="--tier")
        with out.working("Connecting"):
            from kv_memory.store import Store

            with Store.open(
                store, collection=collection, catalog=catalog, blobs=blobs, tier_size_bytes=tier_size_bytes
            ) as opened:
                found = {
                    "store": opened.path,
                    "catalog": opened.catalog.where,
                    "blobs": opened.blobs_url,
                    "revision": opened.catalog.revision(),
                    "n_documents": opened.stats().n_documents,
                }
        if as_json:
            out.json(found)
            return
        out.line(f"Store    {found['store']}")
        out.line(f"Catalog  {found['catalog']}, version {found['revision']}")
        out.line(f"Blobs    {found['blobs']}")
        out.line(f"Collection {collection!r} has {found['n_documents']:,} documents.")


def current(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Tell the version of the store's tables, and that of this package."""
    with reporting(as_json=as_json) as out:
        from kv_memory.store.open_parts import catalog_of
        from kv_memory.store.sql.catalog import Catalog
        from kv_memory.store.sql.schema import SCHEMA_HEAD

        where = catalog_of(store)
        revision = Catalog.revision_at(where)
        if as_json:
            out.json({"catalog": str(where), "revision": revision, "head": SCHEMA_HEAD})
        elif revision == SCHEMA_HEAD:
            out.line(f"Version {revision}: that of this package.")
        else:
            out.line(
                f"Version {revision or 'none'}; this package has {SCHEMA_HEAD}. `kv-memory db upgrade` upgrades it."
            )


def upgrade(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Bring the store's tables to the version of this package.

    A store in one folder is upgraded by whoever opens it. A shared catalog waits for this command: programs of the
    older version that are at work on it would break.
    """
    with reporting(as_json=as_json) as out:
        from kv_memory.store.open_parts import catalog_of
        from kv_memory.store.sql.catalog import Catalog

        where = catalog_of(store)
        with out.working("Upgrading"):
            before = Catalog.revision_at(where)
            catalog = Catalog(where)
            after = catalog.revision()
            catalog.close()
        if as_json:
            out.json({"catalog": catalog.where, "before": before, "after": after})
        else:
            out.line(f"Version {after}; it was {before or 'none'}." if after != before else f"Already {after}.")
