"""`kv-memory db`: where a store's catalog and blobs are, and which version its tables have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting
from kv_memory.cli.sizes import size_of

__all__ = ["current", "init", "upgrade"]


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
        from kv_memory.store.opening import catalog_of
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
        from kv_memory.store.opening import catalog_of
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
