"""Converts LangChain's messages to turns, and defines the mark by which a history asks for recall."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kv_memory import Conversation, KVMemory, Reference, Turn, UnsupportedRequestError
from kv_memory.generate import Role

from ..llms import ROLES, refuse_content, refuse_tools

KV_RECALL = "kv_recall"  # in the additional_kwargs of a message: the arguments of a `Conversation`, and `n_turns`


def recall_mark(old: Conversation, n_turns: int) -> SystemMessage:
    """An empty message that asks for recall: a history is loaded before the question is known.

    The number of turns that have left the window changes the key of LLM caches when more turns leave.
    """
    kept = {"keep_ratio": old.keep.keep_ratio, "keep_tokens": old.keep.keep_tokens, "max_bytes": old.keep.max_bytes}
    mark = {"conversation_id": old.conversation_id, **kept, "top_k": old.top_k, "n_turns": n_turns}
    return SystemMessage(content="", additional_kwargs={KV_RECALL: mark})


def is_mark(message: BaseMessage) -> bool:
    """Whether a message carries a mark and nothing else."""
    return isinstance(message, SystemMessage) and KV_RECALL in message.additional_kwargs and not message.content


def turns_of(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Messages as turns, without marks. A turn does not include the speaker's name.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    return [Turn(_role(message), _text(message)) for message in messages if not is_mark(message)]


def recalled(memory: KVMemory, messages: Sequence[BaseMessage]) -> list[Reference]:
    """References to the old turns that are relevant to the last user message, from every marked conversation."""
    question = next((_text(m) for m in reversed(messages) if not is_mark(m) and _role(m) == "user"), "")
    if not question.strip():
        return []
    found: list[Reference] = []
    for message in filter(is_mark, messages):
        options = dict(message.additional_kwargs[KV_RECALL])
        if options.pop("n_turns"):
            found += Conversation(memory, **options).recall(question)
    return found


def _role(message: BaseMessage) -> Role:
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
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts: list[str] = []
    for block in blocks:
        if not isinstance(block, str) and block.get("type") != "text":
            refuse_content(f"a block of type {block.get('type')!r}", where=f"type {message.type!r}")
        texts.append(block if isinstance(block, str) else str(block.get("text", "")))
    return "\n".join(texts)
