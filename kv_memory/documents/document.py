"""Document: a text with a name, validated on creation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kv_memory.errors import ConfigError, EmptyDocumentError, UnreadableDocumentError

_UNFIT_FOR_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text with a name.

    Attributes:
        id: Id of the document in its collection; adding the same id with another text replaces the document.
        text: Text, kept exactly as given.
        source_uri: Origin of the document, e.g. `file:///data/a.md`.
        metadata: JSON-serialisable values under str keys; a copy is kept.
        notes: Remarks on what the file's parser replaced or lost; they are reported, not stored.

    Raises:
        EmptyDocumentError: `text` is blank.
        UnreadableDocumentError: `text` contains a NUL character, which neither SQL nor tokenizers accept; `text`
            contains an unpaired surrogate and cannot be encoded as UTF-8.
        ConfigError: `id` is blank or contains control characters, or `metadata` is not JSON-serialisable.
    """

    id: str
    text: str
    source_uri: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip() or _UNFIT_FOR_ID.search(self.id):
            raise ConfigError(
                f"a document id must be a non-empty str without control characters, got {self.id!r}", where="id"
            )
        if not isinstance(self.text, str):
            raise ConfigError(f"text must be a str, got {type(self.text).__name__}", where=self.id)
        if not self.text.strip():
            raise EmptyDocumentError("no text, or white space only", where=self.id, next_step="Leave the document out.")
        if "\0" in self.text:
            raise UnreadableDocumentError(
                f"a NUL character at offset {self.text.index(chr(0))}",
                where=self.id,
                next_step="Pass text, not the bytes of a file; remove the NUL if it is there by mistake.",
            )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UnreadableDocumentError(
                f"an unpaired surrogate at character {error.start}",
                where=self.id,
                next_step="Decode the text with errors='replace', not 'surrogateescape' or 'surrogatepass'.",
            ) from error
        object.__setattr__(self, "metadata", _json_copy(self.metadata, where=self.id))

    @cached_property
    def content_sha256(self) -> str:
        """SHA-256 of the text's UTF-8 bytes, in hex; it decides whether a stored document is current."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _json_copy(metadata: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Copy metadata through JSON, so that the stored and the in-memory values never differ."""
    try:
        if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
            raise TypeError("it must be a mapping with str keys")
        # ensure_ascii=False and encode() find lone surrogates, which databases would refuse later.
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        text.encode()
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"metadata cannot be written as JSON: {error}",
            where=where,
            next_step="Use str keys, and str, int, finite float, bool, None, lists and mappings as values.",
        ) from error
    return copy
