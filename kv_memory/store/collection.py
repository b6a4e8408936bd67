"""The documents and passages of one collection."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.keep import Keep
from kv_memory.errors import ConfigError, DocumentNotFoundError, StoreError
from kv_memory.store import documents
from kv_memory.store.blob_references import BlobReferences
from kv_memory.store.records import DocumentRecord, DocumentSummary, StoredPassage
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import CollectionRow, DocumentRow, PassageRow


class CollectionPart:
    """What the documents and the caches of one collection share.

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


class Documents(CollectionPart):
    """Documents and settings of one collection: the part of `Store` that only needs rows."""

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
            self._set(session, values)

    def _set(self, session: Session, values: Mapping[str, Any]) -> None:
        row = session.get_one(CollectionRow, self.collection_id)
        if row.settings != {**row.settings, **values}:
            row.settings = {**row.settings, **values}

    @property
    def revision(self) -> int:
        """Revision number, which grows whenever a document is put or deleted; derived data is keyed by it."""
        with self.catalog.read() as session:
            return session.get_one(CollectionRow, self.collection_id).revision

    def put_document(self, record: DocumentRecord, *, settings: Mapping[str, Any] | None = None) -> None:
        """Insert a document, or replace the one of the same id, in one transaction.

        Settings are recorded with it, see `update_settings`.

        Caches of texts that only its previous version had are deleted. Caches that a running `add` has put for a
        document still to come are not touched.

        Raises:
            ConfigError: The metadata is not JSON-serialisable.
            UnreadableDocumentError: The id, the source URI or a text cannot be stored.
        """
        documents.check_document(record)
        with self.catalog.write() as session:
            kept = documents.select_passages(self.collection_id).where(
                DocumentRow.document_id == record.id, PassageRow.text.is_not(None)
            )
            hides = any(passage.text is None for passage in record.passages)
            had_texts = hides and session.execute(kept.limit(1)).first() is not None
            dropped = documents.write_document(session, self.collection_id, record)
            keys = documents.retire_caches(session, self.collection_id, dropped) if dropped else []
            documents.bump_revision(session, self.collection_id)
            if settings is not None:
                self._set(session, settings)
        if keys:
            self.references.delete_unreferenced(keys)
        if had_texts:
            # The index may have been built from these texts; the next question rebuilds it, without their words.
            shutil.rmtree(self.index_folder, ignore_errors=True)

    def delete_document(self, id: str) -> None:
        """Delete a document, its passages, and its caches of texts that no other document has.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self.catalog.write() as session:
            dropped = documents.delete_document(session, self.collection_id, id)
            keys = documents.retire_caches(session, self.collection_id, dropped)
            documents.bump_revision(session, self.collection_id)
        self.references.delete_unreferenced(keys)

    def document(self, id: str) -> DocumentRecord:
        """A document with its passages.

        Raises:
            DocumentNotFoundError: The collection has no such document.
        """
        with self.catalog.read() as session:
            return documents.load_document(session, documents.find_document(session, self.collection_id, id))

    def documents(self) -> list[DocumentSummary]:
        """All documents without their text, ordered by id."""
        with self.catalog.read() as session:
            return documents.list_documents(session, self.collection_id)

    def has_document(self, id: str) -> bool:
        """Whether the collection has a document with this id."""
        with self.catalog.read() as session:
            return documents.document_row(session, self.collection_id, id) is not None

    def find_document(self, id: str, fingerprint: Fingerprint, keep: Keep) -> tuple[DocumentRecord, set[str]] | None:
        """A document, and the hashes of its texts that `cached_texts` returns; None if there is no such document."""
        with self.catalog.read() as session:
            row = documents.document_row(session, self.collection_id, id)
            if row is None:
                return None
            record = documents.load_document(session, row)
            texts = {passage.text_sha256 for passage in record.passages}
            return record, documents.cached_texts(session, self.collection_id, texts, fingerprint, keep)

    def cached_texts(self, texts: Iterable[str], fingerprint: Fingerprint, keep: Keep) -> set[str]:
        """The subset of `texts` (hashes) that have a cache of exactly this amount; the blobs are not checked."""
        with self.catalog.read() as session:
            return documents.cached_texts(session, self.collection_id, texts, fingerprint, keep)

    def passages(self) -> list[StoredPassage]:
        """All passages, ordered by document id and ordinal."""
        with self.catalog.read() as session:
            return documents.stored_passages(session, documents.select_passages(self.collection_id))

    def missing(self, fingerprint: Fingerprint, keep_ratio: float | Keep) -> list[StoredPassage]:
        """The passages without a cache under these settings, ordered by document id and ordinal."""
        keep = keep_ratio if isinstance(keep_ratio, Keep) else Keep(keep_ratio=keep_ratio)
        passages = documents.select_passages(self.collection_id)
        with self.catalog.read() as session:
            texts = set(session.scalars(passages.with_only_columns(PassageRow.text_sha256).order_by(None)))
            texts -= documents.cached_texts(session, self.collection_id, texts, fingerprint, keep)
            found = [
                passage
                for batch in documents.batches(sorted(texts))
                for passage in documents.stored_passages(session, passages.where(PassageRow.text_sha256.in_(batch)))
            ]
        return sorted(found, key=lambda passage: (passage.document_id, passage.ordinal))

    def passage(self, document_id: str, ordinal: int) -> StoredPassage:
        """One passage.

        Raises:
            DocumentNotFoundError: The collection has no such document, or the document has fewer passages.
        """
        with self.catalog.read() as session:
            found = documents.stored_passages(
                session,
                documents.select_passages(self.collection_id).where(
                    DocumentRow.document_id == document_id, PassageRow.ordinal == ordinal
                ),
            )
            if not found:
                documents.find_document(session, self.collection_id, document_id)  # raises if it is missing as well
        if not found:
            raise DocumentNotFoundError(
                f"document {document_id!r} has no passage {ordinal}",
                where=document_id,
                next_step="Passages are numbered from 0; `kv-memory list` shows how many there are.",
            )
        return found[0]

    def text(self, text_sha256: str) -> str | None:
        """The passage text with this SHA-256 hex digest; None if no passage of the collection keeps such a text."""
        with self.catalog.read() as session:
            return session.scalar(
                select(PassageRow.text)
                .join(DocumentRow, DocumentRow.id == PassageRow.document_pk)
                .where(DocumentRow.collection_id == self.collection_id, PassageRow.text_sha256 == text_sha256)
                .where(PassageRow.text.is_not(None))
                .limit(1)
            )


def find_collection(catalog: Catalog, name: str, *, create: bool) -> int:
    """The id of a collection's row; a missing one is created if `create` is on. Errors as in `Store.in_collection`."""
    if not isinstance(name, str) or not 0 < len(name) <= 255:
        raise ConfigError(f"a collection name must have 1 to 255 characters, got {name!r}", where="collection")
    wanted = select(CollectionRow.id).where(CollectionRow.name == name)
    with catalog.read() as session:
        found = session.scalar(wanted)
        names = session.scalars(select(CollectionRow.name).order_by(CollectionRow.name)).all()
    if found is not None:
        return found
    if not create:
        raise StoreError(
            f"the store has no collection {name!r}; it has {', '.join(names) or 'none'}",
            where=catalog.where,
            next_step="Use one of those, or create the collection by adding a document to it.",
        )
    with catalog.write() as session:
        found = session.scalar(wanted)  # another process may have created it since
        if found is None:
            row = CollectionRow(name=name, settings={})
            session.add(row)
            session.flush()
            found = row.id
        return found
