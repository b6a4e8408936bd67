"""KVMemoryRetriever: documents with their distilled caches, found by the memory itself or by any other retriever."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from kv_memory import KVMemory
from kv_memory.config import check_choice

from ..references import OnMissing
from .documents import check_k, found, marked

__all__ = ["KVMemoryRetriever"]


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
