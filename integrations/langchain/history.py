"""create_kv_history: the newest messages of a chat verbatim, older ones as distilled caches that are recalled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from langchain_core.messages import BaseMessage, MessageLikeRepresentation, SystemMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from kv_memory import ConfigError, Conversation, KVMemory
from kv_memory.config import check_names
from kv_memory.settings import KEEP_NAMES, MemorySettings

from .messages import is_mark, recall_mark, role_of, turns_of


def create_kv_history(
    memory: KVMemory,
    *,
    window_tokens: int | None = 1000,
    window_turns: int | None = None,
    top_k: int | None = None,
    **keep: float | None,
) -> Runnable[Any, list[BaseMessage]]:
    """A step between a chat's messages and a `ChatKVMemory` that keeps the prompt short however long the chat gets.

    The messages come from what stores them, e.g. the state of a LangGraph graph with a checkpointer, and stay there
    unchanged. Instructions at the beginning, the newest messages and the last question are passed on verbatim. Older
    messages are compressed, exchange by exchange, into the `Conversation` of the chat's `thread_id`, each once. In
    their place stands an empty system message that asks for recall: `ChatKVMemory` answers from the caches of those old
    turns that are relevant to the last user message. Other models would see an empty message. Where messages are edited
    or a chat is taken up at an earlier point, the conversation follows. `Conversation(memory, thread_id).clear()`
    deletes its turns. Anyone who can put system messages into a prompt can recall any conversation of the memory's
    collection.

    Args:
        memory: The memory that stores the old turns and compresses them, the same as that of the model.
        window_tokens: Size of the window in tokens of its messages' texts; None for no limit. The last user message
            and what follows it do not count.
        window_turns: Size of the window in messages; None for no limit.
        top_k: Number of passages of old turns that a question recalls; the memory's `top_k` if None.
        keep: One of keep_ratio, keep_tokens and max_bytes of an exchange; without any, the memory's setting applies.

    Raises:
        ConfigError: An option is out of range; in a call, the config has no `thread_id`.
        UnsupportedRequestError: In a call, a message is from or for a tool, or contains more than text.
        StoreError: In a call, the old turns cannot be written.

    Example:
        ```python
        chat = create_kv_history(memory) | ChatKVMemory(memory)


        def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
            return {"messages": [chat.invoke(state["messages"])]}


        app = StateGraph(MessagesState).add_node(answer).add_edge(START, "answer").compile(checkpointer=InMemorySaver())
        app.invoke({"messages": "My dog is called Biscuit."}, {"configurable": {"thread_id": "alice"}})
        ```
    """
    for name, value, least in (
        ("window_tokens", window_tokens, 0),
        ("window_turns", window_turns, 0),
        ("top_k", top_k, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be {least} or more, or None, got {value}", where=name)
    check_names(keep, KEEP_NAMES)
    MemorySettings.resolve(asdict(memory.settings), **keep)  # raises if it is out of range
    limits = (math.inf if window_tokens is None else window_tokens, math.inf if window_turns is None else window_turns)

    def shortened(
        given: PromptValue | Sequence[MessageLikeRepresentation], config: RunnableConfig
    ) -> list[BaseMessage]:
        listed = given.to_messages() if isinstance(given, PromptValue) else convert_to_messages(given)
        messages = [message for message in listed if not is_mark(message)]
        conversation = Conversation(memory, _thread_id(config), top_k=top_k, **keep)
        start, end = _leaving(memory, messages, *limits)
        old = [turn for turn in turns_of(messages[start:end]) if turn.text.strip()]
        turns_of(messages)  # raises before anything is compressed
        conversation.follow(old)
        marks = [recall_mark(conversation, len(old))] if old else []
        return [*messages[:start], *marks, *messages[end:]]

    return RunnableLambda(shortened, name="kv_history")


def _thread_id(config: RunnableConfig) -> str:
    thread_id = config.get("configurable", {}).get("thread_id")
    if thread_id is None:
        raise ConfigError(
            "the config of the call does not name the chat",
            where="configurable.thread_id",
            next_step='Call with {"configurable": {"thread_id": ...}}, as graphs with a checkpointer are called.',
        )
    return str(thread_id)


def _leaving(memory: KVMemory, messages: Sequence[BaseMessage], max_tokens: float, max_turns: float) -> tuple[int, int]:
    """Range of the messages that leave the prompt: as few as necessary, and only whole exchanges."""
    n = len(messages)
    first = next((i for i, message in enumerate(messages) if not isinstance(message, SystemMessage)), n)
    asked = [i for i in range(first, n) if role_of(messages[i]) == "user"]
    end = last = asked[-1] if asked else n
    n_tokens = 0
    for i in reversed(range(first, last)):
        n_tokens += sum(memory.backbone.count_tokens([turn.text for turn in turns_of([messages[i]])]))
        if n_tokens > max_tokens or last - i > max_turns:
            return first, end
        if i in asked:
            end = i
    return first, first  # everything fits
