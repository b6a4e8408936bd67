"""KVMemorySynthesizer: answers from the caches of the retrieved nodes instead of from their text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE

from kv_memory import ConfigError
from kv_memory.config import check_choice

from ..references import OnMissing, references_in
from .llm import KVMemoryLLM
from .messages import KV_QA_PROMPT, CachedPrompt
from .nodes import references_to


def check_llm(llm: object, *, where: str) -> KVMemoryLLM:
    """Return the LLM if it can answer from caches.

    Another LLM would ignore `kv_ids` as an unknown option and silently answer without any document.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
    """
    if isinstance(llm, KVMemoryLLM):
        return llm
    raise ConfigError(
        f"{type(llm).__name__} cannot answer from distilled caches",
        where=where,
        next_step="Pass llm=KVMemoryLLM(memory), or use LlamaIndex's own response synthesizer with this LLM.",
    )


class KVMemorySynthesizer(BaseSynthesizer):
    """Composes the caches of all nodes into one context and asks once; there is nothing to pack or refine.

    Events and callbacks are those of LlamaIndex's `simple_summarize`. A separate message carries the references to the
    LLM; `prefix_messages` and the prompt template's messages follow it.

    Args:
        llm: A `KVMemoryLLM`.
        text_qa_template: The prompt that follows the documents. `{query_str}` is the question; `{context_str}`, if
            present, becomes a remark that the documents are above. The question alone if None.
        on_missing: Action for a node without a cache, see `KVMemoryRetriever`.
        metadata_mode: Metadata to include in a node's text.
        prefix_messages: System prompt and chat history.
        output_cls: Pydantic class of the answers, which are decoded by its schema.
        streaming: Stream the responses.
        callback_manager: As in LlamaIndex.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`, or `on_missing` is unknown.
    """

    def __init__(
        self,
        llm: KVMemoryLLM,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        on_missing: OnMissing = "text",
        metadata_mode: MetadataMode = MetadataMode.LLM,
        prefix_messages: Sequence[ChatMessage] = (),
        output_cls: type[BaseModel] | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        check_choice(on_missing, OnMissing, where="on_missing")
        self._kv_llm = check_llm(llm, where="llm of KVMemorySynthesizer")
        super().__init__(
            llm=llm,
            callback_manager=callback_manager or llm.callback_manager,
            streaming=streaming,
            output_cls=output_cls,
        )
        self._text_qa_template: BasePromptTemplate = text_qa_template or KV_QA_PROMPT
        self._on_missing: OnMissing = on_missing
        self._metadata_mode = metadata_mode
        self._prefix_messages = list(prefix_messages)

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if "text_qa_template" in prompts:
            self._text_qa_template = prompts["text_qa_template"]

    # The base class passes only texts to `get_response`, so the nodes are passed as an extra option.

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """As in `BaseSynthesizer`; errors as in `MemoryLLM`."""
        response_kwargs["kv_nodes"] = nodes
        return _without_nothing(
            super().synthesize(query, self._shown(nodes), additional_source_nodes, **response_kwargs)
        )

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """`synthesize` without blocking the event loop."""
        response_kwargs["kv_nodes"] = nodes
        return _without_nothing(
            await super().asynthesize(query, self._shown(nodes), additional_source_nodes, **response_kwargs)
        )

    def _shown(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        """The nodes, or a placeholder if the history's references alone can answer."""
        recalled = references_in(*(message.additional_kwargs for message in self._prefix_messages))
        return nodes if nodes or not recalled else [_NOTHING]

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], kv_nodes: Sequence[NodeWithScore] | None = None, **kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from the caches of `kv_nodes`. Texts without nodes are refused because they would enter the prompt."""
        prompt = self._prompt(kv_nodes)
        if self._output_cls is not None:
            return self._kv_llm.structured_predict(self._output_cls, prompt, query_str=query_str)
        if self._streaming:
            return self._kv_llm.stream(prompt, query_str=query_str)
        return self._kv_llm.predict(prompt, query_str=query_str)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], kv_nodes: Sequence[NodeWithScore] | None = None, **kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` without blocking the event loop."""
        prompt = await asyncio.to_thread(self._prompt, kv_nodes)
        if self._output_cls is not None:
            return await self._kv_llm.astructured_predict(self._output_cls, prompt, query_str=query_str)
        if self._streaming:
            return await self._kv_llm.astream(prompt, query_str=query_str)
        return await self._kv_llm.apredict(prompt, query_str=query_str)

    def _prompt(self, nodes: Sequence[NodeWithScore] | None) -> CachedPrompt:
        if nodes is None:
            raise ConfigError(
                "this synthesizer answers from nodes, not from texts",
                where="get_response",
                next_step="Call synthesize(query, nodes=[...]).",
            )
        references = references_to(self._kv_llm.memory, nodes, on_missing=self._on_missing, mode=self._metadata_mode)
        return CachedPrompt.of(self._text_qa_template, references, self._prefix_messages)


# A placeholder, because the base class answers without asking the LLM if there are no nodes.
_NOTHING = NodeWithScore(node=TextNode(id_="nothing", text=""))


def _without_nothing(response: RESPONSE_TYPE) -> RESPONSE_TYPE:
    response.source_nodes = [item for item in response.source_nodes if item is not _NOTHING]
    if response.metadata:
        response.metadata.pop(_NOTHING.node.node_id, None)
    return response
