"""Input and output records of the store: frozen, without a database behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from kv_memory.errors import ConfigError, UnreadableDocumentError


@dataclass(frozen=True, kw_only=True)
class PassageRecord:
    """One passage of a document: the unit that is compressed.

    Attributes:
        text: Exact text that is tokenised; None if it is not kept.
        text_sha256: SHA-256 hex digest of the UTF-8 text, the key of its distilled caches. Computed from the text
            unless given.
        terms: Hashes of words and stems with their counts, for retrieval if the text is not kept; without them, no
            question finds the passage.
        language: ISO 639 code of the language whose stems it is found by; empty for words only.
        headings: Headings above it in its document, one a line; not stored where the text is not kept, because their
            words are among the terms.
        encoder: Name of the encoder that made the vector; empty without one.
        vector: Vector of the passage, for retrieval: little-endian float16 numbers.

    Raises:
        UnreadableDocumentError: The text has half a surrogate pair, which UTF-8 cannot encode.
        ConfigError: Neither the text nor its hash is given.
    """

    text: str | None
    n_tokens: int
    text_sha256: str = ""
    terms: Mapping[str, int] | None = field(default=None, repr=False, hash=False)
    language: str = ""
    headings: str = ""
    encoder: str = ""
    vector: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.text_sha256:
            return
        if self.text is None:
            raise ConfigError("a passage without a text needs the hash of that text", where="text_sha256")
        try:
            object.__setattr__(self, "text_sha256", hashlib.sha256(self.text.encode()).hexdigest())
        except UnicodeEncodeError as error:  # its message has the offset and, from the text, only the half pair
            raise UnreadableDocumentError(
                f"the text cannot be encoded as UTF-8: {error}",
                where="a passage",
                next_step="Decode the document with the right encoding, then add it again.",
            ) from error


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """A document with its passages.

    Attributes:
        id: Id of the document, unique in its collection.
        content_sha256: SHA-256 hex digest of the document as it was read, by which a change is noticed.
        metadata: JSON-serialisable metadata.
        passage_tokens: Length limit of its passages in tokens; None if it was not split.
        passages: Passages in the order of the text.
        created_at: Time of the first put, UTC; set by the store unless given for a new document.
        updated_at: Time of the last put, UTC; set by the store, and ignored when put.
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
        """Number of tokens in all passages."""
        return sum(passage.n_tokens for passage in self.passages)


@dataclass(frozen=True, kw_only=True)
class DocumentSummary:
    """A document without its text, for listings. Times are UTC; other fields are as in `DocumentRecord`.

    Attributes:
        n_texts: Number of passages with their text kept.
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
    """A passage as it is stored in a collection; other fields are as in `PassageRecord`.

    Attributes:
        document_id: Id of its document.
        ordinal: Position in the document, from 0.
        metadata: Metadata of the document.
    """

    document_id: str
    ordinal: int
    text: str | None
    text_sha256: str
    n_tokens: int
    metadata: dict[str, Any]
    terms: Mapping[str, int] | None = field(default=None, repr=False, hash=False)
    language: str = ""
    headings: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredVector:
    """The vector of a passage; fields are as in `PassageRecord` and `StoredPassage`."""

    document_id: str
    ordinal: int
    text_sha256: str
    encoder: str
    vector: bytes | None


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The catalog's row of one distilled cache.

    Attributes:
        text_sha256: SHA-256 hex digest of the text it was made from.
        fingerprint: Digest of the fingerprint it was made under.
        method: Name and settings of the selector, or `adapter`.
        keep_ratio: Share of entries kept, in (0, 1]: as requested, or as a budget gave it for this text.
        n_kept: Number of entries kept per layer and head; the rounded average if heads keep different numbers.
        dtype: Number format of keys and values in the blob: `bfloat16`, `int8`, ...
        blob_key: Name of the blob, which is the SHA-256 hex digest of its bytes.
        fidelity: Last held-out probe KL in nats, lower is better; None if it was not measured.
        refined_steps: Number of gradient steps of refinement.
        pinned: Whether it is never evicted, whatever the size limit.
        created_at: Time of the put, UTC.
        last_used_at: Time of the last use, UTC; written with a delay, see `Store.get`.
        expires_at: Time from which it counts as missing, UTC; None for never.
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
    pinned: bool = False
    created_at: datetime
    last_used_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Findings of `Store.check`.

    Attributes:
        n_blobs: Number of sound blobs that rows name.
        damaged: Keys of blobs with wrong bytes; they are quarantined, and their rows deleted.
        misfiled: `text_sha256` of caches with a row that named the blob of something else; these rows are deleted.
        missing: Keys of blobs that rows name and that do not exist. `Store.gc` deletes the rows.
        orphans: Keys of blobs that no row names; see `strays`.
        strays: Leftovers of interrupted writes: paths in the blob folder or object store, or `row N` of diskcache's
            table. `Store.gc` deletes strays and orphans; younger ones than ten minutes may be of a put in progress.
        unreferenced: `text_sha256` of this collection's caches with a text that is in no passage: an interrupted or
            running `add` leaves them for its next run. `Store.gc` deletes them.
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
        """Whether catalog and blobs agree; unreferenced caches do not count, as they are sound and may be needed."""
        return not (self.damaged or self.misfiled or self.missing or self.orphans or self.strays)


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """Removals by `Store.gc`.

    Attributes:
        n_orphan_blobs: Number of blobs that no row named, without those of the unreferenced caches.
        n_dangling_rows: Number of rows with a missing blob.
        n_unreferenced_caches: Number of this collection's caches with a text that is in no passage.
        n_strays: Number of leftovers of interrupted writes.
    """

    n_orphan_blobs: int
    n_dangling_rows: int
    n_unreferenced_caches: int
    n_expired_caches: int
    n_strays: int
    freed_bytes: int


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """Removals by `Store.purge`.

    Attributes:
        documents: Ids of the purged documents.
        n_blobs: Number of removed blobs of these documents' caches.
        n_blobs_shared: Number of their blobs that stay, because other collections have caches of equal texts.
        n_orphan_blobs: Number of other blobs that no row named.
        n_quarantined: Number of files in quarantine, which cannot be attributed to documents.
        n_strays: Number of leftovers of interrupted writes.
    """

    documents: tuple[str, ...]
    n_blobs: int
    n_blobs_shared: int
    n_orphan_blobs: int
    n_quarantined: int
    n_strays: int
    freed_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Counts of one collection, and the size of the whole folder.

    Attributes:
        n_tokens: Number of tokens in all passages of the collection.
        n_caches: Number of caches, under all fingerprints and keep ratios.
        cache_bytes: Size of these caches' blobs in bytes; a blob shared with another collection counts in both.
        disk_bytes: Size of all files in the store's folder in bytes, over all collections.
        n_quarantined: Number of files in the folder's quarantine.
    """

    n_documents: int
    n_passages: int
    n_tokens: int
    n_caches: int
    cache_bytes: int
    disk_bytes: int
    n_quarantined: int


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """Progress of a copy, an export or an import.

    Attributes:
        step: Present step. An export copies, then packs; an import unpacks, verifies, then copies.
        size_bytes: Number of bytes done in this step.
        size_bytes_total: Estimated number of bytes of this step; 0 if it is unknown.
    """

    step: Literal["copy", "pack", "unpack", "verify"]
    n_documents: int = 0
    size_bytes: int = 0
    size_bytes_total: int = 0


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """Result of `copy_collection` and `import_archive`.

    Attributes:
        collection: Name of the collection that was copied into.
        n_documents: Number of documents in the source.
        n_replaced: Number of documents that replaced others with their id.
        n_unchanged: Number of documents that existed already, with the same text.
        conflicts: Ids of documents that exist with other text, and were left unchanged.
        n_caches: Number of new distilled caches.
        n_caches_present: Number of distilled caches that existed already.
        n_caches_left_out: Number of distilled caches that have expired, or belong to documents that were left out.
        n_evicted: Number of caches evicted to stay within size limits.
        size_bytes: Size of the stored blobs in bytes.
        damaged: Keys of blobs that were found damaged or missing in the source, and were not copied.
    """

    collection: str
    n_documents: int
    n_added: int
    n_replaced: int
    n_unchanged: int
    conflicts: tuple[str, ...]
    n_caches: int
    n_caches_present: int
    n_caches_left_out: int
    n_evicted: int
    size_bytes: int
    damaged: tuple[str, ...]
