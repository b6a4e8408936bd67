"""Handles retrieved text that has no distilled cache."""

from __future__ import annotations

import logging
from typing import Literal

from kv_memory import EmptyDocumentError, KVMemory, Reference, TextNotKeptError
from kv_memory.query import key_of

__all__ = ["OnMissing", "reference_to"]

# `text`: prefill the text for this answer only. `compress`: make the cache and keep it. `skip`: leave the text out of
# the context. `raise`: raise an error.
OnMissing = Literal["text", "compress", "skip", "raise"]
_log = logging.getLogger(__name__)


def reference_to(
    memory: KVMemory, text: str, *, on_missing: OnMissing, document_id: str, mark: str | None = None
) -> Reference | None:
    """A reference to the distilled cache of exactly this text; None if the text is to be left out.

    Blank text is left out and logged, unless `on_missing` is `raise`: one empty node must not fail a whole answer.
    Blank text with a mark belongs to a passage without a stored text; only its cache can be used.

    Args:
        memory: The memory that holds the cache.
        text: The text as the framework would put it into a prompt.
        on_missing: Action for a text without a cache.
        document_id: Document that the text belongs to, for `compress`; removing the document removes the cache.
        mark: Reference to the cache of a passage without text, as the store's own retrievers set it; only its key is
            used.

    Raises:
        EmptyDocumentError: The text is blank, with `raise`.
        TextNotKeptError: The cache that the mark names does not exist, and `text` or `compress` needs the text.
        CacheNotFoundError: There is no cache, with `raise`; for a mark, only loading the reference raises it.
        FingerprintMismatchError: The cache was made by another model, adapter or prompt, with `raise`.
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
        # Damage is detected now, while the text is available (the store may not keep it). The reader then makes the
        # cache again from the text in the reference.
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
    if memory.reader.has_key(key) or on_missing == "raise":  # loading the reference later raises the exact error
        return Reference(key=key)
    if on_missing == "skip":
        return None
    raise TextNotKeptError(
        "a passage has no distilled cache under the current settings, and its text is not kept",
        where=document_id,
        next_step="Run `kv-memory add --stale` if it is from an unchanged file; otherwise add the document again.",
    )
