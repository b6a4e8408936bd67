"""The distilled caches and prefixes of one collection: rows and blobs kept in step."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import finalize

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from kv_memory.config import StorageName, check_keep_ratio, stored_dtype
from kv_memory.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    FingerprintMismatchError,
    StoreError,
)
from kv_memory.fingerprint import Fingerprint
from kv_memory.store.blobs import blob_key
from kv_memory.store.budget import Limits, alive, evict, read_limits
from kv_memory.store.catalog import Catalog
from kv_memory.store.counters import Counters, read_counters, write_counters
from kv_memory.store.documents import batches, referred_texts, select_passages
from kv_memory.store.faults import store_error
from kv_memory.store.filing import MisfiledError, check_filing, check_header
from kv_memory.store.locks import FileLocks
from kv_memory.store.records import CacheInfo
from kv_memory.store.schema import CacheRow, FingerprintRow, PassageRow, PrefixRow, utc_now
from kv_memory.store.vault import Vault
from kv_memory.tracing import span

if TYPE_CHECKING:
    from kv_memory.cache import DistilledCache  # imports torch: where no cache is read, listing stays quick

__all__ = ["Shelf", "cache_info"]

_LOG = logging.getLogger(__name__)
_FLUSH_EVERY = 256  # uses that may be lost from last_used_at in a crash; a write per get would cost an fsync each
# Made once: building them takes longer than running them.
_LOOK_UP = select(CacheRow).where(
    CacheRow.collection_id == bindparam("collection"),
    CacheRow.text_sha256 == bindparam("text"),
    CacheRow.fingerprint == bindparam("digest"),
    CacheRow.keep_ratio == bindparam("ratio"),
)
_FINGERPRINT = select(FingerprintRow.digest).where(FingerprintRow.digest == bindparam("digest"))
_INSERT_FINGERPRINT = insert(FingerprintRow.__table__)
_INSERT = insert(CacheRow.__table__)
_AGAIN = "Run `kv-memory add --stale` to make it again; until then answer from the text."


def cache_info(row: CacheRow) -> CacheInfo:
    """The record of a row."""
    names = CacheInfo.__dataclass_fields__
    return CacheInfo(**{name: getattr(row, name) for name in names})


class Shelf:
    """Caches and prefixes of one collection. Thread-safe.

    Args:
        catalog: Of the store.
        vault: Of the store.
        readers: Who on this machine reads which blob.
        collection_id: Whose caches these are.
    """

    def __init__(self, catalog: Catalog, vault: Vault, readers: FileLocks, collection_id: int) -> None:
        self._catalog = catalog
        self._vault = vault
        self._readers = readers
        self._collection_id = collection_id
        self._lock = threading.Lock()
        self._used: dict[int, datetime] = {}
        self._counters = Counters()

    # caches

    def put(
        self, text_sha256: str, cache: DistilledCache, *, fidelity: float | None, storage: StorageName
    ) -> CacheInfo:
        """See `Store.put`."""
        if re.fullmatch("[0-9a-f]{64}", text_sha256) is None:
            raise ConfigError("text_sha256 must be a SHA-256 hex digest", where=f"text_sha256={text_sha256[:80]!r}")
        with (
            span("store.put", text_sha256=text_sha256, keep_ratio=cache.keep_ratio),
            self._counters.timing("put_seconds"),
        ):
            return self._put(text_sha256, cache, fidelity=fidelity, storage=storage)

    def _put(
        self, text_sha256: str, cache: DistilledCache, *, fidelity: float | None, storage: StorageName
    ) -> CacheInfo:
        digest, keep_ratio = cache.fingerprint.digest, cache.keep_ratio
        there, limits = self._sound_row(text_sha256, digest, keep_ratio)
        if there is not None:
            return cache_info(there)
        # The file says of which text it is: a row that comes to name another's file is seen through.
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
            # The blob first, outside any transaction: it takes as long as it takes. Held, nobody sweeps it away.
            with self._catalog.hold(f"blob {key}"):
                self._vault.put(key, data)
                if limits.bounded:
                    self.flush()  # what was used last decides what goes
                with self._catalog.write() as session:
                    there = self._find(session, text_sha256, digest, keep_ratio, expired=True)
                    if there is not None and not _is_expired(there):  # somebody else was quicker
                        return cache_info(there)
                    info, left = self._insert(session, info, cache.fingerprint, instead_of=there)
                self._counters.add("puts")
                self._counters.add("bytes_written", len(data))
                return info
        finally:
            self.sweep(left)

    def _sound_row(self, text_sha256: str, digest: str, keep_ratio: float) -> tuple[CacheRow | None, Limits]:
        """The row of a cache whose blob is sound, one whose blob is not is taken out first; and the limits by now."""
        with self._catalog.read() as session:
            row = self._find(session, text_sha256, digest, keep_ratio)
            limits = read_limits(session, self._collection_id)
        if row is not None and not self._vault.sound(row.blob_key, row.size_bytes):
            self._condemn(row.blob_key, row.size_bytes)
            return None, limits
        if row is not None and self.unfile_if_wrong(row):
            return None, limits
        return row, limits

    def _insert(
        self, session: Session, info: CacheInfo, fingerprint: Fingerprint, *, instead_of: CacheRow | None
    ) -> tuple[CacheInfo, list[str]]:
        """Add a row and make room for it; returns it as it is now, and the blobs of the rows that went."""
        now = utc_now()
        limits = read_limits(session, self._collection_id)
        expires_at = None if limits.ttl_s is None else now + timedelta(seconds=limits.ttl_s)
        info = replace(info, created_at=now, expires_at=expires_at)
        gone: list[str] = []
        if instead_of is not None:
            gone.append(instead_of.blob_key)
            session.delete(instead_of)
            session.flush()
        # Tables rather than mapped classes: a third of the time, and each put waits for it.
        connection = session.connection()
        if connection.scalar(_FINGERPRINT, {"digest": info.fingerprint}) is None:
            connection.execute(_INSERT_FINGERPRINT, {"digest": info.fingerprint, "json": fingerprint.to_json()})
        done = connection.execute(_INSERT, {"collection_id": self._collection_id, **vars(info)})
        (row_id,) = done.inserted_primary_key
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
        """Evict what is beyond the budget now, e.g. because it was lowered; returns how many caches went."""
        self.flush()
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
        self.sweep(gone)
        return len(gone)

    def _note_evictions(self, n_evicted: int) -> None:
        if n_evicted:
            self._counters.add("evictions", n_evicted)
            _LOG.info("the budget drove %d distilled caches out", n_evicted)

    def warm(self) -> None:
        """Let SQLAlchemy compile the look-up, which takes as long as a few hundred of them."""
        with self._catalog.read() as session:
            self._find(session, "", "", 1.0)

    def get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> DistilledCache:
        """See `Store.get`."""
        start_s = time.perf_counter()
        with span("store.get", text_sha256=text_sha256, keep_ratio=keep_ratio):
            try:
                cache, size_bytes = self._get(text_sha256, fingerprint, keep_ratio)
            except CacheNotFoundError:
                self._counters.add("misses")
                raise
            except FingerprintMismatchError:
                self._counters.add("refused_mismatch")
                raise
            except CorruptCacheError as error:
                self._counters.add("refused_corrupt")
                _LOG.warning("%s", error)
                raise
        self._counters.got(size_bytes, time.perf_counter() - start_s)
        return cache

    def _get(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> tuple[DistilledCache, int]:
        for _ in range(3):
            with self._catalog.read() as session:
                row = self._find(session, text_sha256, fingerprint.digest, keep_ratio)
                if row is None:
                    self._raise_not_found(session, text_sha256, fingerprint, keep_ratio)
                    raise AssertionError("unreachable")
            # From here to the end of the cache nobody evicts it: eviction leaves out what is being read.
            name = f"read {row.blob_key}"
            self._readers.share(name)
            kept = False
            readable = False
            try:
                path = self._vault.verified_path(row.blob_key, row.size_bytes)
                readable = True
                cache = _load(path)
                check_filing(
                    row, text_sha256=cache.text_sha256, fingerprint=cache.fingerprint, keep_ratio=cache.keep_ratio
                )
                finalize(cache, self._readers.unshare, name)
                kept = True
            except FileNotFoundError:
                continue  # removed since: the row is gone too, or it is found missing in the next round
            except MisfiledError as error:
                if self._unfile(row):
                    raise self._corrupt(error.what, row.blob_key, text_sha256) from error
                continue
            except CorruptCacheError as error:
                if self._condemn(row.blob_key, row.size_bytes, recheck=not readable):
                    raise self._corrupt(error.what, row.blob_key, text_sha256) from error
                continue  # deleted or made again by somebody else since
            finally:
                if not kept:
                    self._readers.unshare(name)
            self._note_use(row.id)
            return cache, row.size_bytes
        raise StoreError("the cache changed each time it was read", where=f"text {text_sha256}", next_step="Try again.")

    def has(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> bool:
        """See `Store.has`."""
        with self._catalog.read() as session:
            return self._find(session, text_sha256, fingerprint.digest, keep_ratio) is not None

    def sound(self, text_sha256: str, fingerprint: Fingerprint, keep_ratio: float) -> bool:
        """See `Store.sound`."""
        with self._catalog.read() as session:
            row = self._find(session, text_sha256, fingerprint.digest, keep_ratio)
        if row is None:
            return False
        try:
            check_header(row, self._vault.verified_path(row.blob_key, row.size_bytes))
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
        self.sweep(keys)
        return len(keys)

    def retire(self, session: Session, texts: set[str]) -> list[str]:
        """Delete the caches of texts that no passage of the collection has; returns their blobs, for `sweep`."""
        keys: list[str] = []
        for batch in batches(texts - referred_texts(session, self._collection_id, texts)):
            keys += session.scalars(
                delete(CacheRow)
                .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256.in_(batch))
                .returning(CacheRow.blob_key)
            )
        return keys

    def sweep(self, keys: Iterable[str]) -> int:
        """Remove those blobs that no row of any collection names. What cannot be removed now is left to `gc`.

        Returns:
            Bytes freed.
        """
        freed_bytes = 0
        for batch in batches(set(keys)):
            with suppress(StoreError):
                for key in set(batch) - self._named(batch):
                    # Held by whoever is about to refer to it; looked at again once it is ours, and nobody can be.
                    with self._catalog.hold(f"blob {key}", wait=False) as ours:
                        if ours and not self._named([key]):
                            freed_bytes += self._vault.blobs.delete(key)
        return freed_bytes

    def _named(self, keys: list[str]) -> set[str]:
        """Those of the blobs that a row of any collection names."""
        named: set[str] = set()
        with self._catalog.read() as session:
            for table in (CacheRow, PrefixRow):
                named.update(session.scalars(select(table.blob_key).where(table.blob_key.in_(keys))))
        return named

    # prefixes

    def put_prefix(self, key: str, data: bytes) -> None:
        """See `Store.put_prefix`."""
        blob = blob_key(data)
        left = [blob]
        try:
            with self._catalog.hold(f"blob {blob}"):
                self._vault.put(blob, data)
                with self._catalog.write() as session:
                    row = self._find_prefix(session, key)
                    left = [] if row is None or row.blob_key == blob else [row.blob_key]
                    if row is None:
                        row = PrefixRow(collection_id=self._collection_id, key=key)
                        session.add(row)
                    row.blob_key, row.size_bytes = blob, len(data)
        except BaseException:
            left = [*left, blob]
            raise
        finally:
            self.sweep(left)

    def get_prefix(self, key: str) -> Path | None:
        """See `Store.get_prefix`."""
        for _ in range(3):
            with self._catalog.read() as session:
                row = self._find_prefix(session, key)
            if row is None:
                return None
            try:
                return self._vault.verified_path(row.blob_key, row.size_bytes)
            except CorruptCacheError as error:
                if self._condemn(row.blob_key, row.size_bytes):
                    raise CorruptCacheError(
                        error.what,
                        where=f"prefix {key!r}, blob {row.blob_key}",
                        next_step="Ask again: it is gone now and will be made anew.",
                    ) from error
        raise StoreError("the prefix changed each time it was read", where=f"prefix {key!r}", next_step="Try again.")

    # damage

    def condemn_if_damaged(self, key: str, size_bytes: int) -> bool:
        """Hash a blob now; if it is damaged, quarantine it and delete its rows in all collections."""
        try:
            self._vault.verified_path(key, size_bytes, again=True)
        except CorruptCacheError:
            return self._condemn(key, size_bytes)
        return False

    def unfile_if_wrong(self, row: CacheRow) -> bool:
        """Compare a row with the header of its blob, which is sound; a row that names another's is deleted."""
        try:
            check_header(row, self._vault.verified_path(row.blob_key, row.size_bytes))
        except MisfiledError:
            return self._unfile(row)
        except (FingerprintMismatchError, CorruptCacheError):
            pass  # of another format version; or removed, or damaged, since it was found sound
        return False

    def _unfile(self, row: CacheRow) -> bool:
        """Delete a row that names the blob of something else; False if by now it is gone or names another.

        The blob stays where it is if its own row is there: it is sound.
        """
        with self._catalog.hold(f"blob {row.blob_key}"):
            with self._catalog.write() as session:
                this = delete(CacheRow).where(CacheRow.id == row.id, CacheRow.blob_key == row.blob_key)
                gone = session.scalars(this.returning(CacheRow.id)).all()
            if gone and not self._named([row.blob_key]):
                self._vault.quarantine(row.blob_key)
        return bool(gone)

    def _condemn(self, key: str, size_bytes: int, *, recheck: bool = True) -> bool:
        """Quarantine a blob and delete its rows; False if by now nothing is wrong, or nobody refers to it."""
        with self._catalog.hold(f"blob {key}"):
            if not self._named([key]) or (recheck and self._vault.sound(key, size_bytes)):
                return False
            with self._catalog.write() as session:
                for table in (CacheRow, PrefixRow):
                    session.execute(delete(table).where(table.blob_key == key))
            self._vault.quarantine(key)
        return True

    def _corrupt(self, what: str, key: str, text_sha256: str) -> CorruptCacheError:
        return CorruptCacheError(
            f"a distilled cache is damaged and was quarantined: {what}",
            where=f"{self._document_of(text_sha256)}, blob {key}",
            next_step=_AGAIN,
        )

    # last use

    def flush(self) -> None:
        """Write the times of last use that are still in memory. They are not worth an error: failing drops them."""
        with self._lock:
            used, self._used = self._used, {}
        counts = self._counters.drain()
        if used or counts:
            with suppress(StoreError), self._catalog.write() as session:
                write_counters(session, self._collection_id, counts)
                for row_id, at in used.items():
                    session.execute(update(CacheRow).where(CacheRow.id == row_id).values(last_used_at=at))

    def _note_use(self, row_id: int) -> None:
        with self._lock:
            self._used[row_id] = utc_now()
            full = len(self._used) >= _FLUSH_EVERY
        if full:
            self.flush()

    def counters(self) -> dict[str, float]:
        """See `Store.counters`."""
        self.flush()
        with self._catalog.read() as session:
            return read_counters(session, self._collection_id)

    # looking up

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

    def _find_prefix(self, session: Session, key: str) -> PrefixRow | None:
        return session.scalar(
            select(PrefixRow).where(PrefixRow.collection_id == self._collection_id, PrefixRow.key == key)
        )

    def _document_of(self, text_sha256: str) -> str:
        with self._catalog.read() as session:
            found = session.execute(
                select_passages(self._collection_id).where(PassageRow.text_sha256 == text_sha256).limit(1)
            ).first()
        if found is None:
            return f"text {text_sha256}"
        passage, document = found
        return f"document {document.document_id!r}, passage {passage.ordinal}"

    def _raise_not_found(self, session: Session, text_sha256: str, wanted: Fingerprint, keep_ratio: float) -> None:
        rows = session.execute(
            select(CacheRow.keep_ratio, FingerprintRow.json)
            .join(FingerprintRow, FingerprintRow.digest == CacheRow.fingerprint)
            .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256 == text_sha256, alive(utc_now()))
            .order_by(CacheRow.id.desc())
        ).all()
        where = self._document_of(text_sha256)
        for ratio, json in rows:
            if ratio == keep_ratio:
                Fingerprint.from_json(json).check(wanted, where=where)
        ratios = sorted({ratio for ratio, _ in rows})
        others = f"; there are some at {', '.join(map(str, ratios))}" if ratios else ""
        raise CacheNotFoundError(
            f"no distilled cache at keep_ratio {keep_ratio}{others}",
            where=where,
            next_step="Run `kv-memory add --stale` to make what is missing"
            + (", or ask with one of those keep ratios." if ratios else "."),
        )


def _is_expired(row: CacheRow) -> bool:
    return row.expires_at is not None and row.expires_at <= utc_now()


def _load(path: Path) -> DistilledCache:
    from kv_memory.cache import DistilledCache

    try:
        return DistilledCache.load(path)
    except CorruptCacheError as error:
        # The bytes were just found right, so a failing system call says nothing about them.
        if isinstance(error.__cause__, OSError) and (ours := store_error(error.__cause__, str(path))) is not None:
            raise ours from error
        raise
