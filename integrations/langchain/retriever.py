"""KVMemoryRetriever: documents with their distilled caches, found by the memory itself or by any other retriever.

The key of a document's cache is the hash of its text, never its id.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from kv_memory import ConfigError, KVMemory
from kv_memory.config import check_choice
from kv_memory.query import key_of
from kv_memory.retrieval.bm25 import Hit

from ..references import KV_ID, OnMissing, mark_of, reference_to


class KVMemoryRetriever(BaseRetriever):
    """Finds documents and names their distilled caches in `metadata["kv_id"]`, for `create_kv_chain`, `ChatKVMemory`.

    Alone it finds passages of `memory.add` by BM25, with the document's metadata, and the document's id as `source`
    unless the metadata has one. Around another retriever it returns that retriever's documents, and sets `kv_id` on
    each that has a cache of exactly its text, however the cache was made. A passage without a stored text
    (`KVMemory.open(..., keep_text=True)` stores it) becomes a document without content that names its cache: chains of
    this package answer from the cache; others find no text.

    Args:
        memory: The memory that holds the caches; only its own collection is searched.
        retriever: Any LangChain retriever, e.g. `vector_store.as_retriever()`; the memory's own BM25 if None.
        k: Maximum number of documents, also an option of `invoke`. If None, the retriever's own number, or the memory's
            `top_k`.
        on_missing: Action for another retriever's documents without a cache. `text`: they get no `kv_id`, and are
            prefilled as text. `compress`: the cache is made once and kept. `skip`: they are left out. `raise`:
            `CacheNotFoundError`, or `FingerprintMismatchError` if the cache is of another model. Documents without
            text are left out and logged, except with `raise`.

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

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        check_k(options.get("k"))
        check_choice(options.get("on_missing", "text"), OnMissing, where="on_missing")
        super().__init__(**{**options, "memory": memory})

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        limit = check_k(self.k if k is None else k)
        if self.retriever is None:
            return self._own(query, limit)
        config, options = {"callbacks": run_manager.get_child()}, _options(self.retriever, limit)
        documents = self.retriever.invoke(query, config, **options)  # type: ignore[arg-type]
        return marked(self.memory, documents[:limit], on_missing=self.on_missing)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        limit = check_k(self.k if k is None else k)
        if self.retriever is None:
            return await asyncio.to_thread(self._own, query, limit)
        config, options = {"callbacks": run_manager.get_child()}, _options(self.retriever, limit)
        documents = await self.retriever.ainvoke(query, config, **options)  # type: ignore[arg-type]
        return await asyncio.to_thread(marked, self.memory, documents[:limit], on_missing=self.on_missing)

    def _own(self, query: str, k: int | None) -> list[Document]:
        return [
            found(hit, id=f"{hit.document_id}#{hit.ordinal}", metadata={"source": hit.document_id, **hit.metadata})
            for hit in self.memory.retrieve(query, top_k=k)
        ]


def _options(retriever: BaseRetriever, k: int | None) -> dict[str, Any]:
    """`k` for a retriever that accepts it in a call, as those of vector stores do; others' results are cut later."""
    taken = inspect.signature(retriever._get_relevant_documents).parameters
    takes_k = "k" in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return {"k": k} if k is not None and takes_k else {}


def found(hit: Hit, *, id: str, metadata: dict[str, Any]) -> Document:
    """A passage of the memory as a document that names its cache; without content if the text is not kept."""
    return Document(id=id, page_content=hit.text or "", metadata={**metadata, KV_ID: mark_of(hit.text_sha256)})


def without_mark(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy of the metadata without the mark, which may be stale or from another store."""
    return {name: value for name, value in metadata.items() if name != KV_ID}


def marked(memory: KVMemory, documents: Iterable[Document], *, on_missing: OnMissing) -> list[Document]:
    """Copies of the documents with their caches named in the metadata; see `reference_to` for documents without one."""
    copies: list[Document] = []
    for document in documents:
        text, metadata, mark = document.page_content, without_mark(document.metadata), document.metadata.get(KV_ID)
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


def check_k(k: int | None) -> int | None:
    """Return `k` if it is None or at least 1.

    Raises:
        ConfigError: `k` is below 1.
    """
    if k is not None and k < 1:
        raise ConfigError(f"k must be at least 1, got {k}", where="k")
    return k
