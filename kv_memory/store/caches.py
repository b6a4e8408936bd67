"""The distilled caches and shared prefixes of one collection, with rows and blobs kept consistent."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import DateTime, bindparam, delete, insert, or_, select
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.config import StorageName, check_keep_ratio, stored_dtype
from kv_memory.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    FingerprintMismatchError,
    StoreError,
)
from kv_memory.store import documents
from kv_memory.store.blob_references import check_header
from kv_memory.store.blobs.local import blob_key, is_blob_key
from kv_memory.store.documents import alive
from kv_memory.store.eviction import SELECT_LIMITS, Eviction
from kv_memory.store.metrics import BYTES_READ, BYTES_WRITTEN, GET_SECONDS, GETS, PUT_SECONDS
from kv_memory.store.records import CacheInfo
from kv_memory.store.sql.schema import Base, CacheRow, FingerprintRow, PrefixRow, utc_now
from kv_memory.tracing import span

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

_LOG = logging.getLogger(__name__)
# Built once: building them takes longer than running them.
_SAME = (
    (CacheRow.collection_id == bindparam("collection"))
    & (CacheRow.text_sha256 == bindparam("text"))
    & (CacheRow.fingerprint == bindparam("digest"))
)
_AT_RATIO = select(CacheRow).where(_SAME, CacheRow.keep_ratio == bindparam("ratio"))
# Columns of the table, not of the ORM class, and the time as SQLite has it: a third of the time, for each `get`.
_COLUMNS = Base.metadata.tables[CacheRow.__tablename__].c
_NAMES = "id", "blob_key", "size_bytes", "n_tokens", "text_sha256", "fingerprint", "keep_ratio"
_OF_TEXT = (
    select(*(_COLUMNS[name] for name in _NAMES))
    .where(
        _COLUMNS.collection_id == bindparam("collection"),
        _COLUMNS.text_sha256 == bindparam("text"),
        _COLUMNS.fingerprint == bindparam("digest"),
        or_(_COLUMNS.expires_at.is_(None), _COLUMNS.expires_at > bindparam("now", type_=DateTime())),
    )
    .order_by(_COLUMNS.id.desc())
)
_FINGERPRINT = select(FingerprintRow.digest).where(FingerprintRow.digest == bindparam("digest"))
_INSERT_FINGERPRINT = insert(Base.metadata.tables[FingerprintRow.__tablename__])
_INSERT = insert(Base.metadata.tables[CacheRow.__tablename__]).returning(CacheRow.id)
_OUTCOMES = {CacheNotFoundError: "missing", FingerprintMismatchError: "mismatch", CorruptCacheError: "corrupt"}


class Caches(Eviction):
    """Caches and prefixes of one collection: the part of `Store` that needs blobs."""

    def put(self, text_sha256: str, cache: DistilledCache, *, storage: StorageName = "auto") -> CacheInfo:
        """Store a distilled cache: the blob first, then its row. Both are durable when this returns.

        The text need not be in a document yet. If the collection already has a sound cache of this text, fingerprint
        and keep ratio, that cache stays and its row is returned.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text of the cache.
            cache: Cache to store.
            storage: Number format of keys and values in the blob, see `DistilledCache.to_bytes`; `get` recognises it.

        Raises:
            ConfigError: The cache cannot be stored in this format.
            StoreFullError: No space left. Nothing of this cache is kept, and everything else is untouched.
        """
        if not is_blob_key(text_sha256):
            raise ConfigError("text_sha256 must be a SHA-256 hex digest", where=f"text_sha256={text_sha256[:80]!r}")
        start_s = time.perf_counter()
        with span("store.put", text_sha256=text_sha256, keep_ratio=cache.keep_ratio):
            # The blob records the hash of its text, so a row that names another text's blob is detected.
            data = replace(cache, text_sha256=text_sha256).to_bytes(storage=storage)
            key = blob_key(data)
            info = CacheInfo(
                text_sha256=text_sha256,
                fingerprint=cache.fingerprint.digest,
                method=cache.fingerprint.method,
                keep_ratio=cache.keep_ratio,
                n_tokens=cache.n_tokens,
                n_kept=cache.n_kept,
                dtype=stored_dtype(storage, cache.fingerprint.dtype),
                size_bytes=len(data),
                blob_key=key,
                fidelity=cache.fidelity,
                refined_steps=cache.refined_steps,
                created_at=utc_now(),  # replaced when it is stored, as is `expires_at`
            )
            names = {"collection": self.collection_id, "text": text_sha256}
            names |= {"digest": info.fingerprint, "ratio": info.keep_ratio}
            there: list[CacheRow] = []

            def add_row(session: Session) -> list[str]:
                nonlocal info
                row = session.scalar(_AT_RATIO, names)
                if row is not None and (row.expires_at is None or row.expires_at > utc_now()):
                    there.append(row)
                    return [] if key == row.blob_key else [key]
                info, gone = self._insert(session, info, cache.fingerprint, instead_of=row)
                return gone

            self.references.put_all({key: data}, add_row)
            if there:
                if self.references.verify(there[0]) is None:
                    return _cache_info(there[0])
                return self.put(text_sha256, cache, storage=storage)  # its blob was damaged, and the row is gone
        PUT_SECONDS.labels(self.collection).observe(time.perf_counter() - start_s)
        BYTES_WRITTEN.labels(self.collection).inc(len(data))
        return info

    def _insert(
        self, session: Session, info: CacheInfo, fingerprint: Fingerprint, *, instead_of: CacheRow | None
    ) -> tuple[CacheInfo, list[str]]:
        """Insert a row and evict to make room for it; returns its final record, and the blob keys of deleted rows."""
        now = utc_now()
        of_collection, ttl_s, of_store = session.execute(SELECT_LIMITS, {"collection": self.collection_id}).one()
        expires_at = None if ttl_s is None else now + timedelta(seconds=ttl_s)
        info = replace(info, created_at=now, expires_at=expires_at)
        gone: list[str] = []
        if instead_of is not None:
            gone.append(instead_of.blob_key)
            session.execute(delete(CacheRow).where(CacheRow.id == instead_of.id))
        # Core tables, not ORM classes: they take a third of the time, and each put waits for it.
        connection = session.connection()
        if connection.scalar(_FINGERPRINT, {"digest": info.fingerprint}) is None:
            connection.execute(_INSERT_FINGERPRINT, {"digest": info.fingerprint, "json": fingerprint.to_json()})
        row_id = connection.scalar(_INSERT, {"collection_id": self.collection_id, **vars(info)})
        if of_collection is not None or of_store is not None:
            gone += self._evict(session, now, spare=row_id)
        return info, gone

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> DistilledCache:
        """A distilled cache, its tensors mapped from the file; the same object for one blob as long as it is alive.

        The file's SHA-256 is checked the first time this process reads it. The tensors stay valid when the cache is
        deleted later. Times of last use are buffered, and written when the store is closed or 256 caches are in the
        buffer.

        Args:
            text_sha256: SHA-256 hex digest of the UTF-8 text.
            fingerprint: Fingerprint that the cache was made under.
            keep_ratio: Keep ratio of the cache. A `Keep` prefers the cache of this amount, and else takes the newest
                one: documents of one collection may have been added at several amounts.

        Raises:
            CacheNotFoundError: The text has no such cache; the message names the keep ratios it has.
            FingerprintMismatchError: The cache was made under another fingerprint; the message names the differences.
            CorruptCacheError: The blob is damaged. It is quarantined, and `missing` lists the passage again.
        """
        start_s = time.perf_counter()
        with span("store.get", text_sha256=text_sha256):
            try:
                cache, size_bytes = self._load(text_sha256, fingerprint, keep_ratio)
            except CacheError as error:
                GETS.labels(self.collection, _OUTCOMES[type(error)]).inc()
                if isinstance(error, CorruptCacheError):
                    _LOG.warning("%s", error)
                raise
        GETS.labels(self.collection, "hit").inc()
        BYTES_READ.labels(self.collection).inc(size_bytes)
        GET_SECONDS.labels(self.collection).observe(time.perf_counter() - start_s)
        return cache

    def _load(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> tuple[DistilledCache, int]:
        """Find, verify and load a cache; returns it with the size of its blob in bytes.

        Writers are not excluded between these steps. A round in which the row or its blob changes is repeated, at
        most twice.
        """
        for _ in range(3):
            # 1. Find the row. Without one, raise an error that names the existing caches.
            with self.catalog.read() as session:
                row = self._find(session, text_sha256, fingerprint, keep)
                if row is None:
                    raise self._not_found(session, text_sha256, fingerprint, keep)
            try:
                # 2. Verify length and SHA-256 of the file, load it, and compare the identity that it records with the
                # row. Its tensors are mapped from the file, which stays readable when it is removed.
                cache = self.references.load(row)
            except FileNotFoundError:
                continue  # removed meanwhile: the next round finds no row, or a missing blob
            except CorruptCacheError as error:
                if not self.references.refuse(row, error):
                    continue  # another writer has deleted or replaced the cache
                with self.catalog.read() as session:
                    where = documents.place_of(session, self.collection_id, text_sha256)
                raise CorruptCacheError(
                    f"a distilled cache is damaged and was quarantined: {error.what}",
                    where=f"{where}, blob {row.blob_key}",
                    next_step="Run `kv-memory add --stale` to compress the text again; meanwhile answer from the text.",
                ) from error
            # 3. Note the time of use, for eviction.
            self.uses.note(row.id)
            return cache, row.size_bytes
        raise StoreError("the cache changed each time it was read", where=f"text {text_sha256}", next_step="Try again.")

    def warm(self) -> None:
        """Do the one-time work of the first `get` now, for a process that can do so while it loads its model."""
        self.references.blobs.warm()
        with self.catalog.read() as session:  # SQLAlchemy compiles the statement, which takes as long as 100 look-ups
            session.execute(_OF_TEXT, {"collection": 0, "text": "", "digest": "", "now": datetime.min}).all()

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether `get` would find a cache; the blob is not checked."""
        return self.keep_ratio_of(text_sha256, fingerprint, keep_ratio) is not None

    def keep_ratio_of(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> float | None:
        """The keep ratio of the cache that `get` would find; None without one."""
        with self.catalog.read() as session:
            row = self._find(session, text_sha256, fingerprint, keep)
        return None if row is None else row.keep_ratio

    def sound(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float | Keep) -> bool:
        """Whether `get` would find a sound cache; nothing is quarantined, which `get` and `check` do."""
        with self.catalog.read() as session:
            row = self._find(session, text_sha256, fingerprint, keep_ratio)
        if row is not None:
            with suppress(CorruptCacheError, FingerprintMismatchError):
                check_header(row, self.references.verified_path(row.blob_key, row.size_bytes))
                return True
        return False

    def _find(self, session: Session, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> Any:
        """The columns of _OF_TEXT at a keep ratio; for a `Keep` of the cache that it gives, else of the newest one."""
        now = datetime.now(UTC).replace(tzinfo=None)
        names = {"collection": self.collection_id, "text": text_sha256, "digest": fingerprint.digest, "now": now}
        rows = session.execute(_OF_TEXT, names).all()
        if not isinstance(keep, Keep):
            return next((row for row in rows if row.keep_ratio == keep), None)
        if len(rows) < 2:
            return rows[0] if rows else None
        fitting = (row for row in rows if keep.fits(row.keep_ratio, row.n_tokens, fingerprint))
        return next(fitting, rows[0])

    def delete(self, text_sha256: str) -> int:
        """Delete a text's caches, and return their number."""
        these = delete(CacheRow).where(
            CacheRow.collection_id == self.collection_id, CacheRow.text_sha256 == text_sha256
        )
        with self.catalog.write() as session:
            keys = session.scalars(these.returning(CacheRow.blob_key)).all()
        self.references.delete_unreferenced(keys)
        return len(keys)

    def caches(self, document_id: str | None = None) -> list[CacheInfo]:
        """Records of all caches of the collection, or of one document's passages, oldest first.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        these = CacheRow.collection_id == self.collection_id
        with self.catalog.read() as session:
            if document_id is not None:
                these = self._of_document(session, document_id)
            rows = session.scalars(select(CacheRow).where(these).order_by(CacheRow.id))
            return [_cache_info(row) for row in rows]

    def making(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> AbstractContextManager[bool]:
        """A lock on making this cache: wait for it by entering the context, call `has` again, then compress and `put`.

        A document that eight callers request at once is thus compressed once, across threads, processes and, with a
        catalog in PostgreSQL, machines. If the holder dies, the lock passes to the next one.
        """
        name = f"make {self.collection_id} {text_sha256} {fingerprint.digest} {check_keep_ratio(keep_ratio)!r}"
        return self.catalog.hold(name)

    def put_prefix(self, key: str, data: bytes) -> None:
        """Store the cache of a shared prefix, as safetensors bytes, replacing any under the same key."""
        blob = blob_key(data)

        def add_row(session: Session) -> list[str]:
            row = session.scalar(self._prefix(key))
            left = [] if row is None or row.blob_key == blob else [row.blob_key]
            if row is None:
                row = PrefixRow(collection_id=self.collection_id, key=key)
                session.add(row)
            row.blob_key, row.size_bytes = blob, len(data)
            return left

        self.references.put_all({blob: data}, add_row)

    def get_prefix(self, key: str) -> Path | None:
        """The safetensors file of a shared prefix, checked like a cache; None if the key has no prefix.

        Raises:
            CorruptCacheError: The blob is damaged. It is quarantined, and the next call returns None.
        """
        for _ in range(3):
            with self.catalog.read() as session:
                row = session.scalar(self._prefix(key))
            if row is None:
                return None
            try:
                return self.references.verified_path(row.blob_key, row.size_bytes)
            except CorruptCacheError as error:
                if self.references.refuse(row, error):
                    raise CorruptCacheError(
                        error.what,
                        where=f"prefix {key!r}, blob {row.blob_key}",
                        next_step="Ask again: the damaged prefix was removed and will be computed again.",
                    ) from error
        raise StoreError("the prefix changed each time it was read", where=f"prefix {key!r}", next_step="Try again.")

    def _prefix(self, key: str) -> Any:
        return select(PrefixRow).where(PrefixRow.collection_id == self.collection_id, PrefixRow.key == key)

    def _not_found(self, session: Session, text_sha256: str, wanted: Fingerprint, keep: float | Keep) -> CacheError:
        keep_ratio = None if isinstance(keep, Keep) else check_keep_ratio(keep)
        rows = session.execute(
            select(CacheRow.keep_ratio, FingerprintRow.json)
            .join(FingerprintRow, FingerprintRow.digest == CacheRow.fingerprint)
            .where(CacheRow.collection_id == self.collection_id, CacheRow.text_sha256 == text_sha256, alive(utc_now()))
            .order_by(CacheRow.id.desc())
        ).all()
        where = documents.place_of(session, self.collection_id, text_sha256)
        # 1. A cache at this ratio exists under another fingerprint: an error that names the differences. The newest
        # comes first. Without a ratio any cache of the text will do.
        for ratio, json in rows:
            if keep_ratio in (ratio, None):
                try:
                    Fingerprint.from_json(json).check(wanted, where=where)
                except FingerprintMismatchError as error:
                    return error
        # 2. No cache at this ratio: name the ratios that exist.
        ratios = sorted({ratio for ratio, _ in rows})
        others = f"; available keep ratios: {', '.join(map(str, ratios))}" if ratios else ""
        return CacheNotFoundError(
            f"no distilled cache{'' if keep_ratio is None else f' at keep_ratio {keep_ratio}'}{others}",
            where=where,
            next_step="Run `kv-memory add --stale` to compress what is missing"
            + (", or ask with one of those keep ratios." if ratios else "."),
        )


def _cache_info(row: CacheRow) -> CacheInfo:
    return CacheInfo(**{name: getattr(row, name) for name in CacheInfo.__dataclass_fields__})
