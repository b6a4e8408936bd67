"""Chat engines that take their context from distilled caches; LlamaIndex's own engines always use text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONTEXT_PROMPT_TEMPLATE
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.prompts import PromptTemplate

from ..references import DOCUMENTS_ABOVE
from .synthesizer import KVMemorySynthesizer, check_llm

if TYPE_CHECKING:
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.llms import LLM
    from llama_index.core.retrievers import BaseRetriever

_DEFAULTS = {DEFAULT_CONTEXT_TEMPLATE, DEFAULT_CONTEXT_PROMPT_TEMPLATE}


def _synthesizer(
    llm: LLM,
    manager: CallbackManager,
    context: PromptTemplate,
    before: Sequence[ChatMessage],
    history: Sequence[ChatMessage],
    *,
    streaming: bool,
) -> KVMemorySynthesizer:
    """A synthesizer behind instructions and history; a custom context template becomes one of the instructions."""
    messages = list(before)
    if context.template not in _DEFAULTS:  # the defaults only announce that context follows
        text = context.format(context_str=DOCUMENTS_ABOVE)
        messages.append(ChatMessage(role=MessageRole.SYSTEM, content=text))
    return KVMemorySynthesizer(
        check_llm(llm, where="llm of a chat engine"),
        prefix_messages=[*messages, *history],
        streaming=streaming,
        callback_manager=manager,
    )


class KVMemoryChatEngine(ContextChatEngine):
    """`ContextChatEngine` with the caches of retrieved nodes instead of their text.

    Make one with `from_defaults(retriever=..., llm=KVMemoryLLM(memory))`; all of its options work.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
    """

    def __init__(self, retriever: BaseRetriever, llm: LLM, *args: Any, **kwargs: Any) -> None:
        super().__init__(retriever, check_llm(llm, where="llm of KVMemoryChatEngine"), *args, **kwargs)

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> Any:
        return _synthesizer(
            self._llm,
            self.callback_manager,
            self._context_template,
            self._prefix_messages,
            chat_history,
            streaming=streaming,
        )


class KVMemoryCondensePlusContextChatEngine(CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` with the caches of retrieved nodes instead of their text.

    Raises:
        ConfigError: The LLM is not a `KVMemoryLLM`; the message names the fix.
    """

    def __init__(self, retriever: BaseRetriever, llm: LLM, *args: Any, **kwargs: Any) -> None:
        super().__init__(retriever, check_llm(llm, where="llm of a chat engine"), *args, **kwargs)

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> Any:
        before = [ChatMessage(role=MessageRole.SYSTEM, content=self._system_prompt)] if self._system_prompt else []
        return _synthesizer(
            self._llm,
            self.callback_manager,
            self._context_prompt_template,
            before,
            chat_history,
            streaming=streaming,
        )
