"""Deletes documents so that no file of the store holds a byte of them any more.

`delete_document` hides documents from the store, but not from a reader of its files: rows stay in free pages and logs
of the databases, damaged blobs in quarantine, words in the index. Files are unlinked, and not overwritten first:
journaling and copy-on-write file systems and SSDs write to another place than the given one, so overwriting
guarantees nothing. If the medium itself may fall into other hands, encrypt it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diskcache.core import DBNAME
from sqlalchemy import delete, select

from kv_memory.store import documents
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.caches import CacheTable
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.engine import scrub_sqlite
from kv_memory.store.sql.schema import CacheRow, FingerprintRow, PrefixRow

__all__ = ["PurgeReport", "index_folder", "purge"]


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """Removals by `Store.purge`.

    Attributes:
        documents: Ids of the purged documents.
        n_blobs: Number of removed blobs of these documents' caches.
        n_blobs_shared: Number of their blobs that stay, because caches of equal texts in other collections use them
            too.
        n_orphan_blobs: Number of other blobs that no row named.
        n_quarantined: Number of files in quarantine, which cannot be attributed to documents.
        n_strays: Number of leftovers of interrupted writes.
        freed_bytes: Size of the removed blobs and files in bytes.
    """

    documents: tuple[str, ...]
    n_blobs: int
    n_blobs_shared: int
    n_orphan_blobs: int
    n_quarantined: int
    n_strays: int
    freed_bytes: int


def index_folder(folder: Path, collection: str) -> Path:
    """Folder of a collection's index in a store's folder.

    It is named by a hash, because a collection's name may have characters that a file name may not, or lead out of
    the store.
    """
    return folder / "bm25" / hashlib.sha256(collection.encode()).hexdigest()[:16]


def purge(
    cache_table: CacheTable,
    collection_id: int,
    ids: Iterable[str],
    *,
    folder: Path,
    collection: str,
) -> PurgeReport:
    """See `Store.purge`."""
    references = cache_table.references
    catalog, verified_blobs = references.catalog, references.verified_blobs
    chosen = tuple(dict.fromkeys(ids))
    keys: set[str] = set()
    if chosen:
        with catalog.write() as session:
            dropped: set[str] = set()
            for id_ in chosen:
                dropped |= documents.delete_document(session, collection_id, id_)
            keys.update(cache_table.retire(session, dropped))
            session.execute(delete(FingerprintRow).where(FingerprintRow.digest.not_in(select(CacheRow.fingerprint))))
            documents.bump_revision(session, collection_id)
    freed_bytes, n_shared = 0, 0
    for key in keys:
        # Not `BlobReferences.delete_unreferenced`, which silently leaves blobs that it cannot lock at once to `gc`.
        with catalog.hold(f"blob {key}"):
            if _unnamed(catalog, [key]):
                freed_bytes += verified_blobs.blobs.delete(key)
            else:
                n_shared += 1
    audit = verified_blobs.blobs.audit(repair=True)
    orphans = _unnamed(catalog, audit.keys)
    freed_bytes += audit.freed_bytes + references.delete_unreferenced(orphans)
    if isinstance(verified_blobs.blobs, ObjectBlobs):
        # Copies of blobs that another machine purged; anything in the tier may be dropped at any time.
        for key in _unnamed(catalog, verified_blobs.blobs.tier.audit().keys):
            verified_blobs.blobs.tier.delete(key)
    n_quarantined = 0
    with mapped(folder):
        for file in verified_blobs.quarantine_folder.iterdir():
            freed_bytes += file.lstat().st_size
            file.unlink()
            n_quarantined += 1
        index = index_folder(folder, collection)
        if index.is_dir():
            shutil.rmtree(index)
    scrub_sqlite(folder / "blobs" / DBNAME)
    catalog.scrub()
    return PurgeReport(
        documents=chosen,
        n_blobs=len(keys) - n_shared,
        n_blobs_shared=n_shared,
        n_orphan_blobs=len(orphans),
        n_quarantined=n_quarantined,
        n_strays=len(audit.strays),
        freed_bytes=freed_bytes,
    )


def _unnamed(catalog: Catalog, keys: Iterable[str]) -> set[str]:
    """The subset of the blobs that no row of any collection names."""
    unnamed: set[str] = set()
    for batch in documents.batches(keys):
        with catalog.read() as session:
            named: set[str] = set()
            for table in (CacheRow, PrefixRow):
                named.update(session.scalars(select(table.blob_key).where(table.blob_key.in_(batch))))
        unnamed.update(set(batch) - named)
    return unnamed
