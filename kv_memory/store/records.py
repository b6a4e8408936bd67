"""What goes into the store and what comes out: frozen records without any database behind them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kv_memory.errors import ConfigError, EncodingError
from kv_memory.retrieval.hashed_terms import Terms

__all__ = [
    "CacheInfo",
    "CheckReport",
    "DocumentRecord",
    "DocumentSummary",
    "GcReport",
    "PassageRecord",
    "StoreStats",
    "StoredPassage",
]


@dataclass(frozen=True, kw_only=True)
class PassageRecord:
    """One passage of a document: the unit that is compressed.

    Attributes:
        text: Exactly what is tokenised; None where it is not kept.
        n_tokens: Its length in tokens.
        text_sha256: SHA-256 hex digest of the UTF-8 text: what its distilled caches are filed under. Made from the text
            if there is one.
        terms: What it is found by where its text is not kept; without them, no question finds it.

    Raises:
        EncodingError: The text holds half a surrogate pair, which UTF-8 cannot write.
        ConfigError: There is neither a text nor its hash.
    """

    text: str | None
    n_tokens: int
    text_sha256: str = ""
    terms: Terms | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.text_sha256:
            return
        if self.text is None:
            raise ConfigError("a passage without a text needs the hash of it", where="text_sha256")
        try:
            object.__setattr__(self, "text_sha256", hashlib.sha256(self.text.encode()).hexdigest())
        except UnicodeEncodeError as error:  # whose message has the offset, and nothing of the text but the half pair
            raise EncodingError(
                f"the text cannot be written as UTF-8: {error}",
                where="a passage",
                next_step="Decode the document with its right encoding, then add it again.",
            ) from error


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """A document with its passages.

    Attributes:
        id: Unique in its collection.
        content_sha256: SHA-256 hex digest of the document as it was read; tells changed documents from unchanged.
        source_uri: Where it came from.
        metadata: Anything JSON can hold.
        passage_tokens: The length limit it was cut with, in tokens; None if it was not cut.
        passages: In the order of the text.
        created_at: Set by the store, UTC; ignored in what is put.
        updated_at: Set by the store, UTC; ignored in what is put.
    """

    id: str
    content_sha256: str
    source_uri: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    passage_tokens: int | None = None
    passages: tuple[PassageRecord, ...] = ()
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all passages."""
        return sum(passage.n_tokens for passage in self.passages)


@dataclass(frozen=True, kw_only=True)
class DocumentSummary:
    """A document without its text: what a listing needs. Times are UTC.

    Attributes:
        n_texts: How many of the passages have their text kept. The others are as in `DocumentRecord`.
    """

    id: str
    content_sha256: str
    source_uri: str | None
    metadata: dict[str, Any]
    passage_tokens: int | None
    n_passages: int
    n_tokens: int
    n_texts: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, kw_only=True)
class StoredPassage:
    """A passage as the collection holds it.

    Attributes:
        document_id: Its document.
        ordinal: Its place in the document, from 0.
        text: Exactly what is tokenised; None where it is not kept.
        text_sha256: SHA-256 hex digest of the UTF-8 text.
        n_tokens: Its length in tokens.
        metadata: The document's.
        terms: What it is found by where its text is not kept.
    """

    document_id: str
    ordinal: int
    text: str | None
    text_sha256: str
    n_tokens: int
    metadata: dict[str, Any]
    terms: Terms | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The catalog's row of one distilled cache.

    Attributes:
        text_sha256: Of the text it was made from.
        fingerprint: Digest of the fingerprint it was made under.
        method: The selector's name and settings, or `adapter`.
        keep_ratio: What was asked for, or what a budget came to for this text, in (0, 1].
        n_tokens: Length of the text.
        n_kept: Entries kept in every layer and head.
        dtype: Of keys and values in the blob: `bfloat16`, `int8`, ...
        size_bytes: Of the blob.
        blob_key: The blob's name, which is the SHA-256 hex digest of its bytes.
        fidelity: Last held-out probe KL in nats, lower is better; None if it was not measured.
        refined_steps: Gradient steps of refinement behind it.
        pinned: Never evicted, whatever the budget.
        created_at: UTC.
        last_used_at: UTC; written with a delay, see `Store.get`.
        expires_at: From then on it counts as missing; None for never.
    """

    text_sha256: str
    fingerprint: str
    method: str
    keep_ratio: float
    n_tokens: int
    n_kept: int
    dtype: str
    size_bytes: int
    blob_key: str
    fidelity: float | None
    refined_steps: int
    pinned: bool
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `Store.check` found.

    Attributes:
        n_blobs: Blobs that are there and sound.
        size_bytes: Their size.
        damaged: Blob keys whose bytes are wrong; quarantined, their rows deleted.
        misfiled: `text_sha256` of caches whose row named the blob of something else; the rows are deleted.
        missing: Blob keys that rows name and that are not there. `Store.gc` deletes the rows.
        orphans: Blob keys that no row names. `Store.gc` deletes them.
        strays: Leftovers of interrupted writes, relative to the blob folder. `Store.gc` deletes them.
        unreferenced: `text_sha256` of this collection's caches whose text is in no passage: what an interrupted or
            running `add` leaves for its next run. `Store.gc` deletes them.
    """

    n_blobs: int
    size_bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    orphans: tuple[str, ...]
    strays: tuple[str, ...]
    unreferenced: tuple[str, ...]
    misfiled: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether catalog and blobs agree. Unreferenced caches are not counted: they are sound, and may be wanted."""
        return not (self.damaged or self.misfiled or self.missing or self.orphans or self.strays)


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What `Store.gc` removed.

    Attributes:
        n_orphan_blobs: Blobs no row named, not counting those of the unreferenced caches.
        n_dangling_rows: Rows whose blob was not there.
        n_unreferenced_caches: Caches of this collection whose text is in no passage.
        n_expired_caches: Caches whose time has run out.
        n_strays: Leftovers of interrupted writes.
        freed_bytes: Size of the files removed.
    """

    n_orphan_blobs: int
    n_dangling_rows: int
    n_unreferenced_caches: int
    n_expired_caches: int
    n_strays: int
    freed_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Counts of one collection, and the size of the whole folder.

    Attributes:
        n_documents: Of the collection.
        n_passages: Of the collection.
        n_tokens: Of all passages of the collection.
        n_caches: Of the collection, under all fingerprints and keep ratios.
        cache_bytes: Size of these caches' blobs; a blob shared with another collection counts in both.
        disk_bytes: Size of every file in the store's folder, all collections together.
        n_quarantined: Files in the folder's quarantine.
    """

    n_documents: int
    n_passages: int
    n_tokens: int
    n_caches: int
    cache_bytes: int
    disk_bytes: int
    n_quarantined: int
