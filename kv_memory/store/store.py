"""Store: documents, passages and distilled caches of one collection."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from sqlalchemy import select

from kv_memory.config import check_name
from kv_memory.errors import StoreError
from kv_memory.store import maintenance, purge
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.caches import Caches
from kv_memory.store.location import CATALOG_FILE, find_place, prepare_folder, write_place
from kv_memory.store.records import CheckReport, GcReport, PurgeReport, StoreStats
from kv_memory.store.sql import engine
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CollectionRow


class Store(Caches):
    """One collection of a store. Thread-safe, and several processes may use one store.

    A store is named by its folder, which holds `catalog.sqlite`, `blobs/` and `quarantine/`. It must be on a local
    disk, because SQLite's write-ahead log does not work over network file systems. A store that many machines share
    has its catalog in PostgreSQL and its blobs in an object store. Each machine then has a folder: `store.json` in it
    names both places, and `blobs/` holds copies of the blobs in use.

    Every method may raise the `StoreError` subclasses for a full disk, a forbidden folder, a catalog locked for
    longer than 30 s, and a server that does not answer.

    Create one with `Store.open`.
    """

    _owns_connections = True

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        collection: str = "default",
        create: bool = True,
        catalog: str | None = None,
        blobs: str | None = None,
        tier_size_bytes: int | None = None,
        durable: bool = True,
    ) -> Store:
        """Open the store in a folder, and upgrade an old one.

        Args:
            path: Folder of the store.
            collection: Name of the collection (tenant); the store shows only its documents and caches.
            create: Whether to create a missing folder or collection.
            catalog: Database URL for a new store: `postgresql+psycopg://USER@HOST/DATABASE`, with `?schema=NAME` for
                a schema other than `kv_memory`. None keeps the catalog in the folder. Put passwords into `~/.pgpass`
                or `PGPASSWORD`: the URL is written to `store.json`, readable by its owner.
            blobs: Object store URL for a new store: `s3://BUCKET/PREFIX`, `gs://...`, `az://...` or `file:///FOLDER`.
                Credentials come from the environment. None keeps the blobs in the folder.
            tier_size_bytes: Size limit in bytes for local copies of an object store's blobs; 20 GB unless set.
            durable: Whether written data survives a power cut. Turn it off only for a temporary store, whose folder
                then takes no sync at all.

        Raises:
            ConfigError: `catalog` or `blobs` is not a valid URL, or not the one of the existing store.
            StoreError: The store or collection does not exist and `create` is off; the folder holds something else, or
                is not readable and writable; a newer version of this package wrote the store, or an older version wrote
                a shared catalog, which `kv-memory db upgrade` upgrades. Nothing was changed.
            StoreConnectionError: The database or the object store does not answer.
        """
        folder = prepare_folder(path, create=create)
        place = find_place(folder, catalog=catalog, blobs=blobs, tier_size_bytes=tier_size_bytes)
        disk = DiskBlobs(
            folder / "blobs",
            timeout_s=engine.BUSY_TIMEOUT_S,
            size_limit=None if place.blobs is None else place.tier_size_bytes,
            durable=durable,
        )
        kept = disk if place.blobs is None else ObjectBlobs(place.blobs, disk)
        # Others may be using a shared catalog with the version that wrote it: they decide when it is upgraded.
        opened = Catalog(place.catalog or folder / CATALOG_FILE, durable=durable)
        try:
            opened.upgrade(allowed=place.catalog is None)
            collection_id = _find_collection(opened, collection, create=create)
            write_place(folder, place)
        except BaseException:
            opened.close()
            raise
        references = BlobReferences(opened, kept, folder / "quarantine")
        return cls(folder, collection, collection_id, references)

    def in_collection(self, collection: str, *, create: bool = True) -> Store:
        """Another collection of this store over the same connections; it becomes unusable when this store is closed.

        Args:
            collection: Name of the collection.
            create: Whether to create a missing collection.

        Raises:
            StoreError: The collection does not exist and `create` is off.
        """
        collection_id = _find_collection(self.catalog, collection, create=create)
        store = Store(self.path, collection, collection_id, self.references)
        store._owns_connections = False
        store.uses = self.uses
        return store

    def collections(self) -> list[str]:
        """Names of all collections of this store, in alphabetical order."""
        with self.catalog.read() as session:
            return list(session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)))

    def close(self) -> None:
        """Write buffered data and close the connections."""
        self.uses.flush()
        if self._owns_connections:
            self.references.blobs.close()
            self.catalog.close()

    @property
    def blobs_url(self) -> str:
        """URL of the object store, or path of the folder, that holds the blobs."""
        return self.references.blobs.where

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def purge(self, *ids: str) -> PurgeReport:
        """Delete documents so that no file of the store holds a byte of them or their caches any more.

        Unlike `delete_document` it also empties the quarantine, removes the collection's index until the next
        question, and rewrites the databases and truncates their logs (on PostgreSQL `VACUUM FULL`). Caches of equal
        texts in other collections stay. The ledger of jobs has ids of documents too: call
        `kv_memory.jobs.ledger.forget_documents` before, as `kv-memory remove --purge` does. Not reached are backups,
        the log of a PostgreSQL server, versions kept by a bucket, copies on other machines (purge there too, without
        an id), and the medium under the file system.

        Args:
            ids: Ids of documents. Without any, data of documents deleted earlier is purged.

        Raises:
            DocumentNotFoundError: The collection lacks one of the documents; none was deleted.
            StoreLockedError: Another process keeps reading a database. The documents are deleted; purge again without
                an id.
        """
        return purge.purge(self, ids)

    def check(self) -> CheckReport:
        """Hash every blob that a row names, and compare the row with the blob's header.

        Damaged blobs are quarantined and their rows deleted, and so are rows that name the blob of something else.
        Nothing else is changed.
        """
        return maintenance.check(self)

    def gc(self) -> GcReport:
        """Remove orphan blobs, rows without a blob, leftovers of crashes, expired caches and unreferenced caches.

        A blob or file younger than ten minutes may belong to a put in progress and stays. It covers the whole store,
        but unreferenced caches of this collection only. Do not run it during an `add` to the collection: the caches
        that `add` has made so far are not referred to yet.
        """
        return maintenance.gc(self)

    def stats(self) -> StoreStats:
        """Counts of the collection and the size of the folder, in bytes."""
        return maintenance.stats(self)


def _find_collection(catalog: Catalog, name: str, *, create: bool) -> int:
    """The id of a collection's row; a missing one is created if `create` is on. Errors as in `Store.in_collection`."""
    check_name(name, where="collection", most=255)
    wanted = select(CollectionRow.id).where(CollectionRow.name == name)
    with catalog.read() as session:
        found = session.scalar(wanted)
        names = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
    if found is not None:
        return found
    if not create:
        raise StoreError(
            f"the store has no collection {name!r}; it has {', '.join(names) or 'none'}",
            where=catalog.where,
            next_step="Use one of those, or create the collection by adding a document to it.",
        )
    with catalog.write() as session:
        found = session.scalar(wanted)  # another process may have created it since
        if found is None:
            row = CollectionRow(name=name, settings={})
            session.add(row)
            session.flush()
            found = row.id
        return found
