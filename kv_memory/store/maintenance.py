"""Checks a store, removes what nothing refers to, and counts its contents."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from kv_memory.errors import CorruptCacheError
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.blobs.verified import VerifiedBlobs
from kv_memory.store.documents import unreferenced
from kv_memory.store.eviction import alive
from kv_memory.store.records import CheckReport, GcReport, StoreStats
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CacheRow, DocumentRow, FingerprintRow, PassageRow, PrefixRow, utc_now

__all__ = ["check", "count", "gc"]


def _named_blobs(session: Session) -> dict[str, int]:
    """Every blob that a row of any collection names, with its size in bytes."""
    named: dict[str, int] = {}
    for table in (CacheRow, PrefixRow):
        for key, size_bytes in session.execute(select(table.blob_key, table.size_bytes)):
            named[key] = size_bytes
    return named


def check(references: BlobReferences, collection_id: int) -> CheckReport:
    """See `Store.check`."""
    catalog, verified_blobs = references.catalog, references.verified_blobs
    # Blobs are listed and hashed while others write, so every difference between the two lists is checked once more.
    audit = verified_blobs.blobs.audit()
    with catalog.read() as session:
        named = _named_blobs(session)
        waiting = session.scalars(select(CacheRow.text_sha256).where(unreferenced(collection_id)).distinct()).all()
    missing = _really_missing(catalog, verified_blobs, named.keys() - audit.keys)
    there = {key: size_bytes for key, size_bytes in named.items() if key not in missing}
    damaged = {key for key in sorted(there) if references.quarantine_if_damaged(key, there[key])}
    sound = there.keys() - damaged
    with catalog.read() as session:
        rows = session.scalars(select(CacheRow).order_by(CacheRow.id)).all()
    misfiled = [row.text_sha256 for row in rows if row.blob_key in sound and references.drop_if_misfiled(row)]
    return CheckReport(
        n_blobs=len(sound),
        size_bytes=sum(there[key] for key in sound),
        damaged=tuple(sorted(damaged)),
        misfiled=tuple(misfiled),
        missing=tuple(sorted(missing)),
        orphans=tuple(sorted(_really_orphaned(catalog, audit.keys - named.keys()))),
        strays=audit.strays,
        unreferenced=tuple(sorted(waiting)),
    )


def _really_missing(catalog: Catalog, verified_blobs: VerifiedBlobs, keys: AbstractSet[str]) -> set[str]:
    """The subset of the blobs that do not exist although rows still name them."""
    with catalog.read() as session:
        still = keys & _named_blobs(session).keys() if keys else set()
    return {key for key in still if not _is_there(verified_blobs, key)}


def _is_there(verified_blobs: VerifiedBlobs, key: str) -> bool:
    try:
        return verified_blobs.blobs.path(key) is not None
    except CorruptCacheError:
        return False


def _really_orphaned(catalog: Catalog, keys: AbstractSet[str]) -> set[str]:
    """The subset of the blobs that no row names, and that no writer is about to name."""
    free = set()
    for key in keys:
        with catalog.hold(f"blob {key}", wait=False) as ours:
            if ours:
                free.add(key)
    with catalog.read() as session:
        return free - _named_blobs(session).keys() if free else set()


def gc(references: BlobReferences, collection_id: int) -> GcReport:
    """See `Store.gc`."""
    catalog, verified_blobs = references.catalog, references.verified_blobs
    audit = verified_blobs.blobs.audit(repair=True)
    with catalog.read() as session:
        named = _named_blobs(session)
    orphans = _really_orphaned(catalog, audit.keys - named.keys())
    missing = _really_missing(catalog, verified_blobs, named.keys() - audit.keys)
    # Rows first, in a transaction of their own: if it fails, no blob has been removed under a row that stays.
    with catalog.write() as session:
        expired = session.execute(
            delete(CacheRow).where(~alive(utc_now())).returning(CacheRow.id, CacheRow.blob_key)
        ).all()
        waiting = session.execute(
            delete(CacheRow).where(unreferenced(collection_id)).returning(CacheRow.id, CacheRow.blob_key)
        ).all()
        n_dangling = 0
        for key in missing:
            for table in (CacheRow, PrefixRow):
                n_dangling += len(session.scalars(delete(table).where(table.blob_key == key).returning(table.id)).all())
        session.execute(delete(FingerprintRow).where(FingerprintRow.digest.not_in(select(CacheRow.fingerprint))))
    freed_bytes = audit.freed_bytes + references.delete_unreferenced(
        [*orphans, *(row.blob_key for row in (*waiting, *expired))]
    )
    return GcReport(
        n_orphan_blobs=len(orphans),
        n_dangling_rows=n_dangling,
        n_unreferenced_caches=len(waiting),
        n_expired_caches=len(expired),
        n_strays=len(audit.strays),
        freed_bytes=freed_bytes,
    )


def count(catalog: Catalog, folder: Path, quarantine: Path, collection_id: int) -> StoreStats:
    """See `Store.stats`."""
    with catalog.read() as session:
        n_documents = session.scalar(
            select(func.count()).select_from(DocumentRow).where(DocumentRow.collection_id == collection_id)
        )
        n_passages, n_tokens = session.execute(
            select(func.count(), func.coalesce(func.sum(PassageRow.n_tokens), 0))
            .join(DocumentRow, DocumentRow.id == PassageRow.document_pk)
            .where(DocumentRow.collection_id == collection_id)
        ).one()
        n_caches, cache_bytes = session.execute(
            select(func.count(), func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(
                CacheRow.collection_id == collection_id
            )
        ).one()
    return StoreStats(
        n_documents=n_documents or 0,
        n_passages=n_passages,
        n_tokens=n_tokens,
        n_caches=n_caches,
        cache_bytes=cache_bytes,
        disk_bytes=_size_of(folder),
        n_quarantined=len(os.listdir(quarantine)),
    )


def _size_of(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except FileNotFoundError:
                continue  # a temporary file of another process
    return total
