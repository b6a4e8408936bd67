"""Converts LangChain's messages to turns and references, and defines the mark by which a history asks for recall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kv_memory import Conversation, KVMemory, Reference, Turn, UnsupportedRequestError
from kv_memory.generate import Role

__all__ = [
    "KV_IDS",
    "KV_RECALL",
    "KV_TEXTS",
    "RecallMark",
    "is_mark",
    "options_for",
    "recalled",
    "references_of",
    "turns_of",
]

# Options of a call. They contain strings only, because tracers and caches serialise them.
KV_IDS = "kv_ids"  # [str(Reference)], in the order of composition
KV_TEXTS = "kv_texts"  # {key: text}, for references that may have no cache

KV_RECALL = "kv_recall"  # in the additional_kwargs of a message: a RecallMark as a dict

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}


class RecallMark(NamedTuple):
    """A request for recall on a history's first message, because a history is loaded before the question is known.

    Attributes:
        conversation_id: Conversation to recall old turns from.
        keep_ratio: Keep ratio of the old turns' caches; None if one of the last two is set.
        top_k: Number of passages to recall.
        n_turns: Number of turns that have left the window; it changes the key of LLM caches when more turns leave.
        keep_tokens: Number of tokens kept of each exchange, see `Conversation`.
        max_bytes: Maximum size of an exchange's cache file in bytes, see `Conversation`.
    """

    conversation_id: str
    keep_ratio: float | None
    top_k: int
    n_turns: int
    keep_tokens: int | None = None
    max_bytes: int | None = None

    def message(self) -> SystemMessage:
        """An empty message that carries the mark."""
        return SystemMessage(content="", additional_kwargs={KV_RECALL: self._asdict()})


def is_mark(message: BaseMessage) -> bool:
    """Whether a message carries a mark and nothing else."""
    return isinstance(message, SystemMessage) and KV_RECALL in message.additional_kwargs and not message.content


def turns_of(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Messages as turns, without marks. A turn does not include the speaker's name.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    return [Turn(_role(message), _text(message)) for message in messages if not is_mark(message)]


def options_for(references: Iterable[Reference]) -> dict[str, Any]:
    """References as options of a call."""
    known = {str(reference): reference for reference in references}  # drops duplicates
    options: dict[str, Any] = {KV_IDS: list(known)}
    texts = {reference.key: reference.text for reference in known.values() if reference.text is not None}
    return {**options, KV_TEXTS: texts} if texts else options


def references_of(options: Mapping[str, Any]) -> list[Reference] | None:
    """The references in the options of a call; None if the options do not set `kv_ids`.

    Raises:
        ConfigError: A value is not a reference.
    """
    given = options.get(KV_IDS)
    if given is None:
        return None
    texts = options.get(KV_TEXTS) or {}
    references = [Reference.parse(value) for value in ([given] if isinstance(given, str | Reference) else given)]
    return [replace(reference, text=texts.get(reference.key, reference.text)) for reference in references]


def recalled(memory: KVMemory, messages: Sequence[BaseMessage]) -> list[Reference]:
    """References to the old turns that are relevant to the last user message, from every marked conversation."""
    marks = [RecallMark(**message.additional_kwargs[KV_RECALL]) for message in messages if is_mark(message)]
    question = next((_text(m) for m in reversed(messages) if not is_mark(m) and _role(m) == "user"), "")
    if not question.strip():
        return []
    found: list[Reference] = []
    for mark in marks:
        if mark.n_turns:
            old = Conversation(
                memory,
                mark.conversation_id,
                keep_ratio=mark.keep_ratio,
                keep_tokens=mark.keep_tokens,
                max_bytes=mark.max_bytes,
                top_k=mark.top_k,
            )
            found += old.recall(question)
    return found


def _role(message: BaseMessage) -> Role:
    if isinstance(message, AIMessage):
        if message.tool_calls:
            _refuse_tools(message)
        return "assistant"
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if not isinstance(message, ChatMessage):
        _refuse_tools(message)
    if (role := _ROLES.get(message.role.lower())) is None:
        raise UnsupportedRequestError(
            f"a message has the unknown role {message.role!r}",
            where="messages",
            next_step=f"Use one of {', '.join(_ROLES)}.",
        )
    return role


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        else:
            raise UnsupportedRequestError(
                "this model accepts text only",
                where=f"a block of type {block.get('type')!r} in a message of type {message.type!r}",
                next_step="Put a description of it into the message instead.",
            )
    return "\n".join(texts)


def _refuse_tools(message: BaseMessage) -> NoReturn:
    raise UnsupportedRequestError(
        "this model cannot call tools or use their results",
        where=f"message of type {message.type!r}",
        next_step="Give the chain itself to an agent as a tool, or leave these messages out.",
    )
