"""Deletes documents so that no file of the store holds a byte of them any more.

`delete_document` hides documents from the store, but not from a reader of its files: rows stay in free pages and logs
of the databases, damaged blobs in quarantine, words in the index. Files are unlinked, and not overwritten first:
journaling and copy-on-write file systems and SSDs write to another place than the given one, so overwriting
guarantees nothing. If the medium itself may fall into other hands, encrypt it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from diskcache.core import DBNAME

from kv_memory.store import documents
from kv_memory.store.blob_references import named_blobs
from kv_memory.store.blobs.remote import ObjectBlobs
from kv_memory.store.error_mapping import mapped
from kv_memory.store.maintenance import UNUSED_FINGERPRINTS
from kv_memory.store.records import PurgeReport
from kv_memory.store.sql.engine import scrub_sqlite


def purge(part: documents.Documents, ids: Iterable[str]) -> PurgeReport:
    """See `Store.purge`."""
    references, catalog = part.references, part.catalog
    blobs = references.blobs
    chosen = tuple(dict.fromkeys(ids))
    # 1. The rows, of all documents or none.
    keys: set[str] = set()
    if chosen:
        with catalog.write() as session:
            for id_ in chosen:
                keys.update(documents.delete_document(session, part.collection_id, id_))
            session.execute(UNUSED_FINGERPRINTS)
    with catalog.hold("purge"):
        # 2. Blobs without a row: theirs, and those of earlier deletions and interrupted writes, however young. A put
        # in progress finds its blob removed, and stores it again.
        audit = blobs.audit(min_age_s=-1.0, repair=True)
        with catalog.read() as session:
            named = named_blobs(session)
        freed_bytes = audit.freed_bytes + references.remove_unnamed(keys | (audit.keys - named))
        if isinstance(blobs, ObjectBlobs):
            # Copies of blobs that another machine purged; anything in the tier may be dropped at any time.
            for key in blobs.tier.audit(min_age_s=0.0).keys - named:
                blobs.tier.delete(key)
        # 3. Files that say what was in a document.
        n_quarantined = 0
        with mapped(part.path):
            for file in references.quarantine_folder.iterdir():
                freed_bytes += file.lstat().st_size
                file.unlink()
                n_quarantined += 1
            if part.index_folder.is_dir():
                shutil.rmtree(part.index_folder)
        # 4. What the databases keep of deleted rows.
        scrub_sqlite(part.path / "blobs" / DBNAME)
        catalog.scrub()
    return PurgeReport(
        documents=chosen,
        n_blobs=len(keys - named),
        n_blobs_shared=len(keys & named),
        n_orphan_blobs=len(audit.keys - named - keys),
        n_quarantined=n_quarantined,
        n_strays=len(audit.strays),
        freed_bytes=freed_bytes,
    )
