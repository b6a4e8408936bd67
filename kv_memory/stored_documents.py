"""StoredDocuments: what can be done with the documents of a store without a model."""

from __future__ import annotations

from pathlib import Path

from kv_memory.documents.loaders import file_id
from kv_memory.store import CheckReport, DocumentRecord, DocumentSummary, GcReport, Store, StoreStats


class StoredDocuments:
    """The documents of one collection; `KVMemory` adds to them and answers from them.

    Args:
        store: Store with the collection.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self.store.path

    @property
    def collection(self) -> str:
        """Name of the collection."""
        return self.store.collection

    def remove(self, document_id: str | Path) -> None:
        """Delete a document with its passages and caches.

        Args:
            document_id: Id of the document, or the path of a file that was added.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        id_ = file_id(document_id) if isinstance(document_id, Path) else document_id
        self.store.delete_document(id_)

    def documents(self) -> list[DocumentSummary]:
        """All documents, without their texts, ordered by id."""
        return self.store.documents()

    def document(self, document_id: str) -> DocumentRecord:
        """One document with its passages.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        return self.store.document(document_id)

    def stats(self) -> StoreStats:
        """Counts and sizes of the collection."""
        return self.store.stats()

    def check(self) -> CheckReport:
        """Compare catalog and blobs, and verify every blob; damaged blobs are quarantined."""
        return self.store.check()

    def gc(self) -> GcReport:
        """Delete caches and blobs that nothing refers to any more."""
        return self.store.gc()
