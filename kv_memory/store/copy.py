"""Copies a collection into another one, between any two kinds of store.

A blob is copied byte for byte, before its row, and a document after its caches. An interrupted copy therefore leaves
only whole documents and caches, and the next one skips them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from kv_memory.config import check_choice
from kv_memory.errors import CorruptCacheError, DocumentNotFoundError, TransferError
from kv_memory.model.embedded import recorded_settings
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.error_mapping import mapped
from kv_memory.store.records import CacheInfo, CopyReport, DocumentRecord, TransferProgress
from kv_memory.store.sql.catalog import batches
from kv_memory.store.sql.schema import CacheRow, CollectionRow, DocumentRow, FingerprintRow, PrefixRow, utc_now
from kv_memory.store.store import Store

OnConflict = Literal["refuse", "skip", "replace"]
_TRIES = 10  # of a document that changes while it is copied
_PAGE = 500  # document ids
# Caches and documents stored together, whose bytes (unless they are linked) and characters are in memory meanwhile.
_MOST_AT_ONCE = 50  # of each
_MOST_BYTES = 32 * 2**20
_MOST_CHARACTERS = 2**18


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


_Key = tuple[str, str, float]  # text, fingerprint, keep_ratio


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
        # Several documents may share a cache, which counts once.
        self._taken: set[_Key] = set()
        self._left_out: set[_Key] = set()
        self._fingerprints: dict[str, str] = {}  # JSON by digest
        # Blobs are linked from or into a temporary store. Two lasting stores share no files: one may be the backup of
        # the other.
        lasting = source.catalog.durable and target.catalog.durable
        self._links = not lasting and isinstance(target.references.blobs, DiskBlobs)
        # Linked files of a lasting source may be removed at any time, so they are not kept waiting.
        self._waits = target.catalog.durable
        # To be stored: caches, each with its blob as bytes or as a file to link, and the documents after them.
        self._caches: list[tuple[CacheInfo, bytes | Path]] = []
        self._documents: list[DocumentRecord] = []
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
        self._store()
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
        for key, blob in found:
            if self._sound_prefix(self._target, key) is not None:
                continue
            if (data := self._sound_prefix(self._source, key)) is None:
                self._damaged.append(blob)
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
                whole = self._take_caches(self._source.caches(document_id), leave=verdict == "leave")
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
            self._documents.append(record)
            n_characters = sum(len(passage.text or "") for each in self._documents for passage in each.passages)
            full = len(self._documents) >= _MOST_AT_ONCE or n_characters > _MOST_CHARACTERS
            # A replaced document takes its old caches along, perhaps one that the next document needs.
            if full or verdict == "replace" or not self._waits:
                self._store()
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

    def _take_caches(self, caches: list[CacheInfo], *, leave: bool) -> bool:
        """Copy a document's caches; False if one vanished meanwhile, so that the document must be looked up again."""
        wanted: list[CacheInfo] = []
        for info in caches:
            if leave or _expired(info):
                self._left_out.add(_key(info))
            elif _key(info) not in self._taken:
                wanted.append(info)
        present = self._present(wanted)
        for info in wanted:
            if _key(info) in present:
                self._counts["caches present"] += 1
            elif (data := self._blob(info)) is not None:
                self._caches.append((info, data))
            elif info.blob_key not in self._damaged:
                return False
            self._taken.add(_key(info))
            self._counts["bytes done"] += info.size_bytes
            n_bytes = sum(len(data) for _, data in self._caches if isinstance(data, bytes))
            if (len(self._caches) >= _MOST_AT_ONCE or n_bytes > _MOST_BYTES) and not self._store():
                return False
            self._tell()
        return self._waits or self._store()

    def _present(self, infos: list[CacheInfo]) -> set[_Key]:
        """The caches that the target has already, and which are sound there."""
        present: set[_Key] = set()
        for texts in batches({info.text_sha256 for info in infos}):
            with self._target.catalog.read() as session:
                rows = [row for row in self._rows(session, texts) if not _expired(row)]
            sound = self._target.references.sound
            present |= {_key(row) for row in rows if sound(row.blob_key, row.size_bytes)}
        return present

    def _blob(self, info: CacheInfo) -> bytes | Path | None:
        """A verified blob; None if the cache is gone, or was damaged and is quarantined."""
        if info.fingerprint not in self._fingerprints:
            with self._source.catalog.read() as session:
                row = session.get(FingerprintRow, info.fingerprint)
            if row is None:
                return None
            self._fingerprints[info.fingerprint] = row.json
        references = self._source.references
        with mapped(f"blob {info.blob_key}"):
            try:
                # A copy is hashed again, because the file may have been hashed long ago.
                path = references.verified_path(info.blob_key, info.size_bytes, again=not self._links)
                return path if self._links else path.read_bytes()
            except (CorruptCacheError, FileNotFoundError):
                if references.verify(info, again=True) is not None:
                    self._damaged.append(info.blob_key)
                return None

    def _store(self) -> bool:
        """Store the waiting caches, then the documents; False if a blob of the source was removed meanwhile."""
        caches, self._caches = self._caches, []
        records, self._documents = self._documents, []
        try:
            if caches:
                blobs = {info.blob_key: data for info, data in caches}
                self._target.references.put_all(blobs, partial(self._add_rows, [info for info, _ in caches]))
        except CorruptCacheError:
            if self._waits:
                raise
            self._taken.difference_update(_key(info) for info, _ in caches)
            self._documents = records
            return False
        self._counts.update({"caches": len(caches), "bytes": sum(info.size_bytes for info, _ in caches)})
        for record in records:
            self._target.put_document(record)
        if self._is_bounded:
            self._counts["evicted"] += self._target.make_room()
        return True

    def _add_rows(self, infos: list[CacheInfo], session: Session) -> set[str]:
        """Write rows with all dates, pins and fidelity, in place of those of expired and damaged caches."""
        for digest in {info.fingerprint for info in infos}:
            if session.get(FingerprintRow, digest) is None:
                session.add(FingerprintRow(digest=digest, json=self._fingerprints[digest]))
        rows = self._rows(session, [info.text_sha256 for info in infos])
        replaced = [row for row in rows if _key(row) in {_key(info) for info in infos}]
        for row in replaced:
            session.delete(row)
        session.flush()  # the old rows first, because the new ones have their keys
        session.add_all(CacheRow(collection_id=self._target.collection_id, **vars(info)) for info in infos)
        return {row.blob_key for row in replaced} - {info.blob_key for info in infos}

    def _rows(self, session: Session, texts: list[str]) -> Sequence[CacheRow]:
        here = CacheRow.collection_id == self._target.collection_id
        return session.scalars(select(CacheRow).where(here, CacheRow.text_sha256.in_(texts))).all()


def _expired(cache: CacheInfo | CacheRow) -> bool:
    return cache.expires_at is not None and cache.expires_at <= utc_now()


def _key(cache: CacheInfo | CacheRow) -> _Key:
    return cache.text_sha256, cache.fingerprint, cache.keep_ratio


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
