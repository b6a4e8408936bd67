"""Conversation: old turns as distilled caches, recalled by what the newest one asks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from kv_memory.config import check_choice
from kv_memory.documents import Document, split_passages
from kv_memory.errors import ConfigError
from kv_memory.generate import Role, Turn
from kv_memory.memory import KVMemory
from kv_memory.query import Reference

__all__ = ["Conversation"]

# By memory and conversation, because a server makes a new object for every request. Two that add at once would take the
# same number, and the second replace what the first has added.
_locks: weakref.WeakKeyDictionary[KVMemory, dict[str, threading.Lock]] = weakref.WeakKeyDictionary()
_NAMES = {"system": "Instructions", "user": "User", "assistant": "Assistant"}


class Conversation:
    """The turns of one conversation that have left the prompt. Thread-safe; what is added outlives the process.

    They lie in a collection of their own beside the documents of `memory`, whose model reads them; with their text,
    whatever the memory's `keep_text` says. One process at a time may add to a conversation.

    Args:
        memory: Where, and read by what.
        conversation_id: Names the conversation, in the memory's collection.
        keep_ratio: Share of the turns' tokens kept. Without this and the next two it is the memory's.
        keep_tokens: In its place, how many tokens are kept of each exchange.
        max_bytes: In its place, the largest file of an exchange's cache, in bytes.
        top_k: How many passages of old turns one question recalls; as for documents if None.

    Example:
        ```python
        old = Conversation(memory, "alice")
        old.add([Turn("user", "My dog is called Biscuit."), Turn("assistant", "A fine name.")])
        question = Turn("user", "What is my dog called?")
        reply = memory.reader.reply([question], old.recall(question.text)).reply
        ```
    """

    def __init__(
        self,
        memory: KVMemory,
        conversation_id: str,
        *,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
        top_k: int | None = None,
    ) -> None:
        if not conversation_id.strip():
            raise ConfigError("a conversation needs a name", where="conversation_id")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}", where="top_k")
        self.conversation_id = conversation_id
        self.top_k = memory.settings.top_k if top_k is None else top_k
        self._memory = memory.in_collection(
            f"conversation:{memory.collection}:{conversation_id}",
            keep_ratio=keep_ratio,
            keep_tokens=keep_tokens,
            max_bytes=max_bytes,
        )
        self.keep = self._memory.settings.keep
        self._lock = _locks.setdefault(memory, {}).setdefault(conversation_id, threading.Lock())

    def add(self, turns: Sequence[Turn]) -> None:
        """Distil turns, in the order they were spoken. They are durable when this returns; blank ones are left out.

        Raises:
            ConfigError: One has an unknown role.
            DocumentError: One is no text.
            StoreError: They cannot be written; none of them is.
        """
        spoken = [turn for turn in turns if turn.text.strip()]
        for turn in spoken:
            check_choice(turn.role, Role, where="role")
            Document(id="turn", text=turn.text)  # raises for what is no text, before a tokenizer sees it
        if not spoken:
            return
        with self._lock:
            number = max((int(summary.id) for summary in self._memory.documents()), default=0) + 1
            self._memory.add_passages(
                f"{number:08d}",
                self._passages(spoken),
                metadata={"turns": [list(turn) for turn in spoken]},
                keep_text=True,  # a conversation is there to be shown again
            )

    def recall(self, question: str) -> list[Reference]:
        """References to what was said about a question before, in the order it was spoken; none if nothing fits."""
        hits = self._memory.retrieve(question, top_k=self.top_k)
        spoken = sorted(hits, key=lambda hit: (hit.document_id, hit.ordinal))
        ratio_of, fingerprint = self._memory.store.keep_ratio_of, self._memory.compressor.fingerprint()
        return [
            Reference(key=key, keep_ratio=ratio_of(key, fingerprint, self.keep), collection=self._memory.collection)
            for key in dict.fromkeys(hit.text_sha256 for hit in spoken)  # what was said twice is read once
        ]

    def turns(self) -> list[Turn]:
        """All turns that were added, as they were."""
        return [Turn(*turn) for summary in self._memory.documents() for turn in summary.metadata["turns"]]

    def clear(self) -> None:
        """Delete all turns and their caches."""
        with self._lock:
            for summary in self._memory.documents():
                self._memory.remove(summary.id)

    def _passages(self, turns: Sequence[Turn]) -> list[str]:
        """One passage for each exchange, a question and what followed; one that is longer than a passage is cut.

        Several in a passage were rejected: a small model does not find one fact among ten exchanges, even uncompressed.
        """
        exchanges: list[list[str]] = []
        for turn in turns:
            if turn.role == "user" or not exchanges:
                exchanges.append([])
            exchanges[-1].append(f"{_NAMES[turn.role]}: {turn.text.strip()}")
        count, most = self._memory.backbone.count_tokens, self._memory.settings.passage_tokens
        return [
            piece
            for lines in exchanges
            for piece in split_passages("\n".join(lines), max_tokens=most, count_tokens=count)
        ]
