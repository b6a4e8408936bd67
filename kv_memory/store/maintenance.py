"""Checks a store, removes what nothing refers to, and counts its contents."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet

from sqlalchemy import delete, func, select

from kv_memory.store.blob_references import BlobReferences, MisfiledError, delete_rows, named_blobs
from kv_memory.store.blobs.local import BlobAudit
from kv_memory.store.documents import Documents, alive, unreferenced
from kv_memory.store.fs import walk_files
from kv_memory.store.records import CheckReport, GcReport, StoreStats
from kv_memory.store.sql.schema import CacheRow, DocumentRow, FingerprintRow, PassageRow, PrefixRow, utc_now

# A blob or file without a row may belong to a put in progress. An upload takes less than this.
GRACE_S = 600.0

UNUSED_FINGERPRINTS = delete(FingerprintRow).where(FingerprintRow.digest.not_in(select(CacheRow.fingerprint)))


def check(part: Documents) -> CheckReport:
    """See `Store.check`."""
    references = part.references
    audit = references.blobs.audit(min_age_s=GRACE_S)
    with part.catalog.read() as session:
        rows = [*session.scalars(select(CacheRow).order_by(CacheRow.id)), *session.scalars(select(PrefixRow))]
        waiting = session.scalars(select(CacheRow.text_sha256).where(unreferenced(part.collection_id)).distinct()).all()
    there = {row.blob_key: row.size_bytes for row in rows}
    missing, orphans = _differences(references, audit, there.keys())
    sound = there.keys() - missing
    hashed: set[str] = set()
    damaged: set[str] = set()
    misfiled: list[str] = []
    for row in rows:
        if row.blob_key not in sound:
            continue
        error = references.verify(row, again=row.blob_key not in hashed)
        hashed.add(row.blob_key)
        if isinstance(row, CacheRow) and isinstance(error, MisfiledError):
            misfiled.append(row.text_sha256)
        elif error is not None:
            damaged.add(row.blob_key)
    return CheckReport(
        n_blobs=len(sound - damaged),
        size_bytes=sum(there[key] for key in sound - damaged),
        damaged=tuple(sorted(damaged)),
        misfiled=tuple(misfiled),
        missing=tuple(sorted(missing)),
        orphans=tuple(sorted(orphans)),
        strays=tuple(sorted(audit.strays)),
        unreferenced=tuple(sorted(waiting)),
    )


def _differences(references: BlobReferences, audit: BlobAudit, named: AbstractSet[str]) -> tuple[set[str], set[str]]:
    """Blobs that rows name and that do not exist, and blobs that no row names.

    Others write while blobs and rows are listed, so every difference between the two lists is checked once more.
    """
    missing = {key for key in named - audit.keys if not references.blobs.has(key)}
    orphans = audit.keys - audit.young - named
    with references.catalog.read() as session:
        return missing & named_blobs(session, missing), orphans - named_blobs(session, orphans)


def gc(part: Documents) -> GcReport:
    """See `Store.gc`."""
    references = part.references
    audit = references.blobs.audit(min_age_s=GRACE_S, repair=True)
    with part.catalog.read() as session:
        named = named_blobs(session)
    missing, orphans = _differences(references, audit, named)
    # Rows first, in a transaction of their own: if it fails, no blob has been removed under a row that stays.
    with part.catalog.write() as session:
        expired = session.scalars(delete(CacheRow).where(~alive(utc_now())).returning(CacheRow.blob_key)).all()
        waiting = session.scalars(
            delete(CacheRow).where(unreferenced(part.collection_id)).returning(CacheRow.blob_key)
        ).all()
        n_dangling = sum(len(delete_rows(session, key)) for key in missing)
        session.execute(UNUSED_FINGERPRINTS)
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
        n_documents, n_passages, n_tokens = session.execute(
            select(
                func.count(DocumentRow.id.distinct()),
                func.count(PassageRow.id),
                func.coalesce(func.sum(PassageRow.n_tokens), 0),
            )
            .outerjoin(PassageRow, PassageRow.document_pk == DocumentRow.id)
            .where(DocumentRow.collection_id == part.collection_id)
        ).one()
        n_caches, cache_bytes = session.execute(
            select(func.count(), func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(
                CacheRow.collection_id == part.collection_id
            )
        ).one()
    return StoreStats(
        n_documents=n_documents,
        n_passages=n_passages,
        n_tokens=n_tokens,
        n_caches=n_caches,
        cache_bytes=cache_bytes,
        disk_bytes=sum(status.st_size for _, status in walk_files(part.path)),
        n_quarantined=len(os.listdir(part.references.quarantine_folder)),
    )
