"""KVCompressTransform: a step of an ingestion pipeline that compresses the nodes passing through."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.utils import get_tqdm_iterable

from kv_memory import ConfigError, KVMemory

from .nodes import put_texts, texts_by_document


class KVCompressTransform(TransformComponent):
    """Compresses every node into a distilled cache and passes it on unchanged. Nodes with a cache cost nothing.

    All nodes of a document must come in one call, as `IngestionPipeline` sends them: a document that comes again
    replaces its earlier version, and caches of removed text are deleted. Deletions of documents reach only a
    `KVMemoryVectorStore`. The store keeps the texts too, so that its own retriever returns complete nodes.

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
        documents = texts_by_document(nodes, self.metadata_mode)
        shown = get_tqdm_iterable(list(documents.items()), bool(kwargs.get("show_progress")), "Compressing documents")
        for document_id, texts in shown:
            put_texts(self._memory, document_id, texts, extend=False, keep_text=True)
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
