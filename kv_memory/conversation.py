"""Conversation: old turns as distilled caches, recalled when the newest turn asks about them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from kv_memory.config import check_choice, check_name
from kv_memory.documents import Document, split_passages
from kv_memory.errors import ConfigError
from kv_memory.generate import Role, Turn
from kv_memory.memory import KVMemory
from kv_memory.query import Reference

# By memory and conversation id, because a server creates a new object for every request. Without the lock, two
# concurrent `add` calls would take the same number, and the second would replace the first one's turns.
_locks: weakref.WeakKeyDictionary[KVMemory, weakref.WeakValueDictionary[str, threading.RLock]]
_locks = weakref.WeakKeyDictionary()
_NAMES = {"system": "Instructions", "user": "User", "assistant": "Assistant"}


class Conversation:
    """The turns of one conversation that have left the prompt. Thread-safe; added turns outlive the process.

    They are stored with their text, whatever the memory's `keep_text` says, in a separate collection beside the
    documents of `memory`, whose model compresses them. Only one process at a time may add to a conversation.

    Args:
        memory: Memory that provides the store and the model.
        conversation_id: Name of the conversation within the memory's collection.
        top_k: Number of passages of old turns that one question recalls; None means the memory's own `top_k`.
        keep: One of keep_ratio, keep_tokens and max_bytes of an exchange; without any, the memory's setting applies.

    Attributes:
        lock: Lock of this conversation in this process, to be held over several steps that belong together.

    Example:
        ```python
        old = Conversation(memory, "alice")
        old.add([Turn("user", "My dog is called Biscuit."), Turn("assistant", "A fine name.")])
        question = Turn("user", "What is my dog called?")
        reply = memory.reader.reply([question], old.recall(question.text)).answer
        ```
    """

    def __init__(
        self, memory: KVMemory, conversation_id: str, *, top_k: int | None = None, **keep: float | None
    ) -> None:
        check_name(conversation_id, where="conversation_id")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {top_k}", where="top_k")
        self.conversation_id = conversation_id
        self.top_k = memory.settings.top_k if top_k is None else top_k
        # Escaped, so that no conversation of collection "a:b" has the name of one of collection "a".
        tenant = memory.collection.replace("%", "%25").replace(":", "%3A")
        self._memory = memory.in_collection(f"conversation:{tenant}:{conversation_id}", **keep)
        self.keep = self._memory.settings.keep
        locks = _locks.setdefault(memory, weakref.WeakValueDictionary())
        self.lock = locks.setdefault(conversation_id, threading.RLock())

    def add(self, turns: Sequence[Turn]) -> None:
        """Compress turns, in the order they were spoken.

        They are durable when this returns. Blank turns are skipped.

        Raises:
            ConfigError: A turn has an unknown role.
            DocumentError: A turn is not text.
            StoreError: The turns cannot be written; in that case none of them is.
        """
        spoken = [turn for turn in turns if turn.text.strip()]
        for turn in spoken:
            check_choice(turn.role, Role, where="role")
            Document(id="turn", text=turn.text)  # raises if it is not text, before a tokenizer sees it
        if not spoken:
            return
        with self.lock:
            number = max((int(summary.id) for summary in self._memory.documents()), default=0) + 1
            self._memory.add_passages(
                f"{number:08d}",
                self._passages(spoken),
                metadata={"turns": [list(turn) for turn in spoken]},
                keep_text=True,  # conversations are displayed again
            )

    def follow(self, turns: Sequence[Turn]) -> None:
        """Hold exactly these turns, of a chat that is stored elsewhere; those that are held already cost nothing.

        From the first difference on, e.g. because the chat was edited or taken up at an earlier point, turns that were
        held are removed. Errors as in `add`.
        """
        spoken = [turn for turn in turns if turn.text.strip()]
        n_held, differs = 0, False
        with self.lock:
            for summary in self._memory.documents():
                held = [Turn(*turn) for turn in summary.metadata["turns"]]
                differs = differs or spoken[n_held : n_held + len(held)] != held
                if differs:
                    self._memory.remove(summary.id)
                else:
                    n_held += len(held)
            self.add(spoken[n_held:])

    def recall(self, question: str) -> list[Reference]:
        """References to earlier passages that match a question, in the order they were spoken; empty if none match."""
        hits = self._memory.retrieve(question, top_k=self.top_k)
        spoken = sorted(hits, key=lambda hit: (hit.document_id, hit.ordinal))
        ratio_of, fingerprint = self._memory.store.keep_ratio_of, self._memory.compressor.fingerprint()
        return [
            Reference(key=key, keep_ratio=ratio_of(key, fingerprint, self.keep), collection=self._memory.collection)
            for key in dict.fromkeys(hit.text_sha256 for hit in spoken)  # a repeated passage is loaded once
        ]

    def turns(self) -> list[Turn]:
        """All turns that were added, unchanged."""
        return [Turn(*turn) for summary in self._memory.documents() for turn in summary.metadata["turns"]]

    def clear(self) -> None:
        """Delete all turns and their caches."""
        with self.lock:
            for summary in self._memory.documents():
                self._memory.remove(summary.id)

    def _passages(self, turns: Sequence[Turn]) -> list[str]:
        """One passage for each exchange, a question and its answers; an exchange longer than a passage is split.

        Several exchanges in one passage were rejected: a small model does not find one fact among ten exchanges, even
        uncompressed.
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
