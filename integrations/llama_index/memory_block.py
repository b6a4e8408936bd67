"""KVMemoryBlock: compresses turns that leave a chat's window, and recalls those relevant to a question."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.memory import BaseMemoryBlock

from kv_memory import Conversation, KVMemory

from ..references import KV_IDS
from .messages import message_with, turns_of


class KVMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """A block of LlamaIndex's `Memory`, for a `KVMemoryLLM` or an engine over one.

    Messages that `Memory` flushes are compressed at once and kept in the conversation's own collection of the store.
    For a question, references to the relevant passages are returned on one empty message, so the prompt does not grow,
    however long the conversation was.

    Args:
        memory: The memory that stores the turns and compresses them.
        conversation_id: Name of the conversation; the same name continues it in another process.
        keep_ratio: Share of the turns' tokens kept; the memory's setting if this and the next two are None.
        keep_tokens: Number of tokens kept of each exchange, instead of `keep_ratio`.
        max_bytes: Maximum size of an exchange's cache file in bytes, instead of `keep_ratio`.
        top_k: Number of passages of old turns that a question recalls; the memory's `top_k` if None.
        name: Name of the block.
        priority: Priority of the block; 0, the default, means that it is never truncated.

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
            memory, conversation_id, keep_ratio=keep_ratio, keep_tokens=keep_tokens, max_bytes=max_bytes, top_k=top_k
        )

    @property
    def conversation(self) -> Conversation:
        """The turns that the block holds."""
        return self._conversation

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> list[ChatMessage]:
        question = next(
            (str(m.content) for m in reversed(messages or []) if m.role == MessageRole.USER and m.content), ""
        )
        if not question:
            return []
        references = await asyncio.to_thread(self._conversation.recall, question)
        return [message_with(references)] if references else []

    async def _aput(self, messages: list[ChatMessage]) -> None:
        spoken = [message for message in messages if KV_IDS not in message.additional_kwargs]
        await asyncio.to_thread(self._conversation.add, turns_of(spoken))
