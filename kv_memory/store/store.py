"""Store: documents, passages and distilled caches of one collection, in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import exists, select

from kv_memory.config import check_keep_ratio
from kv_memory.errors import ConfigError, DocumentNotFoundError, StoreError, StorePermissionError
from kv_memory.fingerprint import Fingerprint
from kv_memory.store import catalog as catalogs
from kv_memory.store import documents, upkeep
from kv_memory.store.blobs import DiskBlobs, check_folder
from kv_memory.store.catalog import Catalog
from kv_memory.store.faults import mapped
from kv_memory.store.records import (
    CacheInfo,
    CheckReport,
    DocumentRecord,
    DocumentSummary,
    GcReport,
    StoredPassage,
    StoreStats,
)
from kv_memory.store.schema import CacheRow, CollectionRow, DocumentRow, PassageRow
from kv_memory.store.shelf import Shelf, cache_info
from kv_memory.store.vault import Vault

if TYPE_CHECKING:
    from kv_memory.cache import DistilledCache  # imports torch: where no cache is read, listing stays quick

__all__ = ["Store"]

_CATALOG = "catalog.sqlite"


class Store:
    """One collection in a store's folder. Thread-safe, and several processes may use one folder.

    The folder holds `catalog.sqlite`, `blobs/` and `quarantine/`. It must be on a local disk: SQLite's write-ahead
    log does not work over network file systems. Every method may raise the `StoreError` subclasses for a full disk, a
    forbidden folder and a catalog locked for longer than 30 s.

    Make one with `Store.open`.
    """

    def __init__(self, path: Path, collection: str, catalog: Catalog, blobs: DiskBlobs, collection_id: int) -> None:
        self.path = path
        self.collection = collection
        self._catalog = catalog
        self._blobs = blobs
        self._collection_id = collection_id
        self._quarantine = path / "quarantine"
        self._vault = Vault(blobs, self._quarantine)
        self._owns_connections = True
        self._shelf = Shelf(catalog, self._vault, collection_id)

    @classmethod
    def open(cls, path: Path | str, *, collection: str = "default", create: bool = True) -> Store:
        """Open the store in a folder, upgrading an old one.

        Args:
            path: The folder.
            collection: The tenant whose documents and caches are seen.
            create: Make folder and collection if they are not there.

        Raises:
            StoreError: There is no store or no such collection, and `create` is off; or the folder holds something
                else.
            StoreVersionError: A newer version of this package wrote it. Nothing was changed.
            StorePermissionError: The folder may not be read and written.
        """
        folder = Path(os.path.abspath(Path(path).expanduser()))
        _check_name(collection)
        check_folder(folder)
        with mapped(folder):
            if not create and not (folder / _CATALOG).is_file():
                raise StoreError(
                    "there is no store in this folder",
                    where=str(folder),
                    next_step="Make one with `kv-memory add FILE`, or name its folder with `--store`.",
                )
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_access(folder)
            for name in ("blobs", "quarantine"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
        catalog = Catalog(folder / _CATALOG, busy_timeout_s=catalogs.BUSY_TIMEOUT_S)
        try:
            collection_id = _find_collection(catalog, collection, create=create)
        except BaseException:
            catalog.close()
            raise
        blobs = DiskBlobs(folder / "blobs", timeout_s=catalogs.BUSY_TIMEOUT_S)
        return cls(folder, collection, catalog, blobs, collection_id)

    def in_collection(self, collection: str, *, create: bool = True) -> Store:
        """Another collection of this folder, over the same connections; unusable once this store is closed.

        Args:
            collection: Its name.
            create: Make it if it is not there.

        Raises:
            StoreError: There is no such collection, and `create` is off.
        """
        _check_name(collection)
        collection_id = _find_collection(self._catalog, collection, create=create)
        store = Store(self.path, collection, self._catalog, self._blobs, collection_id)
        store._owns_connections = False
        return store

    def close(self) -> None:
        """Write what is buffered and close the connections."""
        self._shelf.flush()
        if self._owns_connections:
            self._blobs.close()
            self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # the collection

    def settings(self) -> dict[str, Any]:
        """The collection's settings, as they were given to `update_settings`."""
        with self._catalog.read() as session:
            return dict(session.get_one(CollectionRow, self._collection_id).settings)

    def update_settings(self, values: Mapping[str, Any]) -> None:
        """Set some of the collection's settings; the others stay.

        Raises:
            ConfigError: A value is not what JSON can hold.
        """
        try:
            json.dumps(dict(values))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"settings must be what JSON can hold: {error}", where="settings") from error
        with self._catalog.write() as session:
            row = session.get_one(CollectionRow, self._collection_id)
            row.settings = {**row.settings, **values}

    @property
    def revision(self) -> int:
        """Grows whenever a document is put or deleted; what is derived from the passages is keyed by it."""
        with self._catalog.read() as session:
            return session.get_one(CollectionRow, self._collection_id).revision

    # documents

    def put_document(self, record: DocumentRecord) -> None:
        """Insert a document, or replace the one of the same id, in one transaction.

        Caches of texts that only its previous version had are retired. Caches that wait for a document, put by an
        `add` still running, are not touched.

        Raises:
            ConfigError: The metadata is not what JSON can hold.
            EncodingError: A text cannot be written as UTF-8.
        """
        with self._catalog.write() as session:
            dropped = documents.write_document(session, self._collection_id, record)
            keys = self._shelf.retire(session, dropped)
            documents.bump_revision(session, self._collection_id)
        self._shelf.sweep(keys)

    def delete_document(self, id: str) -> None:
        """Delete a document, its passages, and the caches that no other document's text needs.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self._catalog.write() as session:
            dropped = documents.delete_document(session, self._collection_id, id)
            keys = self._shelf.retire(session, dropped)
            documents.bump_revision(session, self._collection_id)
        self._shelf.sweep(keys)

    def document(self, id: str) -> DocumentRecord:
        """A document with its passages.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self._catalog.read() as session:
            return documents.load_document(session, self._collection_id, id)

    def documents(self) -> list[DocumentSummary]:
        """All documents without their text, ordered by id."""
        with self._catalog.read() as session:
            return documents.list_documents(session, self._collection_id)

    def has_document(self, id: str) -> bool:
        """Whether the collection has a document of this id."""
        with self._catalog.read() as session:
            try:
                documents.find_document(session, self._collection_id, id)
            except DocumentNotFoundError:
                return False
            return True

    def passages(self) -> list[StoredPassage]:
        """All passages, ordered by document id and ordinal."""
        with self._catalog.read() as session:
            return documents.stored_passages(session, documents.select_passages(self._collection_id))

    def passage(self, document_id: str, ordinal: int) -> StoredPassage:
        """One passage.

        Raises:
            DocumentNotFoundError: The collection has no such document, or the document has fewer passages.
        """
        with self._catalog.read() as session:
            documents.find_document(session, self._collection_id, document_id)
            found = documents.stored_passages(
                session,
                documents.select_passages(self._collection_id).where(
                    DocumentRow.document_id == document_id, PassageRow.ordinal == ordinal
                ),
            )
        if not found:
            raise DocumentNotFoundError(
                f"document {document_id!r} has no passage {ordinal}",
                where=document_id,
                next_step="Passages are counted from 0; `kv-memory list` shows how many there are.",
            )
        return found[0]

    def text(self, text_sha256: str) -> str | None:
        """The passage text of this SHA-256 hex digest; None if no passage of the collection has it."""
        with self._catalog.read() as session:
            return session.scalar(
                select(PassageRow.text)
                .join(DocumentRow, DocumentRow.id == PassageRow.document_pk)
                .where(DocumentRow.collection_id == self._collection_id, PassageRow.text_sha256 == text_sha256)
                .limit(1)
            )

    # caches

    def warm(self) -> None:
        """Do now what the first `get` would do: a process that answers questions does this while it loads its model."""
        self._blobs.warm()
        self._shelf.warm()

    def put(self, text_sha256: str, cache: DistilledCache, *, fidelity: float | None = None) -> CacheInfo:
        """Store a distilled cache: the blob first, then its row. Both are durable when this returns.

        The text need not be in a document yet. If there is a sound cache of this text, fingerprint and keep ratio
        already, it stays and its row is returned.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text it was made from.
            cache: What to store.
            fidelity: Last held-out probe KL in nats; the cache's own if None.

        Raises:
            StoreFullError: No space left; nothing of this cache is kept, everything else is untouched.
        """
        return self._shelf.put(text_sha256, cache, fidelity=fidelity)

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> DistilledCache:
        """A distilled cache, its tensors mapped from the file.

        The file's SHA-256 is checked the first time this process reads it. The tensors stay valid when the cache is
        deleted later. The time of use is written when the store is closed, or after a few hundred uses.

        Raises:
            CacheNotFoundError: No cache of this text at this keep ratio; names the keep ratios there are.
            FingerprintMismatchError: There is one, made by something else; names what differs.
            CorruptCacheError: The bytes are damaged. They are quarantined, and `missing` lists the passage again.
        """
        return self._shelf.get(text_sha256, fingerprint, keep_ratio)

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> bool:
        """Whether the catalog has such a cache. The blob is not looked at."""
        return self._shelf.has(text_sha256, fingerprint, keep_ratio)

    def missing(self, fingerprint: Fingerprint, keep_ratio: float) -> list[StoredPassage]:
        """The passages without a cache under these settings, ordered by document id and ordinal."""
        cached = exists().where(
            CacheRow.collection_id == self._collection_id,
            CacheRow.text_sha256 == PassageRow.text_sha256,
            CacheRow.fingerprint == fingerprint.digest,
            CacheRow.keep_ratio == check_keep_ratio(keep_ratio),
        )
        with self._catalog.read() as session:
            return documents.stored_passages(session, documents.select_passages(self._collection_id).where(~cached))

    def delete(
        self, text_sha256: str, *, fingerprint: Fingerprint | None = None, keep_ratio: float | None = None
    ) -> int:
        """Delete a text's caches, all or those under the given settings; returns how many there were."""
        return self._shelf.delete(text_sha256, fingerprint=fingerprint, keep_ratio=keep_ratio)

    def caches(self, document_id: str | None = None) -> list[CacheInfo]:
        """The rows of all caches of the collection, or of one document's passages, oldest first.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        statement = select(CacheRow).where(CacheRow.collection_id == self._collection_id).order_by(CacheRow.id)
        with self._catalog.read() as session:
            if document_id is not None:
                row = documents.find_document(session, self._collection_id, document_id)
                texts = select(PassageRow.text_sha256).where(PassageRow.document_pk == row.id)
                statement = statement.where(CacheRow.text_sha256.in_(texts))
            return [cache_info(row) for row in session.scalars(statement)]

    def put_prefix(self, key: str, data: bytes) -> None:
        """Store the cache of a shared prefix, as safetensors bytes, replacing what is under the key."""
        self._shelf.put_prefix(key, data)

    def get_prefix(self, key: str) -> Path | None:
        """The safetensors file of a shared prefix, checked like a cache; None if there is none under the key.

        Raises:
            CorruptCacheError: The bytes are damaged. They are quarantined; the next call returns None.
        """
        return self._shelf.get_prefix(key)

    # upkeep

    def check(self) -> CheckReport:
        """Hash every blob of the folder and compare it with its row. Only damaged blobs are changed: quarantined."""
        return upkeep.check(self._catalog, self._vault, self._shelf, self._collection_id)

    def gc(self) -> GcReport:
        """Remove blobs without a row, rows without a blob, leftovers of crashes, and unreferenced caches.

        The first three in the whole folder, unreferenced caches in this collection only. Do not run it while an
        `add` is running on the collection: the caches it has made so far are not referred to yet.
        """
        return upkeep.gc(self._catalog, self._vault, self._collection_id)

    def stats(self) -> StoreStats:
        """Counts of the collection and the size of the folder, in bytes."""
        return upkeep.count(self._catalog, self.path, self._quarantine, self._collection_id)


def _check_name(collection: str) -> None:
    if not isinstance(collection, str) or not 0 < len(collection) <= 255:
        raise ConfigError(f"a collection's name has 1 to 255 characters, got {collection!r}", where="collection")


def _check_access(folder: Path) -> None:
    # Asked first, because SQLite's own answer for a forbidden folder comes late and says "unable to open".
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise StorePermissionError(
            "the store's folder may not be read and written",
            where=str(folder),
            next_step="Give your user read and write permission on it, or open a store somewhere else.",
        )


def _find_collection(catalog: Catalog, name: str, *, create: bool) -> int:
    wanted = select(CollectionRow.id).where(CollectionRow.name == name)
    with catalog.read() as session:
        found = session.scalar(wanted)
        names = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
    if found is not None:
        return found
    if not create:
        raise StoreError(
            f"the store has no collection {name!r}; it has {', '.join(names) or 'none'}",
            where=str(catalog.file),
            next_step="Name one of those, or make it by adding a document to it.",
        )
    with catalog.write() as session:
        found = session.scalar(wanted)  # another process may have made it since
        if found is None:
            row = CollectionRow(name=name, settings={})
            session.add(row)
            session.flush()
            found = row.id
        return found
