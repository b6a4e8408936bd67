"""KVMemoryChatMessageHistory: the newest messages verbatim, older ones as distilled caches that are recalled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage, HumanMessage, messages_from_dict, messages_to_dict

from kv_memory import ConfigError, Conversation, DocumentNotFoundError, KVMemory
from kv_memory.store import DocumentRecord, Store

from ..llms import readable
from .messages import is_mark, recall_mark, turns_of

# The windows of a tenant's conversations share one collection, each as the metadata of a document without passages:
# it is replaced in one transaction, and no question retrieves it.
_COLLECTION = "langchain:windows"


class _Window(NamedTuple):
    messages: list[BaseMessage]
    n_turns: int  # number of turns that have left the window


class KVMemoryChatMessageHistory(BaseChatMessageHistory):
    """A chat history that keeps the prompt short however long the chat gets, for a `ChatKVMemory` on the same memory.

    The newest messages stay verbatim in a window. Messages that no longer fit are compressed, exchange by exchange, and
    kept in the conversation's own collection. Both are durable when `add_messages` returns, and the same id continues
    the conversation in another process.

    LangChain loads a history before the question is known. Once there are old turns, `messages` therefore begins with
    an empty system message that asks for recall. `ChatKVMemory` removes it from the prompt and answers from the caches
    of the old turns that are relevant to the last user message. Other models would see an empty message. Anyone who
    can put system messages into a prompt can recall any conversation of the memory's collection.

    Args:
        memory: The memory that stores the conversation and compresses it.
        conversation_id: Name of the conversation, in the memory's collection.
        window_tokens: Size of the window in tokens of its messages' texts; None for no limit.
        window_turns: Size of the window in messages; None for no limit.
        top_k: Number of passages of old turns that a question recalls; the memory's `top_k` if None.
        keep: One of keep_ratio, keep_tokens and max_bytes of an exchange; without any, the memory's setting applies.

    Attributes:
        conversation: The turns that have left the window.

    Raises:
        ConfigError: An option is out of range.

    Example:
        ```python
        chat = RunnableWithMessageHistory(
            prompt | ChatKVMemory(memory),
            lambda session_id: KVMemoryChatMessageHistory(memory, session_id),
            input_messages_key="input",
            history_messages_key="history",
        )
        ```
    """

    def __init__(
        self,
        memory: KVMemory,
        conversation_id: str,
        *,
        window_tokens: int | None = 1000,
        window_turns: int | None = None,
        top_k: int | None = None,
        **keep: float | None,
    ) -> None:
        for name, value in (("window_tokens", window_tokens), ("window_turns", window_turns)):
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be 0 or more, or None, got {value}", where=name)
        self._memory = memory
        self.conversation = Conversation(memory, conversation_id, top_k=top_k, **keep)
        self._window_tokens = math.inf if window_tokens is None else window_tokens
        self._window_turns = math.inf if window_turns is None else window_turns

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # LangChain's attribute may be a property
        """The window, preceded by a message that asks for recall if turns have left the window."""
        window = self._load()
        if not window.n_turns:
            return window.messages
        return [recall_mark(self.conversation, window.n_turns), *window.messages]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, and compress those that no longer fit the window.

        Raises:
            UnsupportedRequestError: A message is from or for a tool, or contains more than text; none is added.
            ConfigError: A message is not JSON-serialisable; none is added.
            StoreError: The messages cannot be written.
        """
        new = [message for message in messages if not is_mark(message)]
        turns_of(new)
        with self.conversation.lock:
            window = self._load()
            window = window._replace(messages=[*window.messages, *new])
            self._save(window)  # first, so that the messages are durable even if compression fails
            if leaving := self._n_leaving(window.messages):
                self._distil(window, leaving)

    def clear(self) -> None:
        """Delete the conversation, including old turns and their caches."""
        with self.conversation.lock:
            self.conversation.clear()
            if self._windows.has_document(self.conversation.conversation_id):
                self._windows.delete_document(self.conversation.conversation_id)

    def _n_leaving(self, messages: Sequence[BaseMessage]) -> int:
        """Number of oldest messages that leave the window: as few as necessary, and only whole exchanges."""
        lengths = self._memory.backbone.count_tokens([readable(turn).text for turn in turns_of(messages)])
        for start, message in enumerate(messages):
            fits = sum(lengths[start:]) <= self._window_tokens and len(messages) - start <= self._window_turns
            if fits and (start == 0 or isinstance(message, HumanMessage)):
                return start
        return len(messages)

    def _distil(self, window: _Window, leaving: int) -> None:
        turns = [readable(turn) for turn in turns_of(window.messages[:leaving]) if turn.text.strip()]
        # A crash between the two writes below leaves turns in both places; they are not compressed a second time.
        n_distilled = len(self.conversation.turns())
        self.conversation.add(turns[max(0, n_distilled - window.n_turns) :])
        self._save(_Window(window.messages[leaving:], window.n_turns + len(turns)))

    @property
    def _windows(self) -> Store:
        return self._memory.in_collection(f"{_COLLECTION}:{self._memory.collection}").store

    def _load(self) -> _Window:
        try:
            kept = self._windows.document(self.conversation.conversation_id).metadata
        except DocumentNotFoundError:
            return _Window([], 0)
        return _Window(messages_from_dict(kept["messages"]), kept["n_turns"])

    def _save(self, window: _Window) -> None:
        kept = {"messages": messages_to_dict(window.messages), "n_turns": window.n_turns}
        try:
            digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a message is not JSON-serialisable: {error}",
                where=f"conversation {self.conversation.conversation_id!r}",
                next_step="Leave its artifacts and raw responses out.",
            ) from error
        record = DocumentRecord(id=self.conversation.conversation_id, content_sha256=digest, metadata=kept)
        self._windows.put_document(record)
