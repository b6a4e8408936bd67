"""LlamaIndex's query and chat engines, answering from distilled caches; its own chat engines always use text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONTEXT_PROMPT_TEMPLATE
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode

from ..references import DOCUMENTS_ABOVE, OnMissing
from .llm import KVMemoryLLM
from .retriever import KVMemoryRetriever
from .synthesizer import KVMemorySynthesizer, check_llm

_DEFAULTS = {DEFAULT_CONTEXT_TEMPLATE, DEFAULT_CONTEXT_PROMPT_TEMPLATE}


class KVMemoryQueryEngine(RetrieverQueryEngine):
    """A `RetrieverQueryEngine` over a `KVMemoryRetriever` and a `KVMemorySynthesizer`.

    Example:
        ```python
        engine = KVMemoryQueryEngine.from_defaults(index.as_retriever(similarity_top_k=2), llm=KVMemoryLLM(memory))
        print(engine.query("How long are messages kept?"))
        ```
    """

    @classmethod
    def from_defaults(
        cls,
        retriever: BaseRetriever | BaseIndex[Any],
        llm: KVMemoryLLM | None = None,
        *,
        on_missing: OnMissing = "text",
        metadata_mode: MetadataMode = MetadataMode.LLM,
        text_qa_template: BasePromptTemplate | None = None,
        output_cls: type[BaseModel] | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        streaming: bool = False,
        similarity_top_k: int | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> KVMemoryQueryEngine:
        """Assemble an engine.

        Args:
            retriever: Any retriever, or an index to take the retriever from.
            llm: A `KVMemoryLLM`, whose memory holds the caches; `Settings.llm` if None.
            on_missing: Action for a node without a cache, see `KVMemoryRetriever`.
            metadata_mode: Metadata to include in a node's text.
            text_qa_template: See `KVMemorySynthesizer`.
            output_cls: See `KVMemorySynthesizer`.
            node_postprocessors: Rerankers and similar steps between retriever and synthesizer.
            streaming: Stream the responses.
            similarity_top_k: Number of nodes that an index's retriever finds; the memory's `top_k` if None.
            callback_manager: As in LlamaIndex.

        Raises:
            ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
        """
        llm = check_llm(llm or Settings._llm, where="llm of KVMemoryQueryEngine")
        memory = llm.memory
        if isinstance(retriever, BaseIndex):
            retriever = retriever.as_retriever(similarity_top_k=similarity_top_k or memory.settings.top_k)
        manager = callback_manager or retriever.callback_manager
        if not isinstance(retriever, KVMemoryRetriever):
            retriever = KVMemoryRetriever(
                retriever, memory, on_missing=on_missing, metadata_mode=metadata_mode, callback_manager=manager
            )
        synthesizer = KVMemorySynthesizer(
            llm,
            text_qa_template=text_qa_template,
            on_missing=on_missing,
            metadata_mode=metadata_mode,
            output_cls=output_cls,
            streaming=streaming,
            callback_manager=manager,
        )
        return cls(
            retriever,
            response_synthesizer=synthesizer,
            node_postprocessors=list(node_postprocessors or []),
            callback_manager=manager,
        )


class _FromCaches:
    """What both engines do differently from LlamaIndex's."""

    _llm: Any
    callback_manager: Any

    def __init__(self, retriever: BaseRetriever, llm: LLM, *args: Any, **kwargs: Any) -> None:
        checked = check_llm(llm, where=f"llm of {type(self).__name__}")
        super().__init__(retriever, checked, *args, **kwargs)  # type: ignore[call-arg]

    def _synthesizer(
        self, instructions: Sequence[ChatMessage], context: PromptTemplate, history: list[ChatMessage], streaming: bool
    ) -> KVMemorySynthesizer:
        """A synthesizer behind instructions and history; a custom context template becomes one of the instructions."""
        before = list(instructions)
        if context.template not in _DEFAULTS:  # the defaults only announce that context follows
            text = context.format(context_str=DOCUMENTS_ABOVE)
            before.append(ChatMessage(role=MessageRole.SYSTEM, content=text))
        return KVMemorySynthesizer(
            self._llm, prefix_messages=[*before, *history], streaming=streaming, callback_manager=self.callback_manager
        )


class KVMemoryChatEngine(_FromCaches, ContextChatEngine):
    """`ContextChatEngine` with the caches of retrieved nodes instead of their text.

    Make one with `from_defaults(retriever=..., llm=KVMemoryLLM(memory))`; all of its options work.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
    """

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> Any:
        return self._synthesizer(self._prefix_messages, self._context_template, chat_history, streaming)


class KVMemoryCondensePlusContextChatEngine(_FromCaches, CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` with the caches of retrieved nodes instead of their text.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
    """

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> Any:
        before = [ChatMessage(role=MessageRole.SYSTEM, content=self._system_prompt)] if self._system_prompt else []
        return self._synthesizer(before, self._context_prompt_template, chat_history, streaming)
