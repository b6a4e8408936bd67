"""How frameworks carry references to distilled caches, and what happens to retrieved text that has no cache.

Only strings are carried, because tracers, memories, caches and stores serialise messages, documents and options.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import regex

from kv_memory import EmptyDocumentError, KVMemory, Reference, TextNotKeptError
from kv_memory.query import key_of

from .llms import readable

KV_ID = "kv_id"  # in the metadata of a document or node: str(Reference)
KV_IDS = "kv_ids"  # in the options of a call or a message: [str(Reference)], in the order of composition
KV_TEXTS = "kv_texts"  # beside them: {key: text}, for references that may have no cache
DOCUMENTS_ABOVE = "(see the documents above)"  # replaces a template's variable for the documents

# `text`: prefill the text for this answer only. `compress`: make the cache and keep it. `skip`: leave the text out of
# the context. `raise`: raise an error.
OnMissing = Literal["text", "compress", "skip", "raise"]
_log = logging.getLogger(__name__)
_VISIBLE = regex.compile(r"[^\s\p{Default_Ignorable_Code_Point}]")


def is_blank(text: str) -> bool:
    """Whether a text has nothing but white space and invisible characters, which no question finds."""
    return _VISIBLE.search(text) is None


def mark_of(key: str) -> str:
    """The value of `KV_ID` for the cache of the text with this key.

    The collection is omitted, so that an LLM over one tenant's collection never loads from another tenant's.
    """
    return str(Reference(key=key))


def reference_options(references: Iterable[Reference]) -> dict[str, Any]:
    """References, each once, as options of a call; an empty list of them still means "from caches"."""
    known = {str(reference): reference for reference in references}
    options: dict[str, Any] = {KV_IDS: list(known)}
    texts = {reference.key: readable(reference.text) for reference in known.values() if reference.text is not None}
    return {**options, KV_TEXTS: texts} if texts else options


def references_in(*options: Mapping[str, Any]) -> list[Reference] | None:
    """The references in the options of a call and of its messages, each once; None if none of them sets `kv_ids`.

    Raises:
        ConfigError: A value is not a reference.
    """
    given = [source for source in options if source.get(KV_IDS) is not None]
    found: dict[str, Reference] = {}
    for source in given:
        values, texts = source[KV_IDS], source.get(KV_TEXTS) or {}
        for value in [values] if isinstance(values, str | Reference) else values:
            reference = Reference.parse(value)
            found.setdefault(str(reference), replace(reference, text=texts.get(reference.key, reference.text)))
    return list(found.values()) if given else None


def reference_to(
    memory: KVMemory, text: str, *, on_missing: OnMissing, document_id: str, mark: str | None = None
) -> Reference | None:
    """A reference to the distilled cache of exactly this text; None if the text is to be left out.

    The text is as the framework would put it into a prompt. For `compress` it belongs to the document `document_id`:
    removing the document removes the cache. Blank text is left out and logged, unless `on_missing` is `raise`: one
    empty node must not fail a whole answer. Blank text with a mark, a reference as the store's own retrievers set it,
    is of a passage whose text is not stored: only the cache of the mark's key can be used.

    Raises:
        EmptyDocumentError: The text is blank, with `raise`.
        TextNotKeptError: The cache that the mark names does not exist, and `text` or `compress` needs the text.
        CacheNotFoundError: There is no cache, with `raise`; for a mark, only loading the reference raises it.
        FingerprintMismatchError: The cache was made by another model, adapter or prompt, with `raise`.
    """
    reader = memory.reader
    if is_blank(text):
        if mark is not None:
            return _marked(memory, Reference.parse(mark).key, on_missing=on_missing, document_id=document_id)
        if on_missing == "raise":
            raise EmptyDocumentError(
                "a retrieved node has no text", where=document_id, next_step="Leave such nodes out of the index."
            )
        _log.warning("a retrieved node without text is left out of the context: %s", document_id)
        return None
    if reader.has(text):
        # Damage is detected now, while the text is available (the store may not keep it). The reader then makes the
        # cache again from the text in the reference.
        lost = on_missing in {"text", "compress"} and not reader.sound(text)
        return Reference(key=key_of(text), text=text if lost else None)
    match on_missing:
        case "text":
            return Reference(key=key_of(text), text=text)
        case "compress":
            memory.add_passages(document_id, [text], extend=True)
            return Reference(key=key_of(text))
        case "raise":
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
