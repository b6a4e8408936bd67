"""Caches in step with an index: a step of an ingestion pipeline that makes them, and a vector store that follows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.utils import get_tqdm_iterable
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from kv_memory import ConfigError, DocumentNotFoundError, KVMemory

from .nodes import forget_all, forget_nodes, put_texts, source_hashes, texts_by_document

_log = logging.getLogger(__name__)


class KVCompressTransform(TransformComponent):
    """Compresses every node into a distilled cache and passes it on unchanged. Nodes with a cache cost nothing.

    Nodes of one document may come in several calls: each call adds its own. Caches are removed only for a reason. Nodes
    of a changed document, recognised by the hash of the source document that parsers put into nodes, replace those of
    its earlier version; a node that comes again with another text replaces its own. Deletions of documents reach only
    a `KVMemoryVectorStore`. The store keeps the texts too, so that its own retriever returns complete nodes.

    A pipeline's cache of transformations never applies to this one: a cache hit would leave a store without its
    distilled caches. With a persisted `IngestionCache`, put this transform into its own pipeline with
    `disable_cache=True`.

    Args:
        memory: The memory that makes and stores the caches.
        metadata_mode: Metadata to include in a node's text; the same as in retriever and synthesizer.

    Raises:
        DocumentError: A node's text is not valid text.
        StoreError: A cache cannot be written.
    """

    metadata_mode: MetadataMode = Field(default=MetadataMode.LLM)
    _memory: KVMemory = PrivateAttr()

    def __init__(self, memory: KVMemory, *, metadata_mode: MetadataMode = MetadataMode.LLM) -> None:
        super().__init__()
        self.metadata_mode = metadata_mode
        self._memory = memory

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "KVCompressTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The data that a pipeline hashes into its cache key; different on every call."""
        return {**super().to_dict(**kwargs), "never_cached": uuid.uuid4().hex}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress nodes; with `show_progress` a bar counts documents."""
        documents, hashes = texts_by_document(nodes, self.metadata_mode), source_hashes(nodes)
        shown = get_tqdm_iterable(list(documents.items()), bool(kwargs.get("show_progress")), "Compressing documents")
        for document_id, texts in shown:
            source_hash = hashes.get(document_id)
            put_texts(self._memory, document_id, texts, source_hash=source_hash, replaces=True, keep_text=True)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__` in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a store and its model cannot be sent to another process",
            where="num_workers of the pipeline",
            next_step="Run the pipeline without num_workers, or compress in a separate pipeline after it.",
        )


class KVMemoryVectorStore(BasePydanticVectorStore):
    """Wraps a vector store; nodes added to it are compressed into the memory, nodes deleted from it are removed there.

    Upserts and deletions of an `IngestionPipeline` with a docstore, and `index.delete_ref_doc`, reach the vector store
    and nothing else, so they can only be followed here. Caches are made before the inner store is changed, and removed
    after it, so that no node is ever found without its cache. The inner store keeps the texts; the memory keeps them
    too if its `keep_text` is set.

    Args:
        vector_store: The vector store to wrap.
        memory: The memory that holds the caches.
        metadata_mode: Metadata to include in a node's text; the same as in retriever and synthesizer.
        compress: Compress added nodes. False if a `KVCompressTransform` has compressed them before, or if the retriever
            compresses nodes without a cache.

    Raises:
        DocumentError: A node's text is not valid text.
        StoreError: A cache cannot be written.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    metadata_mode: MetadataMode = Field(default=MetadataMode.LLM)
    compress: bool = True
    _inner: BasePydanticVectorStore = PrivateAttr()
    _memory: KVMemory = PrivateAttr()

    def __init__(
        self,
        vector_store: BasePydanticVectorStore,
        memory: KVMemory,
        *,
        metadata_mode: MetadataMode = MetadataMode.LLM,
        compress: bool = True,
    ) -> None:
        super().__init__(stores_text=vector_store.stores_text, is_embedding_query=vector_store.is_embedding_query)
        self.metadata_mode = metadata_mode
        self.compress = compress
        self._inner = vector_store
        self._memory = memory

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "KVMemoryVectorStore"

    @property
    def client(self) -> Any:
        """The inner store's client."""
        return self._inner.client

    @property
    def vector_store(self) -> BasePydanticVectorStore:
        """The inner store."""
        return self._inner

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Compress nodes, then add them."""
        self._compress(nodes)
        return self._inner.add(list(nodes), **kwargs)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add` without blocking the event loop while nodes are compressed."""
        await asyncio.to_thread(self._compress, nodes)
        return await self._inner.async_add(list(nodes), **kwargs)

    def _compress(self, nodes: Sequence[BaseNode]) -> None:
        if self.compress:
            hashes = source_hashes(nodes)
            for document_id, texts in texts_by_document(nodes, self.metadata_mode).items():
                # Without `replaces`: the inner store keeps the nodes of earlier versions until they are deleted.
                put_texts(self._memory, document_id, texts, source_hash=hashes.get(document_id))

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document's nodes, then its caches."""
        self._inner.delete(ref_doc_id, **delete_kwargs)
        self._forget(ref_doc_id)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete`, with the inner store's own asynchronous form."""
        await self._inner.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._forget, ref_doc_id)

    def _forget(self, ref_doc_id: str) -> None:
        with contextlib.suppress(DocumentNotFoundError):  # never compressed
            self._memory.remove(ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete single nodes and their caches."""
        gone = self._ids_of(node_ids, filters)
        self._inner.delete_nodes(node_ids, filters, **delete_kwargs)
        forget_nodes(self._memory, gone)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes`, with the inner store's own asynchronous form."""
        gone = await asyncio.to_thread(self._ids_of, node_ids, filters)
        await self._inner.adelete_nodes(node_ids, filters, **delete_kwargs)
        await asyncio.to_thread(forget_nodes, self._memory, gone)

    def _ids_of(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        if filters is None:
            return node_ids or []
        try:
            return [node.node_id for node in self._inner.get_nodes(node_ids, filters)]
        except NotImplementedError:
            _log.warning("%s cannot list nodes by filters: their caches stay", type(self._inner).__name__)
            return []

    def clear(self) -> None:
        """Clear the inner store and remove all documents that were added as nodes, with their caches."""
        self._inner.clear()
        forget_all(self._memory)

    async def aclear(self) -> None:
        """`clear`, with the inner store's own asynchronous form."""
        await self._inner.aclear()
        await asyncio.to_thread(forget_all, self._memory)

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """As in the inner store."""
        return self._inner.get_nodes(node_ids, filters, **kwargs)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        """As in the inner store."""
        return await self._inner.aget_nodes(node_ids, filters, **kwargs)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As in the inner store."""
        return self._inner.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As in the inner store."""
        return await self._inner.aquery(query, **kwargs)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """As in the inner store; the memory is on disk already."""
        self._inner.persist(persist_path, fs)
