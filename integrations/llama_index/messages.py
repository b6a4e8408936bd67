"""Converts LlamaIndex's messages to turns, and to messages that carry references to distilled caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from kv_memory import Reference, Turn

from ..llms import ROLES, refuse_content, refuse_tools
from ..references import KV_IDS, reference_options

__all__ = ["message_with", "turns_of"]


def message_with(references: Iterable[Reference]) -> ChatMessage:
    """An empty message that carries references."""
    return ChatMessage(role=MessageRole.SYSTEM, content="", additional_kwargs=reference_options(references))


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Messages as turns, without those that only carry references.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    turns: list[Turn] = []
    for message in messages:
        role, where = ROLES.get(message.role.value), f"role {message.role.value!r}"
        if role is None or message.additional_kwargs.get("tool_calls"):
            refuse_tools(where=f"message of {where}")
        for block in message.blocks:
            if not isinstance(block, TextBlock):
                refuse_content(f"a {type(block).__name__}", where=where)
        text = "\n".join(block.text for block in message.blocks if isinstance(block, TextBlock))
        if text.strip() or KV_IDS not in message.additional_kwargs:
            turns.append(Turn(role, text))
    return turns
