"""Reads a collection for an export: groups of documents from the catalog, in the order of their ids."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

import kv_memory
from kv_memory.model.embedded import recorded_settings
from kv_memory.store.documents import alive, batches
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import (
    CacheRow,
    CollectionRow,
    DocumentRow,
    FingerprintRow,
    PassageRow,
    PrefixRow,
    utc_now,
)
from kv_memory.store.transfer.archive import FORMAT, ArchiveHeader
from kv_memory.store.transfer.manifest import DocumentRows, Group

__all__ = ["Gatherer", "Seen"]

_GROUP_DOCUMENTS = 64
_GROUP_PASSAGES = 1000


class Gatherer:
    """Reads a collection group by group, each in a transaction of its own.

    Args:
        catalog: Catalog of the store.
        collection_id: Catalog row of the collection to read.

    Attributes:
        seen: Keys of blobs already in the archive, maintained by the caller: groups do not list them again.
    """

    def __init__(self, catalog: Catalog, collection_id: int) -> None:
        self._catalog = catalog
        self._collection_id = collection_id
        self.seen = Seen()

    def header(self) -> ArchiveHeader:
        """The first member of the archive."""
        with self._catalog.read() as session:
            row = session.get_one(CollectionRow, self._collection_id)
            n_documents = select(func.count()).where(DocumentRow.collection_id == self._collection_id)
            size = select(func.coalesce(func.sum(CacheRow.size_bytes), 0)).where(
                CacheRow.collection_id == self._collection_id
            )
            return ArchiveHeader(
                format=FORMAT,
                written_by=kv_memory.__version__,
                collection=row.name,
                collection_created_at=row.created_at.isoformat(),
                revision=row.revision,
                settings=recorded_settings(row.settings),
                n_documents=session.scalar(n_documents) or 0,
                size_bytes=int(session.scalar(size) or 0),
            )

    def group(self, cursor: str | None, *, first: bool) -> Group | None:
        """The next documents with all that belongs to them; None after the last one."""
        with self._catalog.read() as session:
            group = Group()
            if first:
                group.prefixes.extend(
                    session.scalars(select(PrefixRow).where(PrefixRow.collection_id == self._collection_id))
                )
            self._add_documents(session, group, cursor)
            if not group.documents and not group.prefixes:
                return None
            self._add_caches(session, group)
        sizes = {row.blob_key: row.size_bytes for row in group.with_blobs}
        group.blobs.extend((key, size_bytes) for key, size_bytes in sizes.items() if key not in self.seen)
        return group

    def _add_documents(self, session: Session, group: Group, cursor: str | None) -> None:
        # Two statements: a single one with JOIN and GROUP BY would read the rest of the collection for every group.
        following = (
            select(DocumentRow.id)
            .where(DocumentRow.collection_id == self._collection_id)
            .order_by(DocumentRow.document_id)
            .limit(_GROUP_DOCUMENTS)
        )
        if cursor is not None:
            following = following.where(DocumentRow.document_id > cursor)
        pks = session.scalars(following).all()
        counted = select(PassageRow.document_pk, func.count()).where(PassageRow.document_pk.in_(pks))
        counts = {pk: count for pk, count in session.execute(counted.group_by(PassageRow.document_pk))}
        chosen: list[int] = []
        n_passages = 0
        for pk in pks:
            n_passages += counts.get(pk, 0)
            if chosen and n_passages > _GROUP_PASSAGES:
                break
            chosen.append(pk)
        documents = session.scalars(
            select(DocumentRow).where(DocumentRow.id.in_(chosen)).order_by(DocumentRow.document_id)
        ).all()
        passages: dict[int, list[PassageRow]] = {pk: [] for pk in chosen}
        for passage in session.scalars(
            select(PassageRow).where(PassageRow.document_pk.in_(chosen)).order_by(PassageRow.ordinal)
        ):
            passages[passage.document_pk].append(passage)
        group.documents.extend(DocumentRows(document=row, passages=passages[row.id]) for row in documents)

    def _add_caches(self, session: Session, group: Group) -> None:
        texts = {passage.text_sha256 for rows in group.documents for passage in rows.passages}
        now = utc_now()
        for batch in batches(sorted(texts)):
            found = session.scalars(
                select(CacheRow)
                .where(CacheRow.collection_id == self._collection_id, CacheRow.text_sha256.in_(batch), alive(now))
                .order_by(CacheRow.id)
            )
            group.caches.extend(found)
        for digest in {row.fingerprint for row in group.caches}:
            group.fingerprints[digest] = session.get_one(FingerprintRow, digest).json


class Seen:
    """A set of blob keys that need not fit into memory."""

    def __init__(self) -> None:
        # A database without a name is in an unlinked temporary file, and in memory while it is small.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._count = 0

    def __contains__(self, key: str) -> bool:
        found = self._database.execute("SELECT 1 FROM seen WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        return found is not None

    def __len__(self) -> int:
        count: int = self._database.execute("SELECT count(*) FROM seen").fetchone()[0]
        return count

    def add(self, key: str) -> None:
        """Add a key."""
        self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (bytes.fromhex(key),))

    def forget(self, keys: Iterable[str]) -> None:
        """Remove keys."""
        self._database.executemany("DELETE FROM seen WHERE key = ?", ((bytes.fromhex(key),) for key in keys))

    def clear(self) -> None:
        """Remove all keys."""
        self._database.execute("DELETE FROM seen")

    def close(self) -> None:
        """Remove the temporary database."""
        self._database.close()
