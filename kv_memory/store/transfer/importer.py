"""Imports a collection from an archive: verified first, then group by group, blobs before rows, documents last.

An interrupted import leaves only sound data visible: a cache's row comes after its blob, a document after its caches.
The next import of the same archive skips what is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from kv_memory.config import check_choice
from kv_memory.errors import TransferError
from kv_memory.model.embedded import recorded_settings
from kv_memory.store import documents
from kv_memory.store.caches import Caches
from kv_memory.store.sql.schema import CollectionRow, DocumentRow, PassageRow
from kv_memory.store.transfer.archive_reader import ArchiveReader
from kv_memory.store.transfer.manifest import DocumentRows, Group
from kv_memory.store.transfer.part_files import (
    ImportReport,
    OnConflict,
    TransferProgress,
    open_archive,
    tell,
    verify_archive,
)
from kv_memory.store.transfer.receiving import Receiver

__all__ = ["import_collection"]


def import_collection(
    cache_table: Caches,
    collection_id: int,
    source: Path | str | ArchiveReader,
    *,
    on_conflict: OnConflict,
    on_progress: Callable[[TransferProgress], None] | None = None,
) -> ImportReport:
    """See `Store.import_from`."""
    check_choice(on_conflict, OnConflict, where="on_conflict")
    if not isinstance(source, ArchiveReader):
        with open_archive(source) as archive:
            return _Import(cache_table, collection_id, archive, on_conflict, on_progress).run()
    return _Import(cache_table, collection_id, source, on_conflict, on_progress).run()


class _Import:
    def __init__(
        self,
        cache_table: Caches,
        collection_id: int,
        archive: ArchiveReader,
        on_conflict: OnConflict,
        on_progress: Callable[[TransferProgress], None] | None,
    ) -> None:
        self._catalog = cache_table.references.catalog
        self._cache_table = cache_table
        self._collection_id = collection_id
        self._archive = archive
        self._on_conflict = on_conflict
        self._on_progress = on_progress
        self._receiver = Receiver(cache_table, collection_id)
        self._counts: Counter[str] = Counter()
        self._conflicts: list[str] = []

    def run(self) -> ImportReport:
        self._refuse_other_settings()
        if self._archive.can_rewind:
            # The whole archive first: one that is damaged, or would be refused half way, then changes nothing.
            refusing = self._judge if self._on_conflict == "refuse" else None
            verify_archive(self._archive, self._on_progress, on_group=refusing)
            self._archive.rewind()
        self._take_settings()
        total = self._archive.size_bytes
        for group in self._archive.groups():
            verdicts = self._judge(group)
            for _ in self._receiver.take(self._archive, group, _texts(group, verdicts)):
                tell(self._on_progress, "import", self._counts["documents"], self._archive.offset, total)
            self._take_documents(group)
            self._counts["documents"] += len(group.documents)
            tell(self._on_progress, "import", self._counts["documents"], self._archive.offset, total)
        with self._catalog.read() as session:
            name = session.get_one(CollectionRow, self._collection_id).name
        received = self._receiver.received
        return ImportReport(
            collection=name,
            n_documents=self._counts["documents"],
            n_added=self._counts["add"],
            n_replaced=self._counts["replace"],
            n_unchanged=self._counts["same"],
            conflicts=tuple(self._conflicts),
            n_caches=received.n_caches,
            n_caches_present=received.n_present,
            n_caches_left_out=received.n_left_out,
            n_evicted=received.n_evicted,
            size_bytes=received.size_bytes,
        )

    # settings

    def _refuse_other_settings(self) -> None:
        with self._catalog.read() as session:
            row = session.get_one(CollectionRow, self._collection_id)
            if self._has_documents(session) and recorded_settings(row.settings) != self._archive.header.settings:
                raise self._other_settings(row)

    def _take_settings(self) -> None:
        with self._catalog.write() as session:
            row = session.get_one(CollectionRow, self._collection_id)
            if recorded_settings(row.settings) == self._archive.header.settings:
                return
            if self._has_documents(session):
                raise self._other_settings(row)
            row.settings = dict(self._archive.header.settings)

    def _has_documents(self, session: Session) -> bool:
        statement = select(DocumentRow.id).where(DocumentRow.collection_id == self._collection_id).limit(1)
        return session.scalar(statement) is not None

    def _other_settings(self, row: CollectionRow) -> TransferError:
        theirs, ours = self._archive.header.settings, recorded_settings(row.settings)
        names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        told = "; ".join(f"{n} is {_short(theirs.get(n))} in the archive, {_short(ours.get(n))} here" for n in names)
        return TransferError(
            f"the collection has documents with other settings: {told}",
            where=f"collection {row.name!r}",
            next_step="Import into a new collection (`--collection NAME`).",
        )

    # documents

    def _judge(self, group: Group) -> dict[str, str]:
        """Action for each document: `add`, `replace`, `same` or `leave`."""
        with self._catalog.read() as session:
            there = self._there(session, group)
            return {rows.document.document_id: self._verdict(there, rows) for rows in group.documents}

    def _there(self, session: Session, group: Group) -> dict[str, tuple[DocumentRow, list[str]]]:
        """The existing documents with the group's ids, and the hashes of their texts."""
        found: dict[int, tuple[DocumentRow, list[str]]] = {}
        for batch in documents.batches(rows.document.document_id for rows in group.documents):
            for row in session.scalars(
                select(DocumentRow).where(
                    DocumentRow.collection_id == self._collection_id, DocumentRow.document_id.in_(batch)
                )
            ):
                found[row.id] = (row, [])
        for pks in documents.batches(found):
            texts = select(PassageRow.document_pk, PassageRow.text_sha256).where(PassageRow.document_pk.in_(pks))
            for pk, text_sha256 in session.execute(texts.order_by(PassageRow.ordinal)):
                found[pk][1].append(text_sha256)
        return {row.document_id: (row, texts) for row, texts in found.values()}

    def _verdict(self, there: dict[str, tuple[DocumentRow, list[str]]], rows: DocumentRows) -> str:
        new = rows.document
        if new.document_id not in there:
            return "add"
        old, texts = there[new.document_id]
        if old.content_sha256 == new.content_sha256 and texts == [passage.text_sha256 for passage in rows.passages]:
            told = [(row.source_uri, row.details, row.passage_tokens) for row in (old, new)]
            return "replace" if self._on_conflict == "replace" and told[0] != told[1] else "same"
        if self._on_conflict == "refuse":
            raise TransferError(
                "the collection has a document with this id and another text",
                where=f"document {new.document_id!r}",
                next_step="Choose which one to keep with --on-conflict skip or --on-conflict replace, or import into "
                "another collection.",
            )
        return "replace" if self._on_conflict == "replace" else "leave"

    def _take_documents(self, group: Group) -> None:
        done: list[tuple[str, str]] = []
        swept: list[str] = []
        if not group.documents:
            return
        with self._catalog.write() as session:
            # Judged again: another process may have added or removed a document since.
            there = self._there(session, group)
            for rows in group.documents:
                verdict = self._verdict(there, rows)
                if verdict in {"add", "replace"}:
                    swept += self._write(session, rows, replaced=verdict == "replace")
                done.append((verdict, rows.document.document_id))
            if any(verdict in {"add", "replace"} for verdict, _ in done):
                documents.bump_revision(session, self._collection_id)
        self._counts.update(verdict for verdict, _ in done)
        self._conflicts += [id_ for verdict, id_ in done if verdict == "leave"]
        self._cache_table.references.delete_unreferenced(swept)

    def _write(self, session: Session, rows: DocumentRows, *, replaced: bool) -> list[str]:
        """Insert a document, replacing an old one; returns the keys of blobs that the collection no longer needs."""
        dropped: set[str] = set()
        if replaced:
            dropped = documents.delete_document(session, self._collection_id, rows.document.document_id)
        rows.document.collection_id = self._collection_id
        session.add(rows.document)
        session.flush()
        for passage in rows.passages:
            passage.document_pk = rows.document.id
        session.add_all(rows.passages)
        session.flush()
        return documents.retire_caches(session, self._collection_id, dropped)


def _texts(group: Group, verdicts: dict[str, str]) -> set[str]:
    """Hashes of the texts with wanted caches: those of documents that are not left out."""
    return {
        passage.text_sha256
        for rows in group.documents
        if verdicts[rows.document.document_id] != "leave"
        for passage in rows.passages
    }


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
