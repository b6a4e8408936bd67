"""What becomes of retrieved text that has no distilled cache."""

from __future__ import annotations

import logging
from typing import Literal

from kv_memory import EmptyDocumentError, KVMemory, Reference, TextNotKeptError
from kv_memory.query import key_of

__all__ = ["OnMissing", "reference_to"]

# `text`: the model reads the text, this once. `compress`: the cache is made and kept. `skip`: the text is left out of
# the context. `raise`: an error.
OnMissing = Literal["text", "compress", "skip", "raise"]
_log = logging.getLogger(__name__)


def reference_to(
    memory: KVMemory, text: str, *, on_missing: OnMissing, document_id: str, mark: str | None = None
) -> Reference | None:
    """A reference to the distilled cache of exactly this text; None if it is to be left out.

    Blank text is left out and logged, unless `on_missing` is `raise`: one empty node must not fail a whole answer. With
    a mark it is that of a passage whose text the store does not keep, and there is its cache or nothing.

    Args:
        memory: Where the cache lies.
        text: As the framework would put it into a prompt.
        on_missing: What to do without a cache.
        document_id: What the text belongs to, for `compress`; removing that document removes the cache.
        mark: Names the cache of a passage without its text, as the store's own retrievers do; its key counts alone.

    Raises:
        EmptyDocumentError: The text is blank, with `raise`.
        TextNotKeptError: The cache that a mark names is not there, and `text` or `compress` asks for the text.
        CacheNotFoundError: There is no cache, with `raise`.
        FingerprintMismatchError: There is one, made by another model, adapter or prompt, with `raise`.
    """
    if not text.strip() and mark is not None:
        return _marked(memory, Reference.parse(mark).key, on_missing=on_missing, document_id=document_id)
    if not text.strip():
        if on_missing == "raise":
            raise EmptyDocumentError(
                "a retrieved node has no text", where=document_id, next_step="Leave such nodes out of the index."
            )
        _log.warning("a retrieved node without text is left out of the context: %s", document_id)
        return None
    reader = memory.reader
    if reader.has(text):
        # A damaged one is found out now, while the text is at hand: the store need not keep it. It is made again.
        lost = on_missing in {"text", "compress"} and not reader.sound(text)
        return Reference(key=key_of(text), text=text if lost else None)
    if on_missing == "text":
        return Reference(key=key_of(text), text=text)
    if on_missing == "compress":
        memory.add_passages(document_id, [text], extend=True)
        return Reference(key=key_of(text))
    if on_missing == "raise":
        reader.check(text)
    return None


def _marked(memory: KVMemory, key: str, *, on_missing: OnMissing, document_id: str) -> Reference | None:
    if memory.reader.has_key(key) or on_missing == "raise":  # reading it raises what is wrong with it
        return Reference(key=key)
    if on_missing == "skip":
        return None
    raise TextNotKeptError(
        "a passage has no distilled cache under the present settings, and its text is not kept",
        where=document_id,
        next_step="Run `kv-memory add --stale` if it is from a file that has not changed; else add the document again.",
    )
