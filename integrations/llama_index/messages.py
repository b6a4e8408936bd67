"""Converts LlamaIndex's messages to turns, and to the references to distilled caches that they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from kv_memory import Reference, Turn, UnsupportedRequestError
from kv_memory.generate import Role

__all__ = ["KV_IDS", "KV_TEXTS", "message_with", "references_of", "turns_of"]

# Fields of ChatMessage.additional_kwargs. They contain strings only, because memories, templates, events and stores
# serialise messages.
KV_IDS = "kv_ids"  # [str(Reference)], in the order of composition
KV_TEXTS = "kv_texts"  # {key: text}, for references that have no cache

_ROLES: dict[MessageRole, Role] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def message_with(references: Sequence[Reference]) -> ChatMessage:
    """An empty message that carries references; an empty list of them still means "from caches"."""
    extra: dict[str, Any] = {KV_IDS: [str(reference) for reference in references]}
    texts = {reference.key: reference.text for reference in references if reference.text is not None}
    if texts:
        extra[KV_TEXTS] = texts
    return ChatMessage(role=MessageRole.SYSTEM, content="", additional_kwargs=extra)


def references_of(messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> list[Reference] | None:
    """The references in the messages and the options of a call, each once; None if neither sets `kv_ids`.

    Raises:
        ConfigError: A value is not a reference.
    """
    bringing = [
        source for source in (*(m.additional_kwargs for m in messages), options) if source.get(KV_IDS) is not None
    ]
    if not bringing:
        return None
    found: dict[str, Reference] = {}
    for source in bringing:
        texts = source.get(KV_TEXTS) or {}
        for value in source[KV_IDS]:
            reference = Reference.parse(value)
            found.setdefault(str(reference), replace(reference, text=texts.get(reference.key, reference.text)))
    return list(found.values())


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Messages as turns, without those that only carry references.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    turns: list[Turn] = []
    for message in messages:
        role = _ROLES.get(message.role)
        if role is None or message.additional_kwargs.get("tool_calls"):
            raise UnsupportedRequestError(
                "this model cannot call tools or use their results",
                where=f"message of role {message.role.value!r}",
                next_step="Give the query engine itself to an agent as a tool, or leave these messages out.",
            )
        other = next((block for block in message.blocks if not isinstance(block, TextBlock)), None)
        if other is not None:
            raise UnsupportedRequestError(
                "this model accepts text only",
                where=f"a {type(other).__name__} in a message of role {message.role.value!r}",
                next_step="Put a description of it into the message instead.",
            )
        text = "\n".join(block.text for block in message.blocks if isinstance(block, TextBlock))
        if text.strip() or KV_IDS not in message.additional_kwargs:
            turns.append(Turn(role, text))
    return turns
