"""Retrievers whose nodes name their caches: around any LlamaIndex retriever, or over the memory's own passages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from kv_memory import KVMemory, Reference, UnsupportedRequestError
from kv_memory.config import check_choice
from kv_memory.retrieval.filters import Filter
from kv_memory.retrieval.retriever import Hit, RetrieveOptions

from ..references import OnMissing
from .nodes import marked, node_reference


class KVMemoryRetriever(BaseRetriever):
    """Wraps a retriever (vector, BM25, fusion, auto-merging, ...) and marks its nodes with `metadata["kv_id"]`.

    Args:
        retriever: The retriever that finds the nodes.
        memory: The memory that holds their caches.
        on_missing: Action for a node without a cache. `text`: it stays unmarked, and the synthesizer uses its text.
            `compress`: its cache is made now and kept. `skip`: it is dropped. `raise`: an error.
        metadata_mode: Metadata to include in a node's text.
        callback_manager: As in LlamaIndex.
        verbose: As in LlamaIndex.

    Raises:
        ConfigError: `on_missing` is unknown.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        memory: KVMemory,
        *,
        on_missing: OnMissing = "text",
        metadata_mode: MetadataMode = MetadataMode.LLM,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        check_choice(on_missing, OnMissing, where="on_missing")
        self._retriever = retriever
        self._memory = memory
        self._on_missing: OnMissing = on_missing
        self._metadata_mode = metadata_mode
        super().__init__(
            callback_manager=callback_manager or retriever.callback_manager,
            object_map=retriever.object_map,
            verbose=verbose,
        )

    # The inner retriever's `_retrieve`, not its `retrieve`: this class alone follows index nodes and sends events, so
    # that traces look the same with and without it.

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._retriever._retrieve(query_bundle)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await self._retriever._aretrieve(query_bundle)

    def _handle_recursive_retrieval(self, query_bundle: QueryBundle, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return self._mark(super()._handle_recursive_retrieval(query_bundle, nodes))

    async def _ahandle_recursive_retrieval(
        self, query_bundle: QueryBundle, nodes: list[NodeWithScore]
    ) -> list[NodeWithScore]:
        nodes = await super()._ahandle_recursive_retrieval(query_bundle, nodes)
        return await asyncio.to_thread(self._mark, nodes)  # queries the store, and may compress

    def _mark(self, nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        kept: list[NodeWithScore] = []
        for item in nodes:
            reference = node_reference(self._memory, item.node, on_missing=self._on_missing, mode=self._metadata_mode)
            if reference is not None or self._on_missing != "skip":
                kept.append(marked(item, reference))
        return kept


class KVMemoryStoreRetriever(BaseRetriever):
    """Finds passages of documents that were added to the memory itself (`memory.add`), with their caches.

    A passage without a stored text (`KVMemory.open(..., keep_text=True)` stores it) becomes a node without text that
    names its cache: engines of this package answer from the cache; others find no text.

    Args:
        memory: The memory to search.
        similarity_top_k: Maximum number of passages; the memory's `top_k` if None.
        filters: Metadata of the documents to search: `==` and `in`, all of which must hold.
        doc_ids: Ids of the documents to search; None for all.
        min_score: Least score of a passage.
        callback_manager: As in LlamaIndex.
        verbose: As in LlamaIndex.

    Raises:
        UnsupportedRequestError: The filters have another operator or condition.

    Example:
        ```python
        memory.add(Path("docs"))
        engine = KVMemoryQueryEngine.from_defaults(KVMemoryStoreRetriever(memory), llm=KVMemoryLLM(memory))
        ```
    """

    def __init__(
        self,
        memory: KVMemory,
        *,
        similarity_top_k: int | None = None,
        filters: MetadataFilters | None = None,
        doc_ids: list[str] | None = None,
        min_score: float | None = None,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        self._memory = memory
        self._options: RetrieveOptions = {
            "top_k": similarity_top_k,
            "document_ids": doc_ids,
            "filter": None if filters is None else _filter_of(filters),
            "min_score": min_score,
        }
        super().__init__(callback_manager=callback_manager, verbose=verbose)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in self._memory.retrieve(query_bundle.query_str, **self._options)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _filter_of(filters: MetadataFilters) -> Filter:
    """The filter of `KVMemory.retrieve`; errors as in `KVMemoryStoreRetriever`."""
    found: dict[str, Any] = {}
    equality = {FilterOperator.EQ, FilterOperator.IN}
    for each in filters.filters if filters.condition == FilterCondition.AND else [filters]:
        if not (isinstance(each, MetadataFilter) and each.operator in equality and each.key not in found):
            raise UnsupportedRequestError(
                "only filters with `==` or `in` on different metadata, joined by `and`, are supported",
                where="filters",
                next_step="Filter the nodes afterwards with a postprocessor.",
            )
        found[each.key] = each.value
    return found


def _node(hit: Hit) -> NodeWithScore:
    # The document's metadata is for filters and citations; the cache was made from the text alone.
    names = list(hit.metadata)
    node = TextNode(
        id_=f"{hit.document_id}#{hit.ordinal}",
        text=hit.text or "",
        metadata=dict(hit.metadata),
        excluded_llm_metadata_keys=names,
        excluded_embed_metadata_keys=names,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.document_id)},
    )
    return marked(NodeWithScore(node=node, score=hit.score), Reference(key=hit.text_sha256))
