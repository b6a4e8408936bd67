"""KVMemoryIndex: adds, updates and deletes documents with their distilled caches, through LangChain's indexing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing import DeleteResponse, UpsertResponse
from langchain_core.indexing.base import DocumentIndex
from pydantic import Field

from kv_memory import ConfigError, DocumentNotFoundError, KVMemory, TextNotKeptError

from .retriever import check_k, found, without_mark


class KVMemoryIndex(DocumentIndex):
    """A `DocumentIndex` that compresses documents on insertion, and finds them by the memory's own BM25.

    Pass it to `langchain_core.indexing.index`: with `cleanup="full"` documents that have left the source lose their
    caches, and unchanged ones cost nothing. Each document is compressed whole, so split long ones first, as for a
    vector store. Metadata must be JSON-serialisable. Texts are kept regardless of the memory's `keep_text`, because an
    index returns its documents.

    Args:
        memory: The memory that stores documents and caches, under the document's own id.
        k: Number of documents to find, also an option of `invoke`; the memory's `top_k` if None.

    Example:
        ```python
        from langchain_core.indexing import InMemoryRecordManager, index

        manager = InMemoryRecordManager(namespace="docs")
        manager.create_schema()
        index(documents, manager, KVMemoryIndex(memory), cleanup="full", key_encoder="sha256")
        ```
    """

    memory: KVMemory = Field(exclude=True, repr=False)
    k: int | None = None

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        check_k(options.get("k"))
        super().__init__(**{**options, "memory": memory})

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Compress and store documents, replacing those of the same id. A document without an id gets a random one.

        A document that cannot be stored raises, because `index` ignores `failed`; the documents before it are stored.

        Raises:
            DocumentError: A document has no text.
            ConfigError: A document's metadata is not JSON-serialisable.
            StoreError: A document cannot be written.
        """
        succeeded: list[str] = []
        for item in items:
            id_ = item.id or str(uuid.uuid4())
            self.memory.add_passages(id_, [item.page_content], metadata=without_mark(item.metadata), keep_text=True)
            succeeded.append(id_)
        return UpsertResponse(succeeded=succeeded, failed=[])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Delete documents with their caches; missing ids are ignored.

        Raises:
            ConfigError: `ids` is None. The error is a ValueError, as LangChain requires.
        """
        if ids is None:
            raise ConfigError(
                "no ids to delete", where="ids", next_step="Pass the ids of the documents; [] deletes nothing."
            )
        succeeded: list[str] = []
        for id_ in ids:
            try:
                self.memory.remove(id_)
            except DocumentNotFoundError:
                continue
            succeeded.append(id_)
        return DeleteResponse(succeeded=succeeded, num_deleted=len(succeeded), failed=[], num_failed=0)

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """The documents of these ids; missing ids are ignored.

        A document that `memory.add` has split into passages is returned with these joined by empty lines.

        Raises:
            TextNotKeptError: A document was added by `memory.add` without keeping its text.
        """
        documents: list[Document] = []
        for id_ in ids:
            try:
                record = self.memory.document(id_)
            except DocumentNotFoundError:
                continue
            texts = [passage.text for passage in record.passages if passage.text is not None]
            if len(texts) < len(record.passages):
                raise TextNotKeptError(
                    "the text of a document is not kept",
                    where=id_,
                    next_step="Upsert it, or add it to a memory opened with keep_text=True.",
                )
            documents.append(Document(id=id_, page_content="\n\n".join(texts), metadata=record.metadata))
        return documents

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return self._find(query, k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return await asyncio.to_thread(self._find, query, k)

    def _find(self, query: str, k: int | None) -> list[Document]:
        hits = self.memory.retrieve(query, top_k=check_k(self.k if k is None else k))
        return [found(hit, id=hit.document_id, metadata=dict(hit.metadata)) for hit in hits]
