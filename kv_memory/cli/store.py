"""`stats`, `check`, `gc`, `budget`, `pin`, `unpin` and `db`: commands that inspect and maintain a store."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

from kv_memory.cli.documents import find_document_id
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, Place, StoreOption, command
from kv_memory.cli.output import FAILED, Name, Output, plain, size_text
from kv_memory.config import seconds_of, size_of
from kv_memory.errors import ConfigError
from kv_memory.settings import MemorySettings


@command()
def stats(*, prometheus: bool = False, place: Place, out: Output) -> Any:
    """Show how much is stored, and the settings the store remembers.

    Options:
        prometheus: Print the sizes in Prometheus's text format.
    """
    if prometheus and out.as_json:
        raise ConfigError("--prometheus and --json cannot be combined", where="--prometheus", next_step="Drop one.")
    with place.open_store(out) as opened:
        if prometheus:
            from kv_memory.store.metrics import prometheus_text

            return out.piece(prometheus_text(opened))
        found, folder = opened.stats(), opened.path
        settings = MemorySettings.resolve(opened.settings())
    alone = settings.adapter is not None and settings.selector != "combined"
    rows: list[tuple[str, object]] = [
        ("Store", Name(folder)),
        ("Collection", Name(place.collection)),
        ("Documents", f"{found.n_documents:,}"),
        ("Passages", f"{found.n_passages:,}, {found.n_tokens:,} tokens"),
        ("Distilled caches", f"{found.n_caches:,}, {size_text(found.cache_bytes)}"),
        ("On disk", size_text(found.disk_bytes)),
        ("Quarantined", f"{found.n_quarantined:,}"),
        ("Model", Name(settings.model)),
        ("Adapter", Name(settings.adapter or "none")),
        ("Selector", "the adapter's" if alone else settings.selector),
        ("Keep ratio", f"{settings.keep_ratio:g}") if settings.keep_ratio else ("Kept", settings.keep),
        ("Passage tokens", settings.passage_tokens or "whole"),
        ("Storage type", "the model's own" if settings.storage == "auto" else settings.storage),
    ]
    out.table(("", ""), rows)
    return {**plain(found), "store": folder, "collection": place.collection, "settings": settings}


@command()
def check(*, place: Place, out: Output) -> Any:
    """Hash every stored cache and compare it with the catalog.

    Damaged caches are quarantined. Questions about their passages are answered from the text, if it is kept, until
    kv-memory add --stale compresses them again. Exits with 1 if anything was wrong.
    """
    out.stopped = "Run it again at any time."
    with place.open_store(out) as opened, out.working("Checking"):
        report = opened.check()
    rows = [
        ("Intact", f"{report.n_blobs:,} caches, {size_text(report.size_bytes)}"),
        ("Damaged", f"{len(report.damaged):,}{', now in quarantine' if report.damaged else ''}"),
        ("Mismatched", f"{len(report.misfiled):,}{', rows deleted' if report.misfiled else ''}"),
        ("Missing", f"{len(report.missing):,}"),
        ("Without a document", f"{len(report.orphans) + len(report.unreferenced):,}"),
        ("Leftovers", f"{len(report.strays):,}"),
    ]
    out.table(("", ""), rows)
    if report.damaged or report.misfiled or report.missing:
        out.note("Next: kv-memory gc, then kv-memory add --stale, which compresses the lost caches again.")
    elif not report.ok:
        out.note("Nothing is lost. kv-memory gc removes the leftovers.")
    out.code = 0 if report.ok else FAILED
    return {**plain(report), "ok": report.ok}


@command()
def gc(*, place: Place, out: Output) -> Any:
    """Remove caches that no document needs, and leftovers of crashes.

    Do not run it during an add on the same collection: the caches made so far do not belong to a document yet.
    """
    out.stopped = "Run it again at any time."
    with place.open_store(out) as opened, out.working("Removing"):
        report = opened.gc()
    n_caches = report.n_orphan_blobs + report.n_unreferenced_caches
    out.line(
        f"Removed {n_caches:,} caches without a document, {report.n_dangling_rows:,} entries without a cache and "
        f"{report.n_strays:,} leftovers; {size_text(report.freed_bytes)} freed."
    )
    return report


@command()
def budget(
    *, max_size: str | None = None, store_max_size: str | None = None, ttl: str | None = None, place: Place, out: Output
) -> Any:
    """Show or change the size limits and the lifetime of caches.

    Caches above a limit are evicted at once, the least recently used first; those that are pinned or being read stay.
    Documents stay listed: `kv-memory add --stale` compresses evicted caches again.

    Options:
        max_size (SIZE): Size limit of the collection's caches: 500MB, 20GB; none for no limit.
        store_max_size (SIZE): Size limit of the caches of all collections, or none.
        ttl (TIME): Lifetime of caches that are added from now on: 12h, 30d; none for no limit.
    """
    given = (
        ("max_size_bytes", "--max-size", max_size, size_of),
        ("store_max_size_bytes", "--store-max-size", store_max_size, size_of),
        ("ttl_s", "--ttl", ttl, seconds_of),
    )
    changes: dict[str, Any] = {
        name: None if text.lower() == "none" else parse(text, where=option)
        for name, option, text, parse in given
        if text is not None
    }
    with place.open_store(out) as opened:
        n_evicted = 0
        if changes:
            out.stopped = "The limits may be set already; run the command again to make sure."
            n_evicted = opened.set_limits(dataclasses.replace(opened.limits(), **changes))
        limits, found = opened.limits(), opened.stats()
    if n_evicted:
        out.line(f"Evicted {n_evicted:,} caches.")
    out.table(
        ("", "Limit", "Now"),
        [
            (f"Collection {place.collection}", _size(limits.max_size_bytes), size_text(found.cache_bytes)),
            ("All collections", _size(limits.store_max_size_bytes), ""),
            ("Age", "none" if limits.ttl_s is None else f"{limits.ttl_s:,.0f} s", ""),
        ],
    )
    return {**plain(limits), "cache_bytes": found.cache_bytes, "n_evicted": n_evicted}


@command()
def pin(documents: list[str], *, place: Place, out: Output) -> Any:
    """Protect the current caches of documents from eviction; they still expire.

    Options:
        documents (ID): Ids, paths or names of files, or beginnings of ids.
    """
    return _pin(out, documents, place, pinned=True)


@command()
def unpin(documents: list[str], *, place: Place, out: Output) -> Any:
    """Allow the caches of documents to be evicted again.

    Options:
        documents (ID): Ids, paths or names of files, or beginnings of ids.
    """
    return _pin(out, documents, place, pinned=False)


def _pin(out: Output, documents: list[str], place: Place, *, pinned: bool) -> dict[str, Any]:
    done: dict[str, int] = {}
    with place.open_store(out) as opened:
        ids = [summary.id for summary in opened.documents()]
        for id_ in dict.fromkeys(find_document_id(name, ids) for name in documents):
            done[id_] = opened.pin(id_, pinned=pinned)
            out.line(f"{'Pinned' if pinned else 'Unpinned'} {id_}: {done[id_]:,} caches")
    return {"pinned" if pinned else "unpinned": done}


def _size(size_bytes: int | None) -> str:
    return "none" if size_bytes is None else size_text(size_bytes)


@command()
def init(
    store: Path,
    *,
    catalog: str | None = None,
    blobs: str | None = None,
    tier: str | None = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    out: Output,
) -> Any:
    """Create a store, or join a shared one.

    A store is always named by a folder. A store that many machines share has its catalog in PostgreSQL and its blobs in
    an object store. Each machine then has its own folder, created by this command with the same URLs; pass that folder
    to every other command.

    Options:
        store (STORE): The folder that represents the store on this machine.
        catalog (URL): postgresql+psycopg://USER@HOST/DATABASE, with ?schema=NAME for a schema other than kv_memory. Put
            the password into ~/.pgpass or PGPASSWORD. Without this option, SQLite in the folder.
        blobs (URL): s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///FOLDER. Credentials come
            from the environment, e.g. AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL. Without this option, files in the folder.
        tier (SIZE): Size limit of local copies of blobs, in the folder: 20GB, 500MB.
    """
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
    out.line(f"Store    {found['store']}")
    out.line(f"Catalog  {found['catalog']}, version {found['revision']}")
    out.line(f"Blobs    {found['blobs']}")
    out.line(f"Collection {collection!r} has {found['n_documents']:,} documents.")
    return found


@command()
def current(store: StoreOption = DEFAULT_STORE, *, out: Output) -> Any:
    """Show the version of the store's tables, and the version that this package needs."""
    from kv_memory.store.location import catalog_of
    from kv_memory.store.sql.catalog import Catalog
    from kv_memory.store.sql.schema import SCHEMA_HEAD

    where = catalog_of(store)
    with closing(Catalog(where)) as catalog:
        revision = catalog.revision()
    if revision == SCHEMA_HEAD:
        out.line(f"Version {revision}, up to date.")
    else:
        out.line(f"Version {revision or 'none'}; this package needs {SCHEMA_HEAD}. `kv-memory db upgrade` upgrades it.")
    return {"catalog": str(where), "revision": revision, "head": SCHEMA_HEAD}


@command()
def upgrade(store: StoreOption = DEFAULT_STORE, *, out: Output) -> Any:
    """Upgrade the store's tables to the version of this package.

    A store in one folder is upgraded when it is opened. A shared catalog is only upgraded by this command, because
    running programs of the older version would break.
    """
    from kv_memory.store.location import catalog_of
    from kv_memory.store.sql.catalog import Catalog

    where = catalog_of(store)
    with out.working("Upgrading"), closing(Catalog(where)) as catalog:
        before = catalog.revision()
        catalog.upgrade()
        after = catalog.revision()
    out.line(f"Version {after}; it was {before or 'none'}." if after != before else f"Already {after}.")
    return {"catalog": catalog.where, "before": before, "after": after}
