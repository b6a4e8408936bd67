"""Converts LangChain's messages to turns, and defines the mark by which a history asks for recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kv_memory import Conversation, KVMemory, Reference, Turn, UnsupportedRequestError
from kv_memory.generate import Role

from ..llms import REASONING, ROLES, log_left_out, readable, refuse_content, refuse_tools

KV_RECALL = "kv_recall"  # in the additional_kwargs of a message: the arguments of a `Conversation`, and `n_turns`


def recall_mark(old: Conversation, n_turns: int) -> SystemMessage:
    """An empty message that asks for recall, which `ChatKVMemory` does: a chain may still change the question.

    The number of turns that have left the window changes the key of LLM caches when more turns leave.
    """
    kept = {"keep_ratio": old.keep.keep_ratio, "keep_tokens": old.keep.keep_tokens, "max_bytes": old.keep.max_bytes}
    mark = {"conversation_id": old.conversation_id, **kept, "top_k": old.top_k, "n_turns": n_turns}
    return SystemMessage(content="", additional_kwargs={KV_RECALL: mark})


def is_mark(message: BaseMessage) -> bool:
    """Whether a message carries a mark and nothing else."""
    return isinstance(message, SystemMessage) and KV_RECALL in message.additional_kwargs and not message.content


def turns_of(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Messages as turns, without marks, speakers' names and the reasoning of models.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    turns = [(message, Turn(role_of(message), _text(message))) for message in messages if not is_mark(message)]
    return [turn for message, turn in turns if turn.text or not _reasoning_in(message)]


def recalled(memory: KVMemory, messages: Sequence[BaseMessage]) -> list[Reference]:
    """References to the old turns that are relevant to the last user message, from every marked conversation."""
    question = next((_text(m) for m in reversed(messages) if not is_mark(m) and role_of(m) == "user"), "")
    if not question.strip():
        return []
    found: list[Reference] = []
    for message in filter(is_mark, messages):
        options = dict(message.additional_kwargs[KV_RECALL])
        if options.pop("n_turns"):
            found += Conversation(memory, **options).recall(question)
    return found


def role_of(message: BaseMessage) -> Role:
    """The role of a message's turn; `UnsupportedRequestError` if it is a tool's or unknown."""
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, AIMessage) and not message.tool_calls:
        return "assistant"
    if not isinstance(message, ChatMessage):
        refuse_tools(where=f"message of type {message.type!r}")
    if (role := ROLES.get(message.role.lower())) is None:
        raise UnsupportedRequestError(
            f"a message has the unknown role {message.role!r}",
            where="messages",
            next_step=f"Use one of {', '.join(ROLES)}.",
        )
    return role


def _text(message: BaseMessage) -> str:
    for kind in _reasoning_in(message):
        log_left_out(kind)
    texts: list[str] = []
    for block in _blocks(message):
        if (kind := block["type"]) == "text":
            texts.append(str(block.get("text", "")))
        elif kind not in REASONING:
            refuse_content(f"a block of type {kind!r}", where=f"type {message.type!r}")
    return readable("\n".join(texts))


def _reasoning_in(message: BaseMessage) -> set[str]:
    kinds = {block["type"] for block in _blocks(message)} | {k for k, v in message.additional_kwargs.items() if v}
    return kinds & REASONING


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    """The content as blocks with a type; a `non_standard` block stands for what it wraps."""
    content: list[Any] = [message.content] if isinstance(message.content, str) else list(message.content)
    blocks: list[Any] = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    return [
        {"type": "unknown", **(block.get("value", {}) if block.get("type") == "non_standard" else block)}
        for block in blocks
    ]
