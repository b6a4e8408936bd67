"""Queries on documents and passages, run on a session that `Store` opens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, delete, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.errors import ConfigError, DocumentNotFoundError, UnreadableDocumentError
from kv_memory.store.records import DocumentRecord, DocumentSummary, PassageRecord, StoredPassage
from kv_memory.store.sql.schema import CacheRow, CollectionRow, DocumentRow, PassageRow, utc_now

T = TypeVar("T")


def batches(items: Iterable[T], size: int = 500) -> Iterator[list[T]]:
    """Split items into lists of at most `size`: SQLite limits the variables of a statement, in old builds to 999."""
    everything = list(items)
    for start in range(0, len(everything), size):
        yield everything[start : start + size]


def document_row(session: Session, collection_id: int, document_id: str) -> DocumentRow | None:
    """The document's row; None if the collection has no such document."""
    return session.scalar(
        select(DocumentRow).where(DocumentRow.collection_id == collection_id, DocumentRow.document_id == document_id)
    )


def find_document(session: Session, collection_id: int, document_id: str) -> DocumentRow:
    """The document's row.

    Raises:
        DocumentNotFoundError: The collection has no such document.
    """
    row = document_row(session, collection_id, document_id)
    if row is None:
        raise DocumentNotFoundError(
            f"no document {document_id!r} in this collection",
            where=document_id,
            next_step="List the ids with `kv-memory list`.",
        )
    return row


def check_document(record: DocumentRecord) -> None:
    """Refuse a document that cannot be stored.

    Raises:
        ConfigError: The metadata is not JSON-serialisable.
        UnreadableDocumentError: The id, the source URI or a text has a NUL character.
    """
    try:
        json.dumps(record.metadata)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"metadata must be JSON-serialisable: {error}",
            where=f"document {record.id!r}",
            next_step="Use strings, numbers, booleans, None, lists and dicts with string keys.",
        ) from error
    for text in (record.id, record.source_uri or "", *(passage.text or "" for passage in record.passages)):
        if "\0" in text:
            raise UnreadableDocumentError(
                "a text with a NUL character cannot be stored",  # PostgreSQL cannot; SQLite should not differ
                where=f"document {record.id!r}",
                next_step="Decode the document with the right encoding, or remove the NUL characters.",
            )


def write_document(session: Session, collection_id: int, record: DocumentRecord) -> set[str]:
    """Insert or replace a document; returns the hashes of texts that only its previous version had."""
    passages = [
        {
            "ordinal": ordinal,
            "text": passage.text,
            "terms": None if passage.text is not None or passage.terms is None else dict(passage.terms),
            "text_sha256": passage.text_sha256,
            "n_tokens": passage.n_tokens,
        }
        for ordinal, passage in enumerate(record.passages)
    ]
    now = utc_now()
    before: set[str] = set()
    row = document_row(session, collection_id, record.id)
    if row is None:
        row = DocumentRow(collection_id=collection_id, document_id=record.id, created_at=record.created_at or now)
        session.add(row)
    else:
        before = _texts_of(session, row)
        session.execute(delete(PassageRow).where(PassageRow.document_pk == row.id))
    row.content_sha256 = record.content_sha256
    row.source_uri = record.source_uri
    row.details = dict(record.metadata)
    row.passage_tokens = record.passage_tokens
    row.updated_at = now
    session.flush()
    if passages:
        session.execute(insert(PassageRow), [{"document_pk": row.id, **passage} for passage in passages])
    return before - {str(passage["text_sha256"]) for passage in passages}


def delete_document(session: Session, collection_id: int, document_id: str) -> set[str]:
    """Delete a document and its passages; returns the hashes of its texts.

    Raises:
        DocumentNotFoundError: The collection has no such document.
    """
    row = find_document(session, collection_id, document_id)
    texts = _texts_of(session, row)
    session.execute(delete(DocumentRow).where(DocumentRow.id == row.id))
    return texts


def bump_revision(session: Session, collection_id: int) -> None:
    """Record that the collection's passages have changed."""
    session.execute(
        update(CollectionRow).where(CollectionRow.id == collection_id).values(revision=CollectionRow.revision + 1)
    )


def load_document(session: Session, row: DocumentRow) -> DocumentRecord:
    """A document with its passages."""
    passages = session.scalars(select(PassageRow).where(PassageRow.document_pk == row.id).order_by(PassageRow.ordinal))
    return DocumentRecord(
        id=row.document_id,
        content_sha256=row.content_sha256,
        source_uri=row.source_uri,
        metadata=row.details,
        passage_tokens=row.passage_tokens,
        passages=tuple(
            PassageRecord(text=p.text, n_tokens=p.n_tokens, text_sha256=p.text_sha256, terms=p.terms) for p in passages
        ),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def list_documents(session: Session, collection_id: int) -> list[DocumentSummary]:
    """All documents without their text, ordered by id."""
    counts = (
        select(
            PassageRow.document_pk,
            func.count().label("n_passages"),
            func.count(PassageRow.text).label("n_texts"),
            func.sum(PassageRow.n_tokens).label("n_tokens"),
        )
        .group_by(PassageRow.document_pk)
        .subquery()
    )
    numbers = (func.coalesce(counts.c[name], 0) for name in ("n_passages", "n_texts", "n_tokens"))
    rows = session.execute(
        select(DocumentRow, *numbers)
        .outerjoin(counts, counts.c.document_pk == DocumentRow.id)
        .where(DocumentRow.collection_id == collection_id)
        .order_by(DocumentRow.document_id)
    )
    return [
        DocumentSummary(
            id=row.document_id,
            content_sha256=row.content_sha256,
            source_uri=row.source_uri,
            metadata=row.details,
            passage_tokens=row.passage_tokens,
            n_passages=n_passages,
            n_tokens=n_tokens,
            n_texts=n_texts,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )
        for row, n_passages, n_texts, n_tokens in rows
    ]


def select_passages(collection_id: int) -> Select[PassageRow, DocumentRow]:
    """A query for a collection's passages, ordered by document id and ordinal; the caller may narrow it."""
    return (
        select(PassageRow, DocumentRow)
        .join(DocumentRow, DocumentRow.id == PassageRow.document_pk)
        .where(DocumentRow.collection_id == collection_id)
        .order_by(DocumentRow.document_id, PassageRow.ordinal)
    )


def place_of(session: Session, collection_id: int, text_sha256: str) -> str:
    """Where a text stands, for errors: its document and passage, or its hash."""
    passages = select_passages(collection_id).where(PassageRow.text_sha256 == text_sha256)
    found = session.execute(passages.limit(1)).first()
    if found is None:
        return f"text {text_sha256}"
    passage, document = found
    return f"document {document.document_id!r}, passage {passage.ordinal}"


def stored_passages(session: Session, statement: Select[PassageRow, DocumentRow]) -> list[StoredPassage]:
    """Run a query made from `select_passages`."""
    return [
        StoredPassage(
            document_id=document.document_id,
            ordinal=passage.ordinal,
            text=passage.text,
            text_sha256=passage.text_sha256,
            n_tokens=passage.n_tokens,
            metadata=document.details,
            terms=passage.terms,
        )
        for passage, document in session.execute(statement)
    ]


def retire_caches(session: Session, collection_id: int, texts: Iterable[str]) -> list[str]:
    """Delete caches of texts (hashes) that no passage of the collection has; returns their blob keys."""
    keys: list[str] = []
    for batch in batches(texts):
        gone = delete(CacheRow).where(unreferenced(collection_id), CacheRow.text_sha256.in_(batch))
        keys += session.scalars(gone.returning(CacheRow.blob_key))
    return keys


def alive(now: datetime) -> ColumnElement[bool]:
    """Condition for caches that have not expired."""
    return or_(CacheRow.expires_at.is_(None), CacheRow.expires_at > now)


def cached_texts(
    session: Session, collection_id: int, texts: Iterable[str], fingerprint: Fingerprint, keep: Keep
) -> set[str]:
    """The subset of `texts` (hashes) that have a cache of this amount under this fingerprint."""
    found: set[str] = set()
    for batch in batches(texts):
        rows = session.execute(
            select(CacheRow.text_sha256, CacheRow.keep_ratio, CacheRow.n_tokens).where(
                CacheRow.collection_id == collection_id,
                CacheRow.fingerprint == fingerprint.digest,
                CacheRow.text_sha256.in_(batch),
                alive(utc_now()),
            )
        )
        found.update(text for text, ratio, n_tokens in rows if keep.fits(ratio, n_tokens, fingerprint))
    return found


def unreferenced(collection_id: int) -> ColumnElement[bool]:
    """Condition for caches of the collection that no passage of it refers to by text."""
    referred = exists().where(
        PassageRow.text_sha256 == CacheRow.text_sha256,
        PassageRow.document_pk == DocumentRow.id,
        DocumentRow.collection_id == collection_id,
    )
    return (CacheRow.collection_id == collection_id) & ~referred


def _texts_of(session: Session, row: DocumentRow) -> set[str]:
    return set(session.scalars(select(PassageRow.text_sha256).where(PassageRow.document_pk == row.id)))
