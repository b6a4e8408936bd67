"""KVMemoryBlock: turns that fall out of a chat's window, distilled, and recalled when a question is about them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.memory import BaseMemoryBlock

from kv_memory import Conversation, KVMemory

from ..readable import readable
from .messages import KV_IDS, message_with, turns_of

__all__ = ["KVMemoryBlock"]


class KVMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """A block of LlamaIndex's `Memory`, for a `KVMemoryLLM` or an engine over one.

    Messages that `Memory` ejects are distilled at once and kept in the store, in a collection of the conversation's
    own. For a question the passages of them that it is about come back as references on one message without content,
    so that the prompt grows by nothing, however long the conversation was.

    Args:
        memory: Where the turns go, and what reads them.
        conversation_id: Names the conversation; the same name goes on with it in another process.
        keep_ratio: Share of the turns' tokens kept. Without this and the next two it is the memory's.
        keep_tokens: In its place, how many tokens are kept of each exchange.
        max_bytes: In its place, the largest file of an exchange's cache, in bytes.
        top_k: How many passages of old turns a question recalls; as for documents if None.
        name: Of the block.
        priority: Of the block; 0, the default, is never truncated.

    Example:
        ```python
        block = KVMemoryBlock(memory, conversation_id="alice")
        chat_memory = Memory.from_defaults(token_limit=1000, memory_blocks=[block])
        engine = KVMemoryChatEngine.from_defaults(retriever=retriever, llm=llm, memory=chat_memory)
        ```
    """

    name: str = Field(default="kv_memory")
    _conversation: Conversation = PrivateAttr()

    def __init__(
        self,
        memory: KVMemory,
        *,
        conversation_id: str,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
        top_k: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._conversation = Conversation(
            memory,
            conversation_id,
            keep_ratio=keep_ratio,
            keep_tokens=keep_tokens,
            max_bytes=max_bytes,
            top_k=top_k,
        )

    @property
    def conversation(self) -> Conversation:
        """The turns it holds."""
        return self._conversation

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> list[ChatMessage]:
        question = _last_question(messages or [])
        if not question:
            return []
        references = await asyncio.to_thread(self._conversation.recall, question)
        return [message_with(references)] if references else []

    async def _aput(self, messages: list[ChatMessage]) -> None:
        spoken = [message for message in messages if KV_IDS not in message.additional_kwargs]
        await asyncio.to_thread(self._conversation.add, [readable(turn) for turn in turns_of(spoken)])


def _last_question(messages: Sequence[ChatMessage]) -> str:
    return next((str(m.content) for m in reversed(messages) if m.role == MessageRole.USER and m.content), "")
