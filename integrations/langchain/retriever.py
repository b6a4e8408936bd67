"""Documents with their distilled caches, found by the memory itself or by any other retriever, or kept as an index.

The key of a document's cache is the hash of its text, never its id.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing import DeleteResponse, UpsertResponse
from langchain_core.indexing.base import DocumentIndex
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from kv_memory import ConfigError, DocumentNotFoundError, KVMemory, TextNotKeptError
from kv_memory.config import check_choice, check_names
from kv_memory.query import key_of
from kv_memory.retrieval.retriever import Hit
from kv_memory.store import DocumentRecord

from ..references import KV_ID, OnMissing, is_blank, mark_of, reference_to

_log = logging.getLogger(__name__)

_SEARCH_OPTIONS = ("document_ids", "filter", "min_score")


class KVMemoryRetriever(BaseRetriever):
    """Finds documents and names their distilled caches in `metadata["kv_id"]`, for `create_kv_chain`, `ChatKVMemory`.

    Alone it finds passages as `KVMemory.retrieve` does, with the document's metadata, and the document's id as `source`
    unless the metadata has one. Around another retriever it returns that retriever's documents, and sets `kv_id` on
    each that has a cache of exactly its text, however the cache was made. A passage without a stored text
    (`KVMemory.open(..., keep_text=True)` stores it) becomes a document without content that names its cache: chains of
    this package answer from the cache; others find no text.

    Args:
        memory: The memory that holds the caches; only its own collection is searched.
        retriever: Any LangChain retriever, e.g. `vector_store.as_retriever()`; the memory's own if None.
        k: Maximum number of documents, also an option of `invoke`. If None, the retriever's own number, or the memory's
            `top_k`.
        on_missing: Action for another retriever's documents without a cache. `text`: they get no `kv_id`, and are
            prefilled as text. `compress`: the cache is made once and kept. `skip`: they are left out. `raise`:
            `CacheNotFoundError`, or `FingerprintMismatchError` if the cache is of another model. Documents without
            text are left out and logged, except with `raise`.
        search_kwargs: Any of `document_ids`, `filter` and `min_score`, as in `KVMemory.retrieve`, without another
            retriever.

    Raises:
        ConfigError: An option is out of range.

    Example:
        ```python
        KVMemoryRetriever(memory, k=3).invoke("When does the ferry leave?")
        KVMemoryRetriever(memory, retriever=vector_store.as_retriever(), on_missing="compress")
        ```
    """

    memory: KVMemory = Field(exclude=True, repr=False)
    retriever: BaseRetriever | None = None
    k: int | None = None
    on_missing: OnMissing = "text"
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        _check_k(options.get("k"))
        _check_search(options)
        check_choice(options.get("on_missing", "text"), OnMissing, where="on_missing")
        super().__init__(**{**options, "memory": memory})

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        limit = _check_k(self.k if k is None else k)
        if self.retriever is None:
            return self._own(query, limit)
        config, options = {"callbacks": run_manager.get_child()}, _options(self.retriever, limit)
        documents = self.retriever.invoke(query, config, **options)  # type: ignore[arg-type]
        return _marked(self.memory, documents[:limit], on_missing=self.on_missing)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        limit = _check_k(self.k if k is None else k)
        if self.retriever is None:
            return await asyncio.to_thread(self._own, query, limit)
        config, options = {"callbacks": run_manager.get_child()}, _options(self.retriever, limit)
        documents = await self.retriever.ainvoke(query, config, **options)  # type: ignore[arg-type]
        return await asyncio.to_thread(_marked, self.memory, documents[:limit], on_missing=self.on_missing)

    def _own(self, query: str, k: int | None) -> list[Document]:
        return [
            _found(hit, id=f"{hit.document_id}#{hit.ordinal}", metadata={"source": hit.document_id, **hit.metadata})
            for hit in self.memory.retrieve(query, top_k=k, **self.search_kwargs)
        ]


class KVMemoryIndex(DocumentIndex):
    """A `DocumentIndex` that compresses documents on insertion, and finds them by the memory's own retriever.

    Pass it to `langchain_core.indexing.index`: with `cleanup="full"` documents that have left the source lose their
    caches, and unchanged ones cost nothing. Each document is compressed whole, so split long ones first, as for a
    vector store. Metadata must be JSON-serialisable. Texts are kept regardless of the memory's `keep_text`, because an
    index returns its documents.

    Args:
        memory: The memory that stores documents and caches, under the document's own id.
        k: Number of documents to find, also an option of `invoke`; the memory's `top_k` if None.
        search_kwargs: Any of `document_ids`, `filter` and `min_score`, as in `KVMemory.retrieve`.

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
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        _check_k(options.get("k"))
        _check_search(options)
        super().__init__(**{**options, "memory": memory})

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Compress and store documents, replacing those of the same id. A document without an id gets a random one.

        A document without text is stored without a cache and logged: it is never found, but `get`, `delete` and the
        record manager of `index` know it. Any other document that cannot be stored raises, because `index` ignores
        `failed`; the documents before it are stored.

        Raises:
            DocumentError: A document's text is not valid text.
            ConfigError: A document's metadata is not JSON-serialisable.
            StoreError: A document cannot be written.
        """
        succeeded: list[str] = []
        for item in items:
            id_, text, metadata = item.id or str(uuid.uuid4()), item.page_content, _without_mark(item.metadata)
            if is_blank(text):
                _log.warning("a document without text is stored without a cache: %s", id_)
                record = DocumentRecord(id=id_, content_sha256=key_of(text), metadata=metadata)
                self.memory.store.put_document(record)
            else:
                self.memory.add_passages(id_, [text], metadata=metadata, keep_text=True)
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

        A document that `memory.add` has split into passages is returned with these joined by empty lines, a blank one
        with the empty text.

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
        hits = self.memory.retrieve(query, top_k=_check_k(self.k if k is None else k), **self.search_kwargs)
        return [_found(hit, id=hit.document_id, metadata=dict(hit.metadata)) for hit in hits]


def _options(retriever: BaseRetriever, k: int | None) -> dict[str, Any]:
    """`k` for a retriever that accepts it in a call, as those of vector stores do; others' results are cut later."""
    taken = inspect.signature(retriever._get_relevant_documents).parameters
    takes_k = "k" in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return {"k": k} if k is not None and takes_k else {}


def _found(hit: Hit, *, id: str, metadata: dict[str, Any]) -> Document:
    """A passage of the memory as a document that names its cache; without content if the text is not kept."""
    return Document(id=id, page_content=hit.text or "", metadata={**metadata, KV_ID: mark_of(hit.text_sha256)})


def _without_mark(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy of the metadata without the mark, which may be stale or from another store."""
    return {name: value for name, value in metadata.items() if name != KV_ID}


def _marked(memory: KVMemory, documents: Iterable[Document], *, on_missing: OnMissing) -> list[Document]:
    """Copies of the documents with their caches named in the metadata; see `reference_to` for documents without one."""
    copies: list[Document] = []
    for document in documents:
        text, metadata, mark = document.page_content, _without_mark(document.metadata), document.metadata.get(KV_ID)
        # A document that is not stored yet is stored under its id, its source, or the key of its text.
        id_ = document.id or str(metadata.get("source") or key_of(text))
        reference = reference_to(
            memory, text, on_missing=on_missing, document_id=id_, mark=None if mark is None else str(mark)
        )
        if reference is None:
            continue
        if reference.text is None:
            metadata[KV_ID] = mark_of(reference.key)
        copies.append(document.model_copy(update={"metadata": metadata}))
    return copies


def _check_search(options: dict[str, Any]) -> None:
    given = options.get("search_kwargs") or {}
    check_names(given, _SEARCH_OPTIONS, where="search_kwargs")
    if given and options.get("retriever") is not None:
        raise ConfigError(
            "search_kwargs are for the memory's own retrieval, and another retriever is given",
            where="search_kwargs",
            next_step="Pass them to that retriever.",
        )


def _check_k(k: int | None) -> int | None:
    if k is not None and k < 1:
        raise ConfigError(f"k must be at least 1, got {k}", where="k")
    return k
