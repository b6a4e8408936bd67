"""Store: documents, passages and distilled caches of one collection."""

from __future__ import annotations

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
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.blobs.verified import VerifiedBlobs
from kv_memory.store.caches import CacheTable, cache_info
from kv_memory.store.collection import Collection
from kv_memory.store.eviction import Limits, alive, read_limits, write_limits
from kv_memory.store.open_parts import StoreParts, find_collection, open_parts
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

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

__all__ = ["Store"]


class Store(Collection):
    """One collection of a store. Thread-safe, and several processes may use one store.

    A store is named by its folder, which holds `catalog.sqlite`, `blobs/` and `quarantine/`. It must be on a local
    disk, because SQLite's write-ahead log does not work over network file systems. A store that many machines share
    has its catalog in PostgreSQL and its blobs in an object store. Each machine then has a folder: `store.json` in it
    names both places, and `blobs/` holds copies of the blobs in use.

    Every method may raise the `StoreError` subclasses for a full disk, a forbidden folder, a catalog locked for
    longer than 30 s, and a server that does not answer.

    Create one with `Store.open`.
    """

    def __init__(self, parts: StoreParts, collection: str) -> None:
        self.collection = collection
        self._parts = parts
        self._blobs = parts.blobs
        self._quarantine = parts.folder / "quarantine"
        references = BlobReferences(parts.catalog, VerifiedBlobs(parts.blobs, self._quarantine))
        self._owns_connections = True
        self._prefixes = Prefixes(references, parts.collection_id)
        cache_table = CacheTable(references, parts.readers, parts.collection_id)
        super().__init__(parts.folder, parts.catalog, cache_table, parts.collection_id)

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

        Raises:
            ConfigError: `catalog` or `blobs` is not a valid URL, or not the one of the existing store.
            StoreError: The store or collection does not exist and `create` is off, or the folder holds something
                else.
            StoreVersionError: A newer version of this package wrote the store, or an older version wrote a shared
                catalog, which `kv-memory db upgrade` upgrades. Nothing was changed.
            StorePermissionError: The folder is not readable and writable.
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
        """Another collection of this store over the same connections; it becomes unusable when this store is closed.

        Args:
            collection: Name of the collection.
            create: Whether to create a missing collection.

        Raises:
            StoreError: The collection does not exist and `create` is off.
        """
        collection_id = find_collection(self._catalog, collection, create=create)
        store = Store(replace(self._parts, collection_id=collection_id), collection)
        store._owns_connections = False
        return store

    def close(self) -> None:
        """Write buffered data and close the connections."""
        self._cache_table.uses.flush()
        if self._owns_connections:
            self._parts.readers.close()
            self._blobs.close()
            self._catalog.close()

    @property
    def blobs_url(self) -> str:
        """URL of the object store, or path of the folder, that holds the blobs."""
        return self._blobs.url if isinstance(self._blobs, ObjectBlobs) else str(self._blobs.folder)

    @property
    def catalog(self) -> Catalog:
        """The database, for the job ledger, which keeps its own tables in it."""
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
        """Do the one-time work of the first `get` now, for a process that can do so while it loads its model."""
        self._blobs.warm()
        self._cache_table.warm()

    def put(
        self,
        text_sha256: str,
        cache: DistilledCache,
        *,
        fidelity: float | None = None,
        storage: StorageName = "auto",
    ) -> CacheInfo:
        """Store a distilled cache: the blob first, then its row. Both are durable when this returns.

        The text need not be in a document yet. If the collection already has a sound cache of this text, fingerprint
        and keep ratio, that cache stays and its row is returned.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text of the cache.
            cache: Cache to store.
            fidelity: Last held-out probe KL in nats; None takes the cache's own.
            storage: Number format of keys and values in the blob, see `DistilledCache.to_bytes`; `get` recognises it.

        Raises:
            ConfigError: The cache cannot be stored in this format.
            StoreFullError: No space left. Nothing of this cache is kept, and everything else is untouched.
        """
        return self._cache_table.put(text_sha256, cache, fidelity=fidelity, storage=storage)

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> DistilledCache:
        """A distilled cache, its tensors mapped from the file.

        The file's SHA-256 is checked the first time this process reads it. The tensors stay valid when the cache is
        deleted later. Times of last use are buffered, and written when the store is closed or 256 caches are in the
        buffer.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text.
            fingerprint: Fingerprint that the cache was made under.
            keep_ratio: Keep ratio of the cache, or a `Keep`, which gives the keep ratio for this text.

        Raises:
            CacheNotFoundError: The text has no cache at this keep ratio; the message names the keep ratios it has.
            FingerprintMismatchError: The cache was made under another fingerprint; the message names the differences.
            CorruptCacheError: The blob is damaged. It is quarantined, and `missing` lists the passage again.
            BudgetError: The budget of a `Keep` is too small for this text.
        """
        return self._cache_table.get(text_sha256, fingerprint, self.keep_ratio_of(text_sha256, fingerprint, keep_ratio))

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether the catalog has such a cache; the blob is not checked."""
        ratio = self.keep_ratio_of(text_sha256, fingerprint, keep_ratio)
        return ratio is not None and self._cache_table.has(text_sha256, fingerprint, ratio)

    def sound(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether such a cache exists with a sound blob; nothing is quarantined, which `get` and `check` do."""
        ratio = self.keep_ratio_of(text_sha256, fingerprint, keep_ratio)
        return ratio is not None and self._cache_table.sound(text_sha256, fingerprint, ratio)

    def keep_ratio_of(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> float | None:
        """The keep_ratio that `keep` gives for a text; None if that needs its length and no cache records it.

        Raises:
            BudgetError: The budget is too small for this text.
        """
        if not isinstance(keep, Keep):
            return keep
        if keep.keep_ratio is not None:
            return keep.keep_ratio
        n_tokens = self._cache_table.n_tokens(text_sha256, fingerprint)
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
        """Delete a text's caches, all of them or those under the given settings, and return their number."""
        return self._cache_table.delete(text_sha256, fingerprint=fingerprint, keep_ratio=keep_ratio)

    def caches(self, document_id: str | None = None) -> list[CacheInfo]:
        """Records of all caches of the collection, or of one document's passages, oldest first.

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
        """A lock on making this cache: wait for it by entering the context, call `has` again, then compress and `put`.

        A document that eight callers request at once is thus compressed once, across threads, processes and, with a
        catalog in PostgreSQL, machines. If the holder dies, the lock passes to the next one.
        """
        name = f"make {self._collection_id} {text_sha256} {fingerprint.digest} {check_keep_ratio(keep_ratio)!r}"
        return self._catalog.hold(name)

    # limits

    def limits(self) -> Limits:
        """Size and age limits of the collection and the store."""
        with self._catalog.read() as session:
            return read_limits(session, self._collection_id)

    def set_limits(self, limits: Limits) -> int:
        """Limit the collection and the store, and evict at once what exceeds the limits, least recently used first.

        A cache's expiry is fixed when it is put: a new `ttl_s` does not change existing caches.

        Returns:
            Number of evicted caches.

        Raises:
            StoreFullError: Pinned caches and caches being read exceed a limit. The limits are set nevertheless.
        """
        with self._catalog.write() as session:
            write_limits(session, self._collection_id, limits)
        return self._cache_table.make_room()

    def pin(self, document_id: str, *, pinned: bool = True) -> int:
        """Pin the caches that a document has now, so that they are not evicted, or unpin them; they still expire.

        Returns:
            Number of these caches.

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
        """Store the cache of a shared prefix, as safetensors bytes, replacing any under the same key."""
        self._prefixes.put(key, data)

    def get_prefix(self, key: str) -> Path | None:
        """The safetensors file of a shared prefix, checked like a cache; None if the key has no prefix.

        Raises:
            CorruptCacheError: The blob is damaged. It is quarantined, and the next call returns None.
        """
        return self._prefixes.get(key)

    # maintenance

    def purge(self, *ids: str) -> PurgeReport:
        """Delete documents so that no file of the store holds a byte of them or their caches any more.

        Unlike `delete_document` it also empties the quarantine, removes the collection's index until the next
        question, removes the documents from the job ledger, and rewrites the databases and truncates their logs (on
        PostgreSQL `VACUUM FULL`). Caches of equal texts in other collections stay. Not reached are backups, the log
        of a PostgreSQL server, versions kept by a bucket, copies on other machines (purge there too, without an id),
        and the medium under the file system.

        Args:
            ids: Ids of documents. Without any, data of documents deleted earlier is purged.

        Raises:
            DocumentNotFoundError: The collection lacks one of the documents; none was deleted.
            StoreLockedError: Another process keeps reading a database. The documents are deleted; purge again without
                an id.
        """
        return purge(
            self._cache_table,
            self._collection_id,
            ids,
            folder=self.path,
            collection=self.collection,
        )

    def counters(self) -> dict[str, float]:
        """Usage counters of this collection since it was created; `counters.NAMES` has names and meanings.

        Like times of last use they are written with a delay: counts that other processes have not flushed are
        missing.
        """
        return self._cache_table.uses.totals()

    def check(self) -> CheckReport:
        """Hash every blob that a row names, and compare the row with the blob's header.

        Damaged blobs are quarantined and their rows deleted, and so are rows that name the blob of something else.
        Nothing else is changed.
        """
        return upkeep.check(self._cache_table.references, self._collection_id)

    def gc(self) -> GcReport:
        """Remove orphan blobs, rows without a blob, leftovers of crashes, expired caches and unreferenced caches.

        It covers the whole store, but unreferenced caches of this collection only. Do not run it during an `add` to
        the collection: the caches that `add` has made so far are not referred to yet.
        """
        return upkeep.gc(self._cache_table.references, self._collection_id)

    def stats(self) -> StoreStats:
        """Counts of the collection and the size of the folder, in bytes."""
        return upkeep.count(self._catalog, self.path, self._quarantine, self._collection_id)
