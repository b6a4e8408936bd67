"""The documents, passages and settings of one collection, and the queries on them that the rest of the store shares."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, exists, func, insert, or_, select
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.errors import ConfigError, DocumentNotFoundError, UnreadableDocumentError
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.records import DocumentRecord, DocumentSummary, PassageRecord, StoredPassage, StoredVector
from kv_memory.store.sql.catalog import batches
from kv_memory.store.sql.schema import CacheRow, CollectionRow, DocumentRow, PassageRow, utc_now

# Columns under the names of the fields of `PassageRecord` and `StoredPassage`.
_PASSAGE = (
    PassageRow.text,
    PassageRow.n_tokens,
    PassageRow.text_sha256,
    PassageRow.terms,
    PassageRow.language,
    PassageRow.headings,
)
_VECTOR = (PassageRow.encoder, PassageRow.vector)
_STORED = (*_PASSAGE, PassageRow.ordinal, DocumentRow.document_id, DocumentRow.details.label("metadata"))


class Documents:
    """Documents and settings of one collection: the part of `Store` that only needs rows.

    Args:
        path: Folder of the store.
        collection: Name of the collection.
        collection_id: Row of the collection in the catalog.
        references: Catalog and blobs of the store.
    """

    def __init__(self, path: Path, collection: str, collection_id: int, references: BlobReferences) -> None:
        self.path = path
        self.collection = collection
        self.collection_id = collection_id
        self.references = references
        self.catalog = references.catalog

    @property
    def index_folder(self) -> Path:
        """Folder of the index over the collection's passages."""
        # Named by a hash: a collection's name may have characters that a file name may not, or lead out of the store.
        return self.path / "bm25" / hashlib.sha256(self.collection.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """The collection's settings, as given to `update_settings`."""
        with self.catalog.read() as session:
            return dict(session.get_one(CollectionRow, self.collection_id).settings)

    def update_settings(self, values: Mapping[str, Any]) -> None:
        """Set some of the collection's settings and keep the others.

        Raises:
            ConfigError: A value is not JSON-serialisable.
        """
        try:
            json.dumps(dict(values))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"settings must be JSON-serialisable: {error}", where="settings") from error
        with self.catalog.write() as session:
            row = session.get_one(CollectionRow, self.collection_id)
            row.settings = {**row.settings, **values}  # written only if it differs

    @property
    def revision(self) -> int:
        """Revision number, which grows whenever a document is put or deleted; derived data is keyed by it."""
        with self.catalog.read() as session:
            return session.scalars(select(CollectionRow.revision).where(CollectionRow.id == self.collection_id)).one()

    def put_document(self, record: DocumentRecord, *, settings: Mapping[str, Any] | None = None) -> None:
        """Insert a document, or replace the one of the same id, in one transaction.

        Settings are recorded with it, see `update_settings`.

        Caches of texts that only its previous version had are deleted. Caches that a running `add` has put for a
        document still to come are not touched.

        Raises:
            ConfigError: The metadata is not JSON-serialisable.
            UnreadableDocumentError: The id, the source URI or a text cannot be stored.
        """
        _check(record)
        before: dict[str, bool] = {}
        keys: list[str] = []
        with self.catalog.write() as session:
            row = _row(session, self.collection_id, record.id)
            if row is None:
                created_at = record.created_at or utc_now()
                row = DocumentRow(collection_id=self.collection_id, document_id=record.id, created_at=created_at)
                session.add(row)
            else:
                before = _texts_of(session, row)
                session.execute(delete(PassageRow).where(PassageRow.document_pk == row.id))
            row.content_sha256, row.source_uri = record.content_sha256, record.source_uri
            row.details, row.passage_tokens = dict(record.metadata), record.passage_tokens
            row.updated_at = utc_now()
            session.flush()
            rows = [
                {**_values(passage), "document_pk": row.id, "ordinal": ordinal}
                for ordinal, passage in enumerate(record.passages)
            ]
            if rows:
                session.execute(insert(PassageRow), rows)
            if dropped := before.keys() - {passage.text_sha256 for passage in record.passages}:
                keys = _retire_caches(session, self.collection_id, dropped)
            collection = session.get_one(CollectionRow, self.collection_id)
            collection.revision += 1
            collection.settings = {**collection.settings, **(settings or {})}
        if keys:
            self.references.delete_unreferenced(keys)
        if any(before.values()) and any(passage.text is None for passage in record.passages):
            # The index may have been built from these texts; the next question rebuilds it, without their words.
            shutil.rmtree(self.index_folder, ignore_errors=True)

    def delete_document(self, id: str) -> None:
        """Delete a document, its passages, and its caches of texts that no other document has.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self.catalog.write() as session:
            keys = delete_document(session, self.collection_id, id)
        self.references.delete_unreferenced(keys)

    def document(self, id: str) -> DocumentRecord:
        """A document with its passages.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self.catalog.read() as session:
            return _record(session, find_document(session, self.collection_id, id))

    def documents(self, *, after: str | None = None, limit: int | None = None) -> list[DocumentSummary]:
        """Documents without their text, ordered by id.

        Args:
            after: Id that the listed ones come after; None begins with the first.
            limit: Largest number of documents; None lists all.
        """
        n_tokens = func.coalesce(func.sum(PassageRow.n_tokens), 0)
        statement = (
            select(DocumentRow, func.count(PassageRow.id), func.count(PassageRow.text), n_tokens)
            .select_from(DocumentRow)
            .outerjoin(PassageRow)
            .where(DocumentRow.collection_id == self.collection_id)
            .group_by(DocumentRow.id)
            .order_by(DocumentRow.document_id)
            .limit(limit)
        )
        if after is not None:
            statement = statement.where(DocumentRow.document_id > after)
        with self.catalog.read() as session:
            return [
                DocumentSummary(**_shared(row), n_passages=n_passages, n_texts=n_texts, n_tokens=n_tokens)
                for row, n_passages, n_texts, n_tokens in session.execute(statement)
            ]

    def metadata(self) -> dict[str, dict[str, Any]]:
        """The metadata of all documents by id."""
        rows = select(DocumentRow.document_id, DocumentRow.details)
        with self.catalog.read() as session:
            found = session.execute(rows.where(DocumentRow.collection_id == self.collection_id))
            return {document_id: details for document_id, details in found}

    def has_document(self, id: str) -> bool:
        """Whether the collection has a document with this id."""
        with self.catalog.read() as session:
            return _row(session, self.collection_id, id) is not None

    def find_document(self, id: str, fingerprint: Fingerprint, keep: Keep) -> tuple[DocumentRecord, set[str]] | None:
        """A document, and the hashes of its texts that `cached_texts` returns; None if there is no such document."""
        with self.catalog.read() as session:
            row = _row(session, self.collection_id, id)
            if row is None:
                return None
            record = _record(session, row)
            texts = {passage.text_sha256 for passage in record.passages}
            return record, self._cached(session, texts, fingerprint, keep)

    def cached_texts(self, texts: Iterable[str], fingerprint: Fingerprint, keep: Keep) -> set[str]:
        """The subset of `texts` (hashes) that have a cache of exactly this amount; the blobs are not checked."""
        with self.catalog.read() as session:
            return self._cached(session, texts, fingerprint, keep)

    def _cached(self, session: Session, texts: Iterable[str], fingerprint: Fingerprint, keep: Keep) -> set[str]:
        found: set[str] = set()
        for batch in batches(texts):
            rows = session.execute(
                select(CacheRow.text_sha256, CacheRow.keep_ratio, CacheRow.n_tokens).where(
                    CacheRow.collection_id == self.collection_id,
                    CacheRow.fingerprint == fingerprint.digest,
                    CacheRow.text_sha256.in_(batch),
                    alive(utc_now()),
                )
            )
            found.update(text for text, ratio, n_tokens in rows if keep.fits(ratio, n_tokens, fingerprint))
        return found

    def passages(self) -> list[StoredPassage]:
        """All passages, ordered by document id and ordinal."""
        with self.catalog.read() as session:
            return [StoredPassage(**row._asdict()) for row in session.execute(_passages(self.collection_id, *_STORED))]

    def vectors(self) -> list[StoredVector]:
        """The vectors of all passages, ordered by document id and ordinal."""
        columns = (DocumentRow.document_id, PassageRow.ordinal, PassageRow.text_sha256, *_VECTOR)
        with self.catalog.read() as session:
            return [StoredVector(**row._asdict()) for row in session.execute(_passages(self.collection_id, *columns))]

    def documents_without_vectors(self, encoder: str) -> set[str]:
        """The ids of documents with a passage that has no vector of this encoder."""
        lacking = _passages(self.collection_id, DocumentRow.document_id).where(PassageRow.encoder != encoder)
        with self.catalog.read() as session:
            return set(session.scalars(lacking.order_by(None).distinct()))

    def missing(self, fingerprint: Fingerprint, keep_ratio: float | Keep) -> list[StoredPassage]:
        """The passages without a cache under these settings, ordered by document id and ordinal."""
        keep = keep_ratio if isinstance(keep_ratio, Keep) else Keep(keep_ratio=keep_ratio)
        found: list[StoredPassage] = []
        with self.catalog.read() as session:
            texts = set(session.scalars(_passages(self.collection_id, PassageRow.text_sha256).order_by(None)))
            texts -= self._cached(session, texts, fingerprint, keep)
            for batch in batches(texts):
                these = _passages(self.collection_id, *_STORED).where(PassageRow.text_sha256.in_(batch))
                found += [StoredPassage(**row._asdict()) for row in session.execute(these)]
        return sorted(found, key=lambda passage: (passage.document_id, passage.ordinal))

    def passage(self, document_id: str, ordinal: int) -> StoredPassage:
        """One passage.

        Raises:
            DocumentNotFoundError: The collection has no such document, or the document has fewer passages.
        """
        one = _passages(self.collection_id, *_STORED).where(
            DocumentRow.document_id == document_id, PassageRow.ordinal == ordinal
        )
        with self.catalog.read() as session:
            found = session.execute(one).one_or_none()
            if found is None:
                find_document(session, self.collection_id, document_id)  # raises if it is missing as well
                raise DocumentNotFoundError(
                    f"document {document_id!r} has no passage {ordinal}",
                    where=document_id,
                    next_step="Passages are numbered from 0; `kv-memory list` shows how many there are.",
                )
        return StoredPassage(**found._asdict())

    def text(self, text_sha256: str) -> str | None:
        """The passage text with this SHA-256 hex digest; None if no passage of the collection keeps such a text."""
        texts = _passages(self.collection_id, PassageRow.text).where(
            PassageRow.text_sha256 == text_sha256, PassageRow.text.is_not(None)
        )
        with self.catalog.read() as session:
            found: str | None = session.scalar(texts.limit(1))
        return found


def _check(record: DocumentRecord) -> None:
    """Refuse a document that cannot be stored; errors as in `Documents.put_document`."""
    try:
        json.dumps(record.metadata)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metadata must be JSON-serialisable: {error}",
            where=f"document {record.id!r}",
            next_step="Use strings, numbers, booleans, None, lists and dicts with string keys.",
        ) from error
    if any("\0" in text for text in (record.id, record.source_uri or "", *(p.text or "" for p in record.passages))):
        raise UnreadableDocumentError(
            "a text with a NUL character cannot be stored",  # PostgreSQL cannot; SQLite should not differ
            where=f"document {record.id!r}",
            next_step="Decode the document with the right encoding, or remove the NUL characters.",
        )


def _values(passage: PassageRecord) -> dict[str, Any]:
    """A passage's columns: terms serve retrieval where the text is not kept, and headings are text too."""
    if passage.text is not None:
        return {**vars(passage), "terms": None}
    return {**vars(passage), "terms": passage.terms and dict(passage.terms), "headings": ""}


def _row(session: Session, collection_id: int, document_id: str) -> DocumentRow | None:
    return session.scalar(
        select(DocumentRow).where(DocumentRow.collection_id == collection_id, DocumentRow.document_id == document_id)
    )


def find_document(session: Session, collection_id: int, document_id: str) -> DocumentRow:
    """The document's row.

    Raises:
        DocumentNotFoundError: The collection has no such document.
    """
    row = _row(session, collection_id, document_id)
    if row is None:
        raise DocumentNotFoundError(
            f"no document {document_id!r} in this collection",
            where=document_id,
            next_step="List the ids with `kv-memory list`.",
        )
    return row


def _shared(row: DocumentRow) -> dict[str, Any]:
    """The fields that `DocumentRecord` and `DocumentSummary` share."""
    names = ("content_sha256", "source_uri", "passage_tokens", "created_at", "updated_at")
    return {"id": row.document_id, "metadata": row.details, **{name: getattr(row, name) for name in names}}


def _record(session: Session, row: DocumentRow) -> DocumentRecord:
    passages = session.execute(
        select(*_PASSAGE, *_VECTOR).where(PassageRow.document_pk == row.id).order_by(PassageRow.ordinal)
    )
    return DocumentRecord(**_shared(row), passages=tuple(PassageRecord(**each._asdict()) for each in passages))


def delete_document(session: Session, collection_id: int, document_id: str) -> list[str]:
    """Delete a document as `Documents.delete_document` does; returns blob keys for `delete_unreferenced`."""
    row = find_document(session, collection_id, document_id)
    texts = _texts_of(session, row)
    session.execute(delete(DocumentRow).where(DocumentRow.id == row.id))
    session.get_one(CollectionRow, collection_id).revision += 1
    return _retire_caches(session, collection_id, texts)


def _texts_of(session: Session, row: DocumentRow) -> dict[str, bool]:
    """Hashes of a document's texts, each with whether a passage keeps the text."""
    texts = select(PassageRow.text_sha256, func.count(PassageRow.text)).where(PassageRow.document_pk == row.id)
    return {text: n > 0 for text, n in session.execute(texts.group_by(PassageRow.text_sha256))}


def _retire_caches(session: Session, collection_id: int, texts: Iterable[str]) -> list[str]:
    """Delete caches of texts (hashes) that no passage of the collection has; returns their blob keys."""
    keys: list[str] = []
    for batch in batches(texts):
        gone = delete(CacheRow).where(unreferenced(collection_id), CacheRow.text_sha256.in_(batch))
        keys += session.scalars(gone.returning(CacheRow.blob_key))
    return keys


def place_of(session: Session, collection_id: int, text_sha256: str) -> str:
    """The place of a text, for errors: its document and passage, or its hash."""
    places = _passages(collection_id, DocumentRow.document_id, PassageRow.ordinal)
    found = session.execute(places.where(PassageRow.text_sha256 == text_sha256).limit(1)).first()
    return f"text {text_sha256}" if found is None else f"document {found[0]!r}, passage {found[1]}"


def _passages(collection_id: int, *columns: Any) -> Select[*tuple[Any, ...]]:
    """A query for a collection's passages, ordered by document id and ordinal."""
    return (
        select(*columns)
        .join_from(PassageRow, DocumentRow)
        .where(DocumentRow.collection_id == collection_id)
        .order_by(DocumentRow.document_id, PassageRow.ordinal)
    )


def alive(now: datetime) -> ColumnElement[bool]:
    """Condition for caches that have not expired."""
    return or_(CacheRow.expires_at.is_(None), CacheRow.expires_at > now)


def unreferenced(collection_id: int) -> ColumnElement[bool]:
    """Condition for caches of the collection that no passage of it refers to by text."""
    referred = exists().where(
        PassageRow.text_sha256 == CacheRow.text_sha256,
        PassageRow.document_pk == DocumentRow.id,
        DocumentRow.collection_id == collection_id,
    )
    return (CacheRow.collection_id == collection_id) & ~referred
