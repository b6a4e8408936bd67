"""Copies a collection into another one, between any two kinds of store.

A blob is copied byte for byte, before its row, and a document after its caches. An interrupted copy therefore leaves
only whole documents and caches, and the next one skips them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from kv_memory.config import check_choice
from kv_memory.errors import CorruptCacheError, DocumentNotFoundError, TransferError
from kv_memory.model.embedded import recorded_settings
from kv_memory.store.documents import alive
from kv_memory.store.error_mapping import mapped
from kv_memory.store.records import CacheInfo, DocumentRecord
from kv_memory.store.sql.schema import CacheRow, CollectionRow, DocumentRow, FingerprintRow, PrefixRow, utc_now
from kv_memory.store.store import Store

__all__ = ["CopyReport", "OnConflict", "TransferProgress", "copy_collection"]

OnConflict = Literal["refuse", "skip", "replace"]
_TRIES = 10  # of a document that changes while it is copied
_PAGE = 500  # document ids


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """Progress of a copy, an export or an import.

    Attributes:
        step: Present step. An export copies, then packs; an import unpacks, verifies, then copies.
        n_documents: Number of documents copied.
        size_bytes: Number of bytes done in this step.
        size_bytes_total: Estimated number of bytes of this step; 0 if it is unknown.
    """

    step: Literal["copy", "pack", "unpack", "verify"]
    n_documents: int = 0
    size_bytes: int = 0
    size_bytes_total: int = 0


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """Result of `copy_collection` and `import_archive`.

    Attributes:
        collection: Name of the collection that was copied into.
        n_documents: Number of documents in the source.
        n_added: Number of new documents.
        n_replaced: Number of documents that replaced others with their id.
        n_unchanged: Number of documents that existed already, with the same text.
        conflicts: Ids of documents that exist with other text, and were left unchanged.
        n_caches: Number of new distilled caches.
        n_caches_present: Number of distilled caches that existed already.
        n_caches_left_out: Number of distilled caches that have expired, or belong to documents that were left out.
        n_evicted: Number of caches evicted to stay within size limits.
        size_bytes: Size of the stored blobs in bytes.
        damaged: Keys of blobs that were found damaged or missing in the source, and were not copied.
    """

    collection: str
    n_documents: int
    n_added: int
    n_replaced: int
    n_unchanged: int
    conflicts: tuple[str, ...]
    n_caches: int
    n_caches_present: int
    n_caches_left_out: int
    n_evicted: int
    size_bytes: int
    damaged: tuple[str, ...]


def copy_collection(
    source: Store,
    target: Store,
    *,
    on_conflict: OnConflict = "refuse",
    on_progress: Callable[[TransferProgress], None] | None = None,
) -> CopyReport:
    """Copy documents, caches, prefixes and settings of one collection into another. Limits are not copied.

    Existing data is skipped, so an interrupted copy is resumed by running it again. Documents may be added to the
    source meanwhile.

    Args:
        source: Collection to copy.
        target: Collection to copy into; it may have documents.
        on_conflict: Action for existing documents with other text: `refuse` the whole copy, `skip` them, or `replace`
            them. `replace` also replaces documents with equal text but other metadata, source or passage length.
        on_progress: Callback, called after every cache and document.

    Raises:
        TransferError: The target has documents under other settings; a document is in conflict; or a document changes
            as fast as it is copied.
        StoreFullError: No space left. Data copied before stays.
    """
    check_choice(on_conflict, OnConflict, where="on_conflict")
    return _Copy(source, target, on_conflict, on_progress).run()


class _Copy:
    def __init__(
        self,
        source: Store,
        target: Store,
        on_conflict: OnConflict,
        on_progress: Callable[[TransferProgress], None] | None,
    ) -> None:
        self._source = source
        self._target = target
        self._on_conflict = on_conflict
        self._on_progress = on_progress
        self._counts: Counter[str] = Counter()
        self._conflicts: list[str] = []
        self._damaged: list[str] = []
        # Several documents may share a cache, which counts once: text, fingerprint, keep_ratio.
        self._taken: set[tuple[str, str, float]] = set()
        self._left_out: set[tuple[str, str, float]] = set()
        self._total_bytes = source.stats().cache_bytes
        limits = target.limits()
        self._is_bounded = limits.max_size_bytes is not None or limits.store_max_size_bytes is not None

    def run(self) -> CopyReport:
        self._copy_settings()
        if self._on_conflict == "refuse":
            # All of them first, so that a copy that would be refused halfway changes nothing.
            for document_id in _document_ids(self._source):
                with suppress(DocumentNotFoundError):  # deleted meanwhile
                    if self._target.has_document(document_id):
                        self._verdict(self._source.document(document_id))
        self._source.uses.flush()  # times of last use are copied too
        self._copy_prefixes()
        for document_id in _document_ids(self._source):
            self._copy_document(document_id)
            self._tell()
        return CopyReport(
            collection=self._target.collection,
            n_documents=self._counts["documents"],
            n_added=self._counts["add"],
            n_replaced=self._counts["replace"],
            n_unchanged=self._counts["same"],
            conflicts=tuple(self._conflicts),
            n_caches=self._counts["caches"],
            n_caches_present=self._counts["caches present"],
            n_caches_left_out=len(self._left_out - self._taken),
            n_evicted=self._counts["evicted"],
            size_bytes=self._counts["bytes"],
            damaged=tuple(self._damaged),
        )

    def _tell(self) -> None:
        if self._on_progress is not None:
            n_documents, size_bytes = self._counts["documents"], self._counts["bytes done"]
            total = max(size_bytes, self._total_bytes)
            self._on_progress(
                TransferProgress(step="copy", n_documents=n_documents, size_bytes=size_bytes, size_bytes_total=total)
            )

    # settings and prefixes

    def _copy_settings(self) -> None:
        theirs = recorded_settings(self._source.settings())
        with self._target.catalog.write() as session:
            row = session.get_one(CollectionRow, self._target.collection_id)
            ours = recorded_settings(row.settings)
            if ours == theirs:
                return
            documents = select(DocumentRow.id).where(DocumentRow.collection_id == self._target.collection_id)
            if session.scalar(documents.limit(1)) is None:
                row.settings = theirs
                return
        names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        told = "; ".join(f"{n} is {_short(theirs.get(n))} there, {_short(ours.get(n))} here" for n in names)
        raise TransferError(
            f"the collection has documents with other settings: {told}",
            where=f"collection {self._target.collection!r}",
            next_step="Import into a new collection (`--collection NAME`).",
        )

    def _copy_prefixes(self) -> None:
        keys = select(PrefixRow.key, PrefixRow.blob_key).where(PrefixRow.collection_id == self._source.collection_id)
        with self._source.catalog.read() as session:
            found = session.execute(keys).all()
        for key, blob_key in found:
            if self._sound_prefix(self._target, key) is not None:
                continue
            if (data := self._sound_prefix(self._source, key)) is None:
                self._damaged.append(blob_key)
            else:
                self._target.put_prefix(key, data)

    def _sound_prefix(self, store: Store, key: str) -> bytes | None:
        try:
            path = store.get_prefix(key)
        except CorruptCacheError:  # and quarantined
            return None
        with mapped(store.path):
            return None if path is None else path.read_bytes()

    # documents

    def _copy_document(self, document_id: str) -> None:
        for _ in range(_TRIES):
            try:
                record = self._source.document(document_id)
                verdict = self._verdict(record)
                whole = self._copy_caches(self._source.caches(document_id), leave=verdict == "leave")
                whole &= self._source.document(document_id).updated_at == record.updated_at
            except DocumentNotFoundError:
                return  # deleted meanwhile
            if whole:
                break
        else:
            raise TransferError(
                "the document changes as fast as it is copied",
                where=f"document {document_id!r}",
                next_step="Run the same command again when the store changes less.",
            )
        self._counts.update({"documents": 1, verdict: 1})
        if verdict in {"add", "replace"}:
            self._target.put_document(record)
        elif verdict == "leave":
            self._conflicts.append(document_id)

    def _verdict(self, new: DocumentRecord) -> Literal["add", "replace", "same", "leave"]:
        try:
            old = self._target.document(new.id)
        except DocumentNotFoundError:
            return "add"
        texts = [[passage.text_sha256 for passage in record.passages] for record in (old, new)]
        if old.content_sha256 == new.content_sha256 and texts[0] == texts[1]:
            facts = [(record.source_uri, record.metadata, record.passage_tokens) for record in (old, new)]
            return "replace" if self._on_conflict == "replace" and facts[0] != facts[1] else "same"
        if self._on_conflict == "refuse":
            raise TransferError(
                "the collection has a document with this id and another text",
                where=f"document {new.id!r}",
                next_step="Choose which one to keep with --on-conflict skip or --on-conflict replace, or import into "
                "another collection.",
            )
        return "replace" if self._on_conflict == "replace" else "leave"

    # caches

    def _copy_caches(self, caches: list[CacheInfo], *, leave: bool) -> bool:
        """Copy a document's caches; False if one vanished meanwhile, so that the document must be looked up again."""
        now = utc_now()
        for info in caches:
            key = info.text_sha256, info.fingerprint, info.keep_ratio
            if leave or (info.expires_at is not None and info.expires_at <= now):
                self._left_out.add(key)
            elif key not in self._taken:
                if self._has(info):
                    self._counts["caches present"] += 1
                elif (found := self._blob(info)) is not None:
                    self._put(info, *found)
                elif info.blob_key not in self._damaged:
                    return False
                self._taken.add(key)
                self._counts["bytes done"] += info.size_bytes
                self._tell()
        return True

    def _has(self, info: CacheInfo) -> bool:
        """Whether the target has a sound cache of this text, fingerprint and keep ratio."""
        with self._target.catalog.read() as session:
            row = session.scalar(select(CacheRow).where(self._same(info), alive(utc_now())))
        return row is not None and self._target.references.sound(row.blob_key, row.size_bytes)

    def _same(self, info: CacheInfo) -> ColumnElement[bool]:
        return (
            (CacheRow.collection_id == self._target.collection_id)
            & (CacheRow.text_sha256 == info.text_sha256)
            & (CacheRow.fingerprint == info.fingerprint)
            & (CacheRow.keep_ratio == info.keep_ratio)
        )

    def _blob(self, info: CacheInfo) -> tuple[bytes, str] | None:
        """A verified blob and its fingerprint in full; None if the cache is gone, or was damaged and is quarantined."""
        references = self._source.references
        with self._source.catalog.read() as session:
            fingerprint = session.get(FingerprintRow, info.fingerprint)
        with mapped(f"blob {info.blob_key}"):
            try:
                data = references.verified_path(info.blob_key, info.size_bytes).read_bytes()
            except (CorruptCacheError, FileNotFoundError):
                if references.quarantine_if_damaged(info.blob_key, info.size_bytes):
                    self._damaged.append(info.blob_key)
                return None
        return None if fingerprint is None else (data, fingerprint.json)

    def _put(self, info: CacheInfo, data: bytes, fingerprint: str) -> None:
        """Store a blob, then its row with all dates, pins and fidelity; replaces an expired or damaged cache."""

        def add_row(session: Session, key: str) -> set[str]:
            if session.get(FingerprintRow, info.fingerprint) is None:
                session.add(FingerprintRow(digest=info.fingerprint, json=fingerprint))
                session.flush()
            gone = set(session.scalars(delete(CacheRow).where(self._same(info)).returning(CacheRow.blob_key)))
            session.add(CacheRow(collection_id=self._target.collection_id, **vars(info)))
            return gone - {key}

        self._target.references.put(data, add_row)
        self._counts.update({"caches": 1, "bytes": len(data)})
        if self._is_bounded:
            self._counts["evicted"] += self._target.make_room()


def _document_ids(store: Store) -> Iterator[str]:
    """The ids of a collection's documents in order, in pages, because there may be millions."""
    ids = select(DocumentRow.document_id).where(DocumentRow.collection_id == store.collection_id)
    ids = ids.order_by(DocumentRow.document_id).limit(_PAGE)
    page = ids
    while True:
        with store.catalog.read() as session:
            found = session.scalars(page).all()
        if not found:
            return
        yield from found
        page = ids.where(DocumentRow.document_id > found[-1])


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
