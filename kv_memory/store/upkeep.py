"""Checking the store, removing what nothing refers to, and counting."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from kv_memory.store.catalog import Catalog
from kv_memory.store.documents import unreferenced
from kv_memory.store.records import CheckReport, GcReport, StoreStats
from kv_memory.store.schema import CacheRow, DocumentRow, FingerprintRow, PassageRow, PrefixRow
from kv_memory.store.shelf import Shelf
from kv_memory.store.vault import Vault

__all__ = ["check", "count", "gc"]


def _named_blobs(session: Session) -> dict[str, int]:
    """Every blob that a row of any collection names, with its size in bytes."""
    named: dict[str, int] = {}
    for table in (CacheRow, PrefixRow):
        for key, size_bytes in session.execute(select(table.blob_key, table.size_bytes)):
            named[key] = size_bytes
    return named


def check(catalog: Catalog, vault: Vault, shelf: Shelf, collection_id: int) -> CheckReport:
    """See `Store.check`."""
    # Listed under the write lock, so that no blob is on its way between the two lists. Hashed outside it: reading
    # gigabytes would hold every writer up.
    with catalog.write() as session:
        audit = vault.blobs.audit()
        named = _named_blobs(session)
        waiting = session.scalars(select(CacheRow.text_sha256).where(unreferenced(collection_id)).distinct()).all()
    there = {key: size_bytes for key, size_bytes in named.items() if key in audit.keys}
    damaged = {key for key in sorted(there) if shelf.condemn_if_damaged(key, there[key])}
    sound = there.keys() - damaged
    return CheckReport(
        n_blobs=len(sound),
        size_bytes=sum(there[key] for key in sound),
        damaged=tuple(sorted(damaged)),
        missing=tuple(sorted(named.keys() - audit.keys)),
        orphans=tuple(sorted(audit.keys - named.keys())),
        strays=audit.strays,
        unreferenced=tuple(sorted(waiting)),
    )


def gc(catalog: Catalog, vault: Vault, collection_id: int) -> GcReport:
    """See `Store.gc`."""
    # Rows first, in a transaction of their own: if it fails, no blob was removed under a row that stays.
    with catalog.write() as session:
        there = vault.blobs.audit().keys
        n_orphans = len(there - _named_blobs(session).keys())
        n_unreferenced = len(
            session.scalars(delete(CacheRow).where(unreferenced(collection_id)).returning(CacheRow.id)).all()
        )
        n_dangling = 0
        for key in _named_blobs(session).keys() - there:
            for table in (CacheRow, PrefixRow):
                n_dangling += len(session.scalars(delete(table).where(table.blob_key == key).returning(table.id)).all())
        session.execute(delete(FingerprintRow).where(FingerprintRow.digest.not_in(select(CacheRow.fingerprint))))
    with catalog.write() as session:
        audit = vault.blobs.audit(repair=True)
        unnamed = audit.keys - _named_blobs(session).keys()
        freed_bytes = audit.freed_bytes + sum(vault.blobs.delete(key) for key in unnamed)
    return GcReport(
        n_orphan_blobs=n_orphans,
        n_dangling_rows=n_dangling,
        n_unreferenced_caches=n_unreferenced,
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
