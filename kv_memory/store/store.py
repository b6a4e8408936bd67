"""Store: documents, passages and distilled caches of one collection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sqlalchemy import exists, select, update

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.config import StorageName, check_keep_ratio
from kv_memory.store import documents
from kv_memory.store import maintenance as upkeep
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.blobs.verified import Vault
from kv_memory.store.caches import Shelf, cache_info
from kv_memory.store.collection import Collection
from kv_memory.store.eviction import Limits, alive, read_limits, write_limits
from kv_memory.store.opening import StoreParts, find_collection, open_parts
from kv_memory.store.prefixes import Prefixes
from kv_memory.store.purge import PurgeReport, purge
from kv_memory.store.records import (
    CacheInfo,
    CheckReport,
    GcReport,
    StoredPassage,
    StoreStats,
)
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, PassageRow, utc_now
from kv_memory.store.stock import Stock
from kv_memory.store.transfer.archive_reader import ArchiveReader
from kv_memory.store.transfer.export import export_collection
from kv_memory.store.transfer.files import ExportReport, ImportReport, OnConflict, TransferProgress
from kv_memory.store.transfer.importer import import_collection

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: where no cache is read, listing stays quick

__all__ = ["Store"]


class Store(Collection):
    """One collection of a store. Thread-safe, and several processes may use one store.

    A store is named by its folder. That holds `catalog.sqlite`, `blobs/` and `quarantine/`, and must be on a local
    disk: SQLite's write-ahead log does not work over network file systems. A store that many machines share has its
    catalog in PostgreSQL and its blobs in an object store; then the folder, one on each machine, says where they are
    (`store.json`), and `blobs/` holds copies of those in use.

    Every method may raise the `StoreError` subclasses for a full disk, a forbidden folder, a catalog locked for longer
    than 30 s, and a server that does not answer.

    Make one with `Store.open`.
    """

    def __init__(self, parts: StoreParts, collection: str) -> None:
        self.collection = collection
        self._parts = parts
        self._blobs = parts.blobs
        self._quarantine = parts.folder / "quarantine"
        stock = Stock(parts.catalog, Vault(parts.blobs, self._quarantine))
        self._owns_connections = True
        self._prefixes = Prefixes(stock, parts.collection_id)
        shelf = Shelf(stock, parts.readers, parts.collection_id)
        super().__init__(parts.folder, parts.catalog, shelf, parts.collection_id)

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
    ) -> Store:
        """Open the store of a folder, upgrading an old one.

        Args:
            path: The folder.
            collection: The tenant whose documents and caches are seen.
            create: Make folder and collection if they are not there.
            catalog: For a new store: `postgresql+psycopg://USER@HOST/DATABASE`, `?schema=NAME` for another schema than
                `kv_memory`. None keeps it in the folder. Passwords are best left to `~/.pgpass` or `PGPASSWORD`: the
                URL is written down, for the owner to read.
            blobs: For a new store: `s3://BUCKET/PREFIX`, `gs://...`, `az://...` or `file:///FOLDER`; credentials come
                from the environment. None keeps them in the folder.
            tier_size_bytes: What copies of an object store's blobs may take in the folder; 20 GB unless set.

        Raises:
            ConfigError: `catalog` or `blobs` is not where the store is, or is no such URL.
            StoreError: There is no store or no such collection, and `create` is off; or the folder holds something
                else.
            StoreVersionError: A newer version of this package wrote it, or an older one wrote a shared catalog, which
                `kv-memory db upgrade` upgrades. Nothing was changed.
            StorePermissionError: The folder may not be read and written.
            StoreConnectionError: The database or the object store does not answer.
        """
        parts = open_parts(
            path,
            collection=collection,
            create=create,
            catalog=catalog,
            blobs=blobs,
            tier_size_bytes=tier_size_bytes,
        )
        return cls(parts, collection)

    def in_collection(self, collection: str, *, create: bool = True) -> Store:
        """Another collection of this folder, over the same connections; unusable once this store is closed.

        Args:
            collection: Its name.
            create: Make it if it is not there.

        Raises:
            StoreError: There is no such collection, and `create` is off.
        """
        collection_id = find_collection(self._catalog, collection, create=create)
        store = Store(replace(self._parts, collection_id=collection_id), collection)
        store._owns_connections = False
        return store

    def close(self) -> None:
        """Write what is buffered and close the connections."""
        self._shelf.uses.flush()
        if self._owns_connections:
            self._parts.readers.close()
            self._blobs.close()
            self._catalog.close()

    @property
    def blobs_url(self) -> str:
        """Where the blobs are: the URL of an object store, or the folder."""
        return self._blobs.url if isinstance(self._blobs, ObjectBlobs) else str(self._blobs.folder)

    @property
    def catalog(self) -> Catalog:
        """The database, for what keeps its own tables there: the ledger of jobs."""
        return self._catalog

    @property
    def collection_id(self) -> int:
        """The collection's row in the catalog."""
        return self._collection_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # caches

    def warm(self) -> None:
        """Do now what the first `get` would do: a process that answers questions does this while it loads its model."""
        self._blobs.warm()
        self._shelf.warm()

    def put(
        self,
        text_sha256: str,
        cache: DistilledCache,
        *,
        fidelity: float | None = None,
        storage: StorageName = "auto",
    ) -> CacheInfo:
        """Store a distilled cache: the blob first, then its row. Both are durable when this returns.

        The text need not be in a document yet. If there is a sound cache of this text, fingerprint and keep ratio
        already, it stays and its row is returned.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text it was made from.
            cache: What to store.
            fidelity: Last held-out probe KL in nats; the cache's own if None.
            storage: How keys and values are stored, see `DistilledCache.to_bytes`; `get` needs no word of it.

        Raises:
            ConfigError: The cache cannot be stored so.
            StoreFullError: No space left; nothing of this cache is kept, everything else is untouched.
        """
        return self._shelf.put(text_sha256, cache, fidelity=fidelity, storage=storage)

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> DistilledCache:
        """A distilled cache, its tensors mapped from the file.

        The file's SHA-256 is checked the first time this process reads it. The tensors stay valid when the cache is
        deleted later. The time of use is written when the store is closed, or after a few hundred uses.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text.
            fingerprint: What it was made under.
            keep_ratio: Of the cache; of a `Keep`, what it comes to for this text.

        Raises:
            CacheNotFoundError: No cache of this text at this keep ratio; names the keep ratios there are.
            FingerprintMismatchError: There is one, made by something else; names what differs.
            CorruptCacheError: The bytes are damaged. They are quarantined, and `missing` lists the passage again.
        """
        return self._shelf.get(text_sha256, fingerprint, self.keep_ratio_of(text_sha256, fingerprint, keep_ratio))

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether the catalog has such a cache. The blob is not looked at."""
        ratio = self.keep_ratio_of(text_sha256, fingerprint, keep_ratio)
        return ratio is not None and self._shelf.has(text_sha256, fingerprint, ratio)

    def sound(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether there is such a cache and its bytes are right. Nothing is quarantined: `get` and `check` do that."""
        ratio = self.keep_ratio_of(text_sha256, fingerprint, keep_ratio)
        return ratio is not None and self._shelf.sound(text_sha256, fingerprint, ratio)

    def keep_ratio_of(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> float | None:
        """The keep_ratio of a text's cache within a budget; None where no cache of it tells how long it is.

        Raises:
            BudgetError: The budget is too small for this text.
        """
        if not isinstance(keep, Keep):
            return keep
        if keep.keep_ratio is not None:
            return keep.keep_ratio
        n_tokens = self._shelf.n_tokens(text_sha256, fingerprint)
        return None if n_tokens is None else keep.ratio_for(n_tokens, fingerprint)

    def missing(self, fingerprint: Fingerprint, keep_ratio: float | Keep) -> list[StoredPassage]:
        """The passages without a cache under these settings, ordered by document id and ordinal."""
        within = keep_ratio if isinstance(keep_ratio, Keep) else Keep(keep_ratio=keep_ratio)
        caches = (
            CacheRow.collection_id == self._collection_id,
            CacheRow.fingerprint == fingerprint.digest,
            alive(utc_now()),
        )
        passages = documents.select_passages(self._collection_id)
        with self._catalog.read() as session:
            if within.keep_ratio is not None:
                same = exists().where(
                    *caches, CacheRow.text_sha256 == PassageRow.text_sha256, CacheRow.keep_ratio == within.keep_ratio
                )
                return documents.stored_passages(session, passages.where(~same))
            rows = session.execute(select(CacheRow.text_sha256, CacheRow.keep_ratio, CacheRow.n_tokens).where(*caches))
            cached = {key for key, ratio, n_tokens in rows if within.fits(ratio, n_tokens, fingerprint)}
            texts = set(session.scalars(passages.with_only_columns(PassageRow.text_sha256).order_by(None)))
            found = [
                passage
                for batch in documents.batches(sorted(texts - cached))
                for passage in documents.stored_passages(session, passages.where(PassageRow.text_sha256.in_(batch)))
            ]
            return sorted(found, key=lambda passage: (passage.document_id, passage.ordinal))

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

    def making(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> AbstractContextManager[bool]:
        """A context in which nobody else makes this cache: wait in it, ask `has` again, then compress and `put`.

        So a document that eight ask for at once is compressed once, whichever threads, processes and, with a catalog in
        PostgreSQL, machines they are. Whoever dies in it lets the next one in.
        """
        name = f"make {self._collection_id} {text_sha256} {fingerprint.digest} {check_keep_ratio(keep_ratio)!r}"
        return self._catalog.hold(name)

    # budgets

    def limits(self) -> Limits:
        """What bounds the collection and the store."""
        with self._catalog.read() as session:
            return read_limits(session, self._collection_id)

    def set_limits(self, limits: Limits) -> int:
        """Bound the collection and the store; what is too much by now goes at once, that used longest ago first.

        A cache's age is decided when it is put: a new `ttl_s` does not change those that are there.

        Returns:
            How many caches went.

        Raises:
            StoreFullError: What is pinned or being read is more than may be. The limits are set all the same.
        """
        with self._catalog.write() as session:
            write_limits(session, self._collection_id, limits)
        return self._shelf.make_room()

    def pin(self, document_id: str, *, pinned: bool = True) -> int:
        """Keep the caches that a document has now from being evicted, or let them be; they still expire.

        Returns:
            How many they are.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self._catalog.write() as session:
            row = documents.find_document(session, self._collection_id, document_id)
            texts = select(PassageRow.text_sha256).where(PassageRow.document_pk == row.id)
            changed = session.scalars(
                update(CacheRow)
                .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256.in_(texts))
                .values(pinned=pinned)
                .returning(CacheRow.id)
            ).all()
        return len(changed)

    # prefixes

    def put_prefix(self, key: str, data: bytes) -> None:
        """Store the cache of a shared prefix, as safetensors bytes, replacing what is under the key."""
        self._prefixes.put(key, data)

    def get_prefix(self, key: str) -> Path | None:
        """The safetensors file of a shared prefix, checked like a cache; None if there is none under the key.

        Raises:
            CorruptCacheError: The bytes are damaged. They are quarantined; the next call returns None.
        """
        return self._prefixes.get(key)

    # transfer

    def export_to(
        self, path: Path | str, *, on_progress: Callable[[TransferProgress], None] | None = None
    ) -> ExportReport:
        """Write the collection into one file: documents, caches, prefixes, settings, as they are.

        It is written beside the file, as `PATH.part`, and takes its name when it is complete. An interrupted export of
        a collection that has not changed since goes on where it stopped. Documents may be added meanwhile.

        Args:
            path: The file, or `-` for the standard output.
            on_progress: Called after every blob.

        Raises:
            TransferError: Another export writes the file, or its folder is not there.
            StoreFullError: No space left. What was written is gone on with the next time.
        """
        return export_collection(self._shelf, self._collection_id, path, on_progress)

    def import_from(
        self,
        source: Path | str | ArchiveReader,
        *,
        on_conflict: OnConflict = "refuse",
        on_progress: Callable[[TransferProgress], None] | None = None,
    ) -> ImportReport:
        """Read what `export_to` has written into this collection.

        A file is read through and verified before anything is changed; the standard input is verified as it comes. What
        is there already is skipped, so that an interrupted import is gone on with by doing it again. An archive says
        nothing of who wrote it: take one only from whom you would take a model.

        Args:
            source: The file, `-` for the standard input, or an archive from `open_archive`.
            on_conflict: What to do with documents that are there with other text: `refuse` the archive, `skip` them,
                or `replace` them.
            on_progress: Called after every blob.

        Raises:
            TransferError: The archive is damaged, not complete or of a newer format; the collection has documents and
                other settings; or a document is in conflict.
            StoreFullError: No space left. What was imported by then stays.
        """
        return import_collection(
            self._shelf,
            self._collection_id,
            source,
            on_conflict=on_conflict,
            on_progress=on_progress,
        )

    # upkeep

    def purge(self, *ids: str) -> PurgeReport:
        """Delete documents so that no file of the store holds a byte of them or their caches any more.

        Beyond what `delete_document` does: quarantine is emptied, the index of the collection removed until the next
        question, the ledger of jobs forgets the documents, and the databases are written anew with their logs cut off
        (on PostgreSQL `VACUUM FULL`). Caches of equal texts in other collections stay. Not reached are backups, the log
        of a PostgreSQL server, versions that a bucket keeps, what other machines have copies of (purge there too,
        without an id), and the medium under the file system.

        Args:
            ids: Of documents. Without any, what was deleted before is purged.

        Raises:
            DocumentNotFoundError: The collection has no such document; none was deleted.
            StoreLockedError: Something else reads a database all the time. The documents are deleted; purge again
                without an id.
        """
        return purge(
            self._shelf,
            self._collection_id,
            ids,
            folder=self.path,
            collection=self.collection,
        )

    def counters(self) -> dict[str, float]:
        """What this collection's caches were asked for since it was made; names and meanings in `counters.NAMES`.

        Written down as times of last use are: what other processes have not flushed yet is missing.
        """
        return self._shelf.uses.totals()

    def check(self) -> CheckReport:
        """Hash every blob of the folder and compare it with its row. Only damaged blobs are changed: quarantined."""
        return upkeep.check(self._shelf.stock, self._collection_id)

    def gc(self) -> GcReport:
        """Remove blobs without a row, rows without a blob, what crashes left, what expired, and unreferenced caches.

        All in the whole store, but unreferenced caches in this collection only. Do not run it while an
        `add` is running on the collection: the caches it has made so far are not referred to yet.
        """
        return upkeep.gc(self._shelf.stock, self._collection_id)

    def stats(self) -> StoreStats:
        """Counts of the collection and the size of the folder, in bytes."""
        return upkeep.count(self._catalog, self.path, self._quarantine, self._collection_id)
