"""Opens a store: its folder, catalog, blobs and collection, all or nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from kv_memory.errors import ConfigError, StoreError, StorePermissionError
from kv_memory.store.blobs.local import DiskBlobs, check_folder
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import private_folder
from kv_memory.store.location import find_place, write_place
from kv_memory.store.sql import catalog as catalogs
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.locks import FileLocks
from kv_memory.store.sql.schema import CollectionRow

__all__ = ["StoreParts", "catalog_of", "find_collection", "open_parts"]

_CATALOG = "catalog.sqlite"


@dataclass(frozen=True, kw_only=True)
class StoreParts:
    """Components of a `Store`.

    Attributes:
        folder: Folder of the store.
        catalog: Database of the store.
        blobs: Blobs on disk or in an object store.
        readers: Locks that mark which blobs are being read on this machine.
        collection_id: Catalog row of the collection.
    """

    folder: Path
    catalog: Catalog
    blobs: DiskBlobs | ObjectBlobs
    readers: FileLocks
    collection_id: int


def open_parts(
    path: Path | str,
    *,
    collection: str,
    create: bool,
    catalog: str | None,
    blobs: str | None,
    tier_size_bytes: int | None,
) -> StoreParts:
    """Open the components of a store; arguments and errors are those of `Store.open`."""
    folder = Path(os.path.abspath(Path(path).expanduser()))
    _check_name(collection)
    check_folder(folder)
    with mapped(folder):
        there = any((folder / name).is_file() for name in (_CATALOG, "store.json"))
        if not create:
            _check_there(folder)
        private_folder(folder)
        _check_access(folder)
        for name in ("blobs", "quarantine"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
    place = find_place(folder, catalog=catalog, blobs=blobs, tier_size_bytes=tier_size_bytes, new=not there)
    disk = DiskBlobs(
        folder / "blobs",
        timeout_s=catalogs.BUSY_TIMEOUT_S,
        size_limit=None if place.blobs is None else place.tier_size_bytes,
    )
    kept: DiskBlobs | ObjectBlobs = disk if place.blobs is None else ObjectBlobs(place.blobs, disk)
    # Others may be using a shared catalog with the version that wrote it: they decide when it is upgraded.
    opened = Catalog(
        place.catalog or folder / _CATALOG, busy_timeout_s=catalogs.BUSY_TIMEOUT_S, upgrade=place.catalog is None
    )
    try:
        collection_id = find_collection(opened, collection, create=create)
        write_place(folder, place)
    except BaseException:
        opened.close()
        raise
    return StoreParts(
        folder=folder,
        catalog=opened,
        blobs=kept,
        readers=FileLocks(folder / "locks"),
        collection_id=collection_id,
    )


def catalog_of(path: Path | str) -> Path | str:
    """Location of the catalog of a store's folder, for `Catalog`; nothing is opened.

    Raises:
        StoreError: The folder has no store.
    """
    folder = Path(os.path.abspath(Path(path).expanduser()))
    _check_there(folder)
    place = find_place(folder, catalog=None, blobs=None, tier_size_bytes=None, new=False)
    return place.catalog or folder / _CATALOG


def _check_there(folder: Path) -> None:
    if not any((folder / name).is_file() for name in (_CATALOG, "store.json")):
        raise StoreError(
            "there is no store in this folder",
            where=str(folder),
            next_step="Create one with `kv-memory add FILE`, or give the folder of a store with `--store`.",
        )


def _check_name(collection: str) -> None:
    if not isinstance(collection, str) or not 0 < len(collection) <= 255:
        raise ConfigError(f"a collection name must have 1 to 255 characters, got {collection!r}", where="collection")


def _check_access(folder: Path) -> None:
    # Checked first, because SQLite's own error for a forbidden folder comes late and says "unable to open".
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StorePermissionError(
            "no permission to read and write the store's folder",
            where=str(folder),
            next_step="Give your user read and write permission on it, or open a store somewhere else.",
        )


def find_collection(catalog: Catalog, name: str, *, create: bool) -> int:
    """The id of a collection's row; a missing one is created if `create` is on. Errors as in `Store.in_collection`."""
    _check_name(name)
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
