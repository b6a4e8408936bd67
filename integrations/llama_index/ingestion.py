"""KVCompressTransform: a step of an ingestion pipeline that distils the nodes passing through."""

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

__all__ = ["KVCompressTransform"]


class KVCompressTransform(TransformComponent):
    """Reads every node into a distilled cache; the nodes pass unchanged. What has a cache already costs nothing.

    All nodes of a document come in one call, as `IngestionPipeline` sends them: a document that comes again replaces
    what was there of it, and caches of text that is gone are removed. That documents are deleted, only a
    `KVMemoryVectorStore` learns. The store keeps the texts too, so that its own retriever gives whole nodes.

    A pipeline's cache of transformations never answers for this one: the caches it is there to make would not be made
    for a store that does not have them yet. With a persisted `IngestionCache` put it into a pipeline of its own, with
    `disable_cache=True`.

    Args:
        memory: Where the caches go.
        metadata_mode: Which metadata is part of a node's text; the same as in retriever and synthesizer.

    Raises:
        DocumentError: A node's text is no text.
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
        """The name LlamaIndex keeps it under."""
        return "KVCompressTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a pipeline makes its cache key from; never the same twice."""
        return {**super().to_dict(**kwargs), "never_cached": uuid.uuid4().hex}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Distil nodes; with `show_progress` a bar counts documents."""
        documents = texts_by_document(nodes, self.metadata_mode)
        shown = get_tqdm_iterable(list(documents.items()), bool(kwargs.get("show_progress")), "Distilling documents")
        for document_id, texts in shown:
            put_texts(self._memory, document_id, texts, extend=False, keep_text=True)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a store and its model cannot be sent to another process",
            where="num_workers of the pipeline",
            next_step="Run the pipeline without num_workers, or distil in a pipeline of its own behind it.",
        )
