"""Checks a store, removes what nothing refers to, and counts its contents."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from pathlib import Path

from sqlalchemy import delete, func, select

from kv_memory.store.blob_references import BlobReferences, named_blobs
from kv_memory.store.documents import Documents, alive, unreferenced
from kv_memory.store.records import CheckReport, GcReport, StoreStats
from kv_memory.store.sql.schema import CacheRow, DocumentRow, FingerprintRow, PassageRow, PrefixRow, utc_now

# A blob or file without a row may belong to a put in progress. An upload takes less than this.
GRACE_S = 600.0


def check(part: Documents) -> CheckReport:
    """See `Store.check`."""
    references = part.references
    # Blobs are listed and hashed while others write, so every difference between the two lists is checked once more.
    audit = references.blobs.audit(min_age_s=GRACE_S)
    with part.catalog.read() as session:
        named = named_blobs(session)
        waiting = session.scalars(select(CacheRow.text_sha256).where(unreferenced(part.collection_id)).distinct()).all()
    missing = _really_missing(references, named.keys() - audit.keys)
    there = {key: size_bytes for key, size_bytes in named.items() if key not in missing}
    damaged = {key for key in sorted(there) if references.quarantine_if_damaged(key, there[key])}
    sound = there.keys() - damaged
    with part.catalog.read() as session:
        rows = session.scalars(select(CacheRow).order_by(CacheRow.id)).all()
    misfiled = [row.text_sha256 for row in rows if row.blob_key in sound and references.drop_if_misfiled(row)]
    return CheckReport(
        n_blobs=len(sound),
        size_bytes=sum(there[key] for key in sound),
        damaged=tuple(sorted(damaged)),
        misfiled=tuple(misfiled),
        missing=tuple(sorted(missing)),
        orphans=tuple(sorted(_really_orphaned(references, audit.keys - audit.young - named.keys()))),
        strays=audit.strays,
        unreferenced=tuple(sorted(waiting)),
    )


def _really_missing(references: BlobReferences, keys: AbstractSet[str]) -> set[str]:
    """The subset of the blobs that do not exist although rows still name them."""
    gone = {key for key in keys if not references.blobs.has(key)}
    with references.catalog.read() as session:
        return gone & named_blobs(session, gone).keys()


def _really_orphaned(references: BlobReferences, keys: AbstractSet[str]) -> set[str]:
    """The subset of the blobs that still no row names."""
    with references.catalog.read() as session:
        return set(keys - named_blobs(session, keys).keys())


def gc(part: Documents) -> GcReport:
    """See `Store.gc`."""
    references = part.references
    audit = references.blobs.audit(min_age_s=GRACE_S, repair=True)
    with part.catalog.read() as session:
        named = named_blobs(session).keys()
    orphans = _really_orphaned(references, audit.keys - audit.young - named)
    missing = _really_missing(references, named - audit.keys)
    # Rows first, in a transaction of their own: if it fails, no blob has been removed under a row that stays.
    with part.catalog.write() as session:
        expired = session.scalars(delete(CacheRow).where(~alive(utc_now())).returning(CacheRow.blob_key)).all()
        waiting = session.scalars(
            delete(CacheRow).where(unreferenced(part.collection_id)).returning(CacheRow.blob_key)
        ).all()
        n_dangling = 0
        for key in missing:
            for table in (CacheRow, PrefixRow):
                n_dangling += len(session.scalars(delete(table).where(table.blob_key == key).returning(table.id)).all())
        session.execute(delete(FingerprintRow).where(FingerprintRow.digest.not_in(select(CacheRow.fingerprint))))
    freed_bytes = audit.freed_bytes + references.delete_unreferenced([*orphans, *waiting, *expired])
    return GcReport(
        n_orphan_blobs=len(orphans),
        n_dangling_rows=n_dangling,
        n_unreferenced_caches=len(waiting),
        n_expired_caches=len(expired),
        n_strays=len(audit.strays),
        freed_bytes=freed_bytes,
    )


def stats(part: Documents) -> StoreStats:
    """See `Store.stats`."""
    with part.catalog.read() as session:
        n_documents = session.scalar(
            select(func.count()).select_from(DocumentRow).where(DocumentRow.collection_id == part.collection_id)
        )
        n_passages, n_tokens = session.execute(
            select(func.count(), func.coalesce(func.sum(PassageRow.n_tokens), 0))
            .join(DocumentRow, DocumentRow.id == PassageRow.document_pk)
            .where(DocumentRow.collection_id == part.collection_id)
        ).one()
        n_caches, cache_bytes = session.execute(
            select(func.count(), func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(
                CacheRow.collection_id == part.collection_id
            )
        ).one()
    return StoreStats(
        n_documents=n_documents or 0,
        n_passages=n_passages,
        n_tokens=n_tokens,
        n_caches=n_caches,
        cache_bytes=cache_bytes,
        disk_bytes=_size_of(part.path),
        n_quarantined=len(os.listdir(part.references.quarantine_folder)),
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
