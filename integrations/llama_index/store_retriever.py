"""KVMemoryStoreRetriever: finds the passages of a memory by its own BM25, without a separate index."""

from __future__ import annotations

import asyncio

from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from kv_memory import KVMemory, Reference
from kv_memory.retrieval.bm25 import Hit

from .nodes import marked

__all__ = ["KVMemoryStoreRetriever"]


class KVMemoryStoreRetriever(BaseRetriever):
    """Finds passages of documents that were added to the memory itself (`memory.add`), with their caches.

    A passage without a stored text (`KVMemory.open(..., keep_text=True)` stores it) becomes a node without text that
    names its cache: engines of this package answer from the cache; others find no text.

    Args:
        memory: The memory to search.
        similarity_top_k: Maximum number of passages; the memory's `top_k` if None.
        callback_manager: As in LlamaIndex.
        verbose: As in LlamaIndex.

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
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        self._memory = memory
        self._similarity_top_k = similarity_top_k
        super().__init__(callback_manager=callback_manager, verbose=verbose)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._memory.retrieve(query_bundle.query_str, top_k=self._similarity_top_k)
        return [_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


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
