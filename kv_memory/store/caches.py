"""The distilled caches of one collection, with rows and blobs kept consistent."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import finalize

from sqlalchemy import bindparam, delete, insert, select
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.config import StorageName, check_keep_ratio, stored_dtype
from kv_memory.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    FingerprintMismatchError,
    StoreError,
)
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.blobs.local import blob_key
from kv_memory.store.counters import Uses
from kv_memory.store.documents import batches, referred_texts, select_passages
from kv_memory.store.error_mapping import store_error
from kv_memory.store.eviction import Limits, alive, evict, read_limits
from kv_memory.store.identity import MisfiledError, check_header, check_identity
from kv_memory.store.records import CacheInfo
from kv_memory.store.sql.locks import FileLocks
from kv_memory.store.sql.schema import Base, CacheRow, FingerprintRow, PassageRow, utc_now
from kv_memory.tracing import span

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache  # imports torch: listing without loading a cache stays fast

__all__ = ["CacheTable", "cache_info"]

_LOG = logging.getLogger(__name__)
# Built once: building them takes longer than running them.
_LOOK_UP = select(CacheRow).where(
    CacheRow.collection_id == bindparam("collection"),
    CacheRow.text_sha256 == bindparam("text"),
    CacheRow.fingerprint == bindparam("digest"),
    CacheRow.keep_ratio == bindparam("ratio"),
)
_OF_TEXT = (
    select(CacheRow)
    .where(
        CacheRow.collection_id == bindparam("collection"),
        CacheRow.text_sha256 == bindparam("text"),
        CacheRow.fingerprint == bindparam("digest"),
    )
    .order_by(CacheRow.id.desc())
)
_FINGERPRINT = select(FingerprintRow.digest).where(FingerprintRow.digest == bindparam("digest"))
_INSERT_FINGERPRINT = insert(Base.metadata.tables[FingerprintRow.__tablename__])
_INSERT = insert(Base.metadata.tables[CacheRow.__tablename__]).returning(CacheRow.id)
_AGAIN = "Run `kv-memory add --stale` to compress the text again; until then answer from the text."


def cache_info(row: CacheRow) -> CacheInfo:
    """Convert a catalog row to its record."""
    names = CacheInfo.__dataclass_fields__
    return CacheInfo(**{name: getattr(row, name) for name in names})


class CacheTable:
    """Caches of one collection. Thread-safe.

    Args:
        references: Blobs of the store and the rows that name them.
        readers: Locks that mark which blobs are being read on this machine.
        collection_id: Catalog row of the collection.
    """

    def __init__(self, references: BlobReferences, readers: FileLocks, collection_id: int) -> None:
        self.references = references
        self._catalog = references.catalog
        self._readers = readers
        self._collection_id = collection_id
        self.uses = Uses(references.catalog, collection_id)

    def put(
        self, text_sha256: str, cache: DistilledCache, *, fidelity: float | None, storage: StorageName
    ) -> CacheInfo:
        """See `Store.put`."""
        if re.fullmatch("[0-9a-f]{64}", text_sha256) is None:
            raise ConfigError("text_sha256 must be a SHA-256 hex digest", where=f"text_sha256={text_sha256[:80]!r}")
        with (
            span("store.put", text_sha256=text_sha256, keep_ratio=cache.keep_ratio),
            self.uses.counters.timing("put_seconds"),
        ):
            return self._put(text_sha256, cache, fidelity=fidelity, storage=storage)

    def _put(
        self, text_sha256: str, cache: DistilledCache, *, fidelity: float | None, storage: StorageName
    ) -> CacheInfo:
        digest, keep_ratio = cache.fingerprint.digest, cache.keep_ratio
        there, limits = self._sound_row(text_sha256, digest, keep_ratio)
        if there is not None:
            return cache_info(there)
        # The blob records the hash of its text, so a row that names another text's blob is detected.
        data = replace(cache, text_sha256=text_sha256).to_bytes(storage=storage)
        key = blob_key(data)
        info = CacheInfo(
            text_sha256=text_sha256,
            fingerprint=digest,
            method=cache.fingerprint.method,
            keep_ratio=keep_ratio,
            n_tokens=cache.n_tokens,
            n_kept=cache.n_kept,
            dtype=stored_dtype(storage, cache.fingerprint.dtype),
            size_bytes=len(data),
            blob_key=key,
            fidelity=cache.fidelity if fidelity is None else fidelity,
            refined_steps=cache.refined_steps,
            pinned=False,
            created_at=utc_now(),
            last_used_at=None,
            expires_at=None,
        )
        left: list[str] = [key]  # blobs that may have no row afterwards
        try:
            # The blob first, and outside any transaction, because an upload may take long. The lock keeps it from
            # being swept away before a row names it.
            with self._catalog.hold(f"blob {key}"):
                self.references.verified_blobs.put(key, data)
                if limits.bounded:
                    self.uses.flush()  # eviction goes by times of last use
                with self._catalog.write() as session:
                    there = self._find(session, text_sha256, digest, keep_ratio, expired=True)
                    if there is not None and not _is_expired(there):  # another writer was faster
                        return cache_info(there)
                    info, left = self._insert(session, info, cache.fingerprint, instead_of=there)
                self.uses.counters.add("puts")
                self.uses.counters.add("bytes_written", len(data))
                return info
        finally:
            self.references.delete_unreferenced(left)

    def _sound_row(self, text_sha256: str, digest: str, keep_ratio: float) -> tuple[CacheRow | None, Limits]:
        """The row of a cache with a sound blob, and the current limits; a row with a bad blob is removed first."""
        with self._catalog.read() as session:
            row = self._find(session, text_sha256, digest, keep_ratio)
            limits = read_limits(session, self._collection_id)
        if row is not None and not self.references.verified_blobs.sound(row.blob_key, row.size_bytes):
            self.references.quarantine_with_rows(row.blob_key, row.size_bytes)
            return None, limits
        if row is not None and self.references.drop_if_misfiled(row):
            return None, limits
        return row, limits

    def _insert(
        self, session: Session, info: CacheInfo, fingerprint: Fingerprint, *, instead_of: CacheRow | None
    ) -> tuple[CacheInfo, list[str]]:
        """Insert a row and evict to make room for it; returns its final record, and the blob keys of deleted rows."""
        now = utc_now()
        limits = read_limits(session, self._collection_id)
        expires_at = None if limits.ttl_s is None else now + timedelta(seconds=limits.ttl_s)
        info = replace(info, created_at=now, expires_at=expires_at)
        gone: list[str] = []
        if instead_of is not None:
            gone.append(instead_of.blob_key)
            session.delete(instead_of)
            session.flush()
        # Core tables, not ORM classes: they take a third of the time, and each put waits for it.
        connection = session.connection()
        if connection.scalar(_FINGERPRINT, {"digest": info.fingerprint}) is None:
            connection.execute(_INSERT_FINGERPRINT, {"digest": info.fingerprint, "json": fingerprint.to_json()})
        row_id = connection.scalar(_INSERT, {"collection_id": self._collection_id, **vars(info)})
        if limits.bounded:
            evicted = evict(
                session,
                self._collection_id,
                limits,
                now=now,
                spare=row_id,
                being_read=lambda key: self._readers.shared(f"read {key}"),
            )
            self._note_evictions(len(evicted))
            gone += evicted
        return info, gone

    def make_room(self) -> int:
        """Evict what exceeds the limits now, e.g. after they were lowered, and return the number of evicted caches."""
        self.uses.flush()
        with self._catalog.write() as session:
            limits = read_limits(session, self._collection_id)
            gone = evict(
                session,
                self._collection_id,
                limits,
                now=utc_now(),
                spare=None,
                being_read=lambda key: self._readers.shared(f"read {key}"),
            )
        self._note_evictions(len(gone))
        self.references.delete_unreferenced(gone)
        return len(gone)

    def _note_evictions(self, n_evicted: int) -> None:
        if n_evicted:
            self.uses.counters.add("evictions", n_evicted)
            _LOG.info("evicted %d distilled caches to stay within the size limit", n_evicted)

    def warm(self) -> None:
        """Let SQLAlchemy compile the lookup, which takes as long as a few hundred lookups."""
        with self._catalog.read() as session:
            session.scalars(_OF_TEXT, {"collection": self._collection_id, "text": "", "digest": ""}).all()

    def keep_ratio_of(self, text_sha256: str, fingerprint: Fingerprint, keep: Keep) -> float | None:
        """See `Store.keep_ratio_of`."""
        with self._catalog.read() as session:
            row = self._choose(session, text_sha256, fingerprint, keep)
        return None if row is None else row.keep_ratio

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> DistilledCache:
        """See `Store.get`."""
        start_s = time.perf_counter()
        with span("store.get", text_sha256=text_sha256):
            try:
                cache, size_bytes = self._get(text_sha256, fingerprint, keep)
            except CacheNotFoundError:
                self.uses.counters.add("misses")
                raise
            except FingerprintMismatchError:
                self.uses.counters.add("refused_mismatch")
                raise
            except CorruptCacheError as error:
                self.uses.counters.add("refused_corrupt")
                _LOG.warning("%s", error)
                raise
        self.uses.counters.got(size_bytes, time.perf_counter() - start_s)
        return cache

    def _get(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> tuple[DistilledCache, int]:
        """Find, lock, verify and load a cache; returns it with the size of its blob in bytes.

        Writers are not excluded between these steps. A round in which the row or its blob changes is repeated, at
        most twice.
        """
        for _ in range(3):
            # 1. Find the row. Without one, raise an error that names the existing caches.
            with self._catalog.read() as session:
                row = self._choose(session, text_sha256, fingerprint, keep)
                if row is None:
                    ratio = None if isinstance(keep, Keep) else keep
                    self._raise_not_found(session, text_sha256, fingerprint, ratio)
                    raise AssertionError("unreachable")
            # 2. Lock the blob for reading: eviction skips locked blobs. If the row was deleted since step 1, the blob
            # may be gone too, which step 3 notices.
            name = f"read {row.blob_key}"
            self._readers.share(name)
            kept = False
            readable = False
            try:
                # 3. Verify length and SHA-256 of the file.
                path = self.references.verified_blobs.verified_path(row.blob_key, row.size_bytes)
                readable = True
                # 4. Load it, and compare the identity that it records with the row.
                cache = _load(path)
                check_identity(
                    row, text_sha256=cache.text_sha256, fingerprint=cache.fingerprint, keep_ratio=cache.keep_ratio
                )
                # 5. Keep the lock as long as the cache lives: its tensors are mapped from the file.
                finalize(cache, self._readers.unshare, name)
                kept = True
            except FileNotFoundError:
                continue  # removed after step 3: the next round finds no row, or a missing blob
            except MisfiledError as error:
                # The blob is sound, but not the one of this row: delete the row.
                if self.references.drop_misfiled(row):
                    raise self._corrupt(error.what, row.blob_key, text_sha256) from error
                continue  # the row was deleted or changed by another writer
            except CorruptCacheError as error:
                # Quarantine the blob and delete its rows. A failure of step 3 is rechecked, because another writer may
                # have replaced the blob since. One of step 4 is not: the hash is right, so a recheck would pass.
                if self.references.quarantine_with_rows(row.blob_key, row.size_bytes, recheck=not readable):
                    raise self._corrupt(error.what, row.blob_key, text_sha256) from error
                continue  # the cache was deleted or replaced by another writer
            finally:
                if not kept:
                    self._readers.unshare(name)
            # 6. Note the time of use, for eviction.
            self.uses.note(row.id)
            return cache, row.size_bytes
        raise StoreError("the cache changed each time it was read", where=f"text {text_sha256}", next_step="Try again.")

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> bool:
        """See `Store.has`."""
        with self._catalog.read() as session:
            return self._choose(session, text_sha256, fingerprint, keep) is not None

    def sound(self, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep) -> bool:
        """See `Store.sound`."""
        with self._catalog.read() as session:
            row = self._choose(session, text_sha256, fingerprint, keep)
        if row is None:
            return False
        try:
            check_header(row, self.references.verified_blobs.verified_path(row.blob_key, row.size_bytes))
        except (CorruptCacheError, FingerprintMismatchError):
            return False
        return True

    def delete(self, text_sha256: str, *, fingerprint: Fingerprint | None, keep_ratio: float | None) -> int:
        """See `Store.delete`."""
        statement = (
            delete(CacheRow)
            .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256 == text_sha256)
            .returning(CacheRow.blob_key)
        )
        if fingerprint is not None:
            statement = statement.where(CacheRow.fingerprint == fingerprint.digest)
        if keep_ratio is not None:
            statement = statement.where(CacheRow.keep_ratio == check_keep_ratio(keep_ratio))
        with self._catalog.write() as session:
            keys = list(session.scalars(statement))
        self.references.delete_unreferenced(keys)
        return len(keys)

    def retire(self, session: Session, texts: set[str]) -> list[str]:
        """Delete caches of texts that no passage of the collection has; returns their blob keys."""
        keys: list[str] = []
        for batch in batches(texts - referred_texts(session, self._collection_id, texts)):
            keys += session.scalars(
                delete(CacheRow)
                .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256.in_(batch))
                .returning(CacheRow.blob_key)
            )
        return keys

    def _corrupt(self, what: str, key: str, text_sha256: str) -> CorruptCacheError:
        return CorruptCacheError(
            f"a distilled cache is damaged and was quarantined: {what}",
            where=f"{self._document_of(text_sha256)}, blob {key}",
            next_step=_AGAIN,
        )

    def _find(
        self, session: Session, text_sha256: str, digest: str, keep_ratio: float, *, expired: bool = False
    ) -> CacheRow | None:
        names = {
            "collection": self._collection_id,
            "text": text_sha256,
            "digest": digest,
            "ratio": check_keep_ratio(keep_ratio),
        }
        row: CacheRow | None = session.scalar(_LOOK_UP, names)
        return None if row is not None and _is_expired(row) and not expired else row

    def _choose(
        self, session: Session, text_sha256: str, fingerprint: Fingerprint, keep: float | Keep
    ) -> CacheRow | None:
        """The text's cache at a keep ratio; for a `Keep` the one that it gives, else the newest one."""
        if not isinstance(keep, Keep):
            return self._find(session, text_sha256, fingerprint.digest, keep)
        names = {"collection": self._collection_id, "text": text_sha256, "digest": fingerprint.digest}
        rows = [row for row in session.scalars(_OF_TEXT, names) if not _is_expired(row)]
        fitting = (row for row in rows if keep.fits(row.keep_ratio, row.n_tokens, fingerprint))
        return next(fitting, rows[0] if rows else None)

    def _document_of(self, text_sha256: str) -> str:
        with self._catalog.read() as session:
            found = session.execute(
                select_passages(self._collection_id).where(PassageRow.text_sha256 == text_sha256).limit(1)
            ).first()
        if found is None:
            return f"text {text_sha256}"
        passage, document = found
        return f"document {document.document_id!r}, passage {passage.ordinal}"

    def _raise_not_found(
        self, session: Session, text_sha256: str, wanted: Fingerprint, keep_ratio: float | None
    ) -> None:
        rows = session.execute(
            select(CacheRow.keep_ratio, FingerprintRow.json)
            .join(FingerprintRow, FingerprintRow.digest == CacheRow.fingerprint)
            .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256 == text_sha256, alive(utc_now()))
            .order_by(CacheRow.id.desc())
        ).all()
        where = self._document_of(text_sha256)
        # 1. A cache at this ratio exists under another fingerprint: raise an error that names the differences. The
        # newest comes first. Without a ratio any cache of the text will do.
        for ratio, json in rows:
            if keep_ratio in (ratio, None):
                Fingerprint.from_json(json).check(wanted, where=where)
        # 2. No cache at this ratio: name the ratios that exist.
        ratios = sorted({ratio for ratio, _ in rows})
        others = f"; available keep ratios: {', '.join(map(str, ratios))}" if ratios else ""
        raise CacheNotFoundError(
            f"no distilled cache{'' if keep_ratio is None else f' at keep_ratio {keep_ratio}'}{others}",
            where=where,
            next_step="Run `kv-memory add --stale` to compress what is missing"
            + (", or ask with one of those keep ratios." if ratios else "."),
        )


def _is_expired(row: CacheRow) -> bool:
    return row.expires_at is not None and row.expires_at <= utc_now()


def _load(path: Path) -> DistilledCache:
    from kv_memory.cache.distilled import DistilledCache

    try:
        return DistilledCache.load(path)
    except CorruptCacheError as error:
        # The bytes have just been verified, so a failed system call is not evidence of damage.
        if isinstance(error.__cause__, OSError) and (ours := store_error(error.__cause__, str(path))) is not None:
            raise ours from error
        raise
