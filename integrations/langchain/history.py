"""KVMemoryChatMessageHistory: the newest messages as they are, older ones as distilled caches that are recalled."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage, HumanMessage, messages_from_dict, messages_to_dict

from kv_memory import ConfigError, Conversation, DocumentNotFoundError, KVMemory
from kv_memory.store import DocumentRecord, Store

from ..readable import readable
from .messages import RecallMark, is_mark, turns_of

__all__ = ["KVMemoryChatMessageHistory"]

# Windows of a tenant's conversations lie in one collection, each as the metadata of a document without passages:
# replaced in one transaction, and not found by any question.
_COLLECTION = "langchain:windows"

# By memory and conversation, because RunnableWithMessageHistory makes a new object for every call.
_locks: weakref.WeakKeyDictionary[KVMemory, dict[str, threading.Lock]] = weakref.WeakKeyDictionary()


class _Window(NamedTuple):
    messages: list[BaseMessage]
    n_turns: int  # that have left it


class KVMemoryChatMessageHistory(BaseChatMessageHistory):
    """A chat history whose prompt stays short however long the chat gets, for a `ChatKVMemory` over the same memory.

    The newest messages stay in a window, word for word. What no longer fits is distilled, exchange by exchange, and
    kept in a collection of the conversation's own. Both are durable when `add_messages` returns, and the same id goes
    on with the conversation in another process.

    LangChain reads a history before the question is known. `messages` therefore begins, once there are old turns, with
    a system message without content that asks for recall; `ChatKVMemory` takes it out of the prompt and answers from
    the caches of those old turns that the last user's message is about. Other models would see an empty message.
    Whoever may put system messages of their own into a prompt may ask for any conversation of the store.

    Args:
        memory: Where the conversation lies, and what reads it.
        conversation_id: Names the conversation, in the memory's collection.
        window_tokens: The window's size in tokens of its messages' texts; None for no limit.
        window_turns: The window's size in messages; None for no limit.
        keep_ratio: Share of the old turns' tokens kept. Without this and the next two it is the memory's.
        keep_tokens: In its place, how many tokens are kept of each exchange.
        max_bytes: In its place, the largest file of an exchange's cache, in bytes.
        top_k: How many passages of old turns a question recalls; as for documents if None.

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
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
        top_k: int | None = None,
    ) -> None:
        for name, value in (("window_tokens", window_tokens), ("window_turns", window_turns)):
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be 0 or more, or None, got {value}", where=name)
        self._memory = memory
        self._conversation = Conversation(
            memory,
            conversation_id,
            keep_ratio=keep_ratio,
            keep_tokens=keep_tokens,
            max_bytes=max_bytes,
            top_k=top_k,
        )
        self._window_tokens = window_tokens
        self._window_turns = window_turns
        self._lock = _locks.setdefault(memory, {}).setdefault(conversation_id, threading.Lock())

    @property
    def conversation(self) -> Conversation:
        """The turns that have left the window."""
        return self._conversation

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # LangChain says attribute, and lets us say how
        """The window, behind a message that asks for recall if there is more than the window."""
        window = self._load()
        if not window.n_turns:
            return window.messages
        old = self._conversation
        mark = RecallMark(
            old.conversation_id,
            old.keep.keep_ratio,
            old.top_k,
            window.n_turns,
            keep_tokens=old.keep.keep_tokens,
            max_bytes=old.keep.max_bytes,
        )
        return [mark.message(), *window.messages]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, and distil what no longer fits the window.

        Raises:
            UnsupportedRequestError: One is of a tool, or holds something else than text; none is added.
            ConfigError: JSON cannot hold one; none is added.
            StoreError: They cannot be written.
        """
        new = [message for message in messages if not is_mark(message)]
        turns_of(new)
        with self._lock:
            window = self._load()
            window = window._replace(messages=[*window.messages, *new])
            self._save(window)  # first, so that they are kept whatever comes of distilling
            if leaving := self._n_leaving(window.messages):
                self._distil(window, leaving)

    def clear(self) -> None:
        """Delete the conversation, old turns and their caches included."""
        with self._lock:
            self._conversation.clear()
            if self._windows.has_document(self._conversation.conversation_id):
                self._windows.delete_document(self._conversation.conversation_id)

    def _n_leaving(self, messages: Sequence[BaseMessage]) -> int:
        """How many of the oldest messages leave the window: as few as it takes, and an exchange leaves as a whole."""
        lengths = self._memory.backbone.count_tokens([readable(turn).text for turn in turns_of(messages)])
        for start in range(len(messages) + 1):
            fits = (self._window_tokens is None or sum(lengths[start:]) <= self._window_tokens) and (
                self._window_turns is None or len(messages) - start <= self._window_turns
            )
            begins = start in (0, len(messages)) or isinstance(messages[start], HumanMessage)
            if fits and begins:
                return start
        raise AssertionError("an empty window always fits")

    def _distil(self, window: _Window, leaving: int) -> None:
        turns = [readable(turn) for turn in turns_of(window.messages[:leaving]) if turn.text.strip()]
        # A crash between the two writes below leaves turns in both places; they are not distilled a second time.
        n_distilled = len(self._conversation.turns())
        self._conversation.add(turns[max(0, n_distilled - window.n_turns) :])
        self._save(_Window(window.messages[leaving:], window.n_turns + len(turns)))

    @property
    def _windows(self) -> Store:
        return self._memory.in_collection(f"{_COLLECTION}:{self._memory.collection}").store

    def _load(self) -> _Window:
        try:
            kept = self._windows.document(self._conversation.conversation_id).metadata
        except DocumentNotFoundError:
            return _Window([], 0)
        return _Window(messages_from_dict(kept["messages"]), kept["n_turns"])

    def _save(self, window: _Window) -> None:
        kept = {"messages": messages_to_dict(window.messages), "n_turns": window.n_turns}
        try:
            digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a message must be what JSON can hold: {error}",
                where=f"conversation {self._conversation.conversation_id!r}",
                next_step="Leave its artifacts and raw responses out.",
            ) from error
        record = DocumentRecord(id=self._conversation.conversation_id, content_sha256=digest, metadata=kept)
        self._windows.put_document(record)
