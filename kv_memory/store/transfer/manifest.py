"""The rows of an archive as JSON lines: a group of documents with their passages, caches and blob keys."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import JSON, inspect

from kv_memory.store.sql.schema import Base, CacheRow, DocumentRow, PassageRow, PrefixRow, UTCDateTime, utc_now

__all__ = ["DocumentRows", "Group", "ManifestError"]

_ROW = TypeVar("_ROW", bound=Base)
_OWN = {"id", "collection_id", "document_pk"}  # ids of one store, which are meaningless in another
_SHA256 = re.compile("[0-9a-f]{64}")
_WORD_HASH = re.compile("[0-9a-f]{16}")


class ManifestError(ValueError):
    """A line is not what an export writes; `ArchiveReader` adds its place in the archive."""


@dataclass(frozen=True, kw_only=True)
class DocumentRows:
    """A document and its passages, in the order of the text."""

    document: DocumentRow
    passages: list[PassageRow]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some documents with all that belongs to them, read in one transaction.

    Attributes:
        documents: Documents with their passages.
        caches: Distilled caches of these passages.
        fingerprints: Canonical JSON of these caches' fingerprints, by digest.
        prefixes: Shared prefixes; only the first group has them.
        blobs: Keys and sizes in bytes of the blobs that follow: those of these rows that no earlier group has.
    """

    documents: list[DocumentRows] = field(default_factory=list)
    caches: list[CacheRow] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    prefixes: list[PrefixRow] = field(default_factory=list)
    blobs: list[tuple[str, int]] = field(default_factory=list)

    @property
    def with_blobs(self) -> list[CacheRow | PrefixRow]:
        """The rows that name blobs."""
        return [*self.prefixes, *self.caches]

    def to_bytes(self) -> bytes:
        """One JSON object per line, each with its `kind`."""
        lines: list[dict[str, Any]] = []
        lines += [{"kind": "fingerprint", "digest": key, "json": text} for key, text in self.fingerprints.items()]
        lines += [{"kind": "cache", **_pack(row)} for row in self.caches]
        lines += [{"kind": "prefix", **_pack(row)} for row in self.prefixes]
        lines += [
            {"kind": "document", **_pack(rows.document), "passages": [_pack(passage) for passage in rows.passages]}
            for rows in self.documents
        ]
        lines += [{"kind": "blob", "key": key, "size_bytes": size_bytes} for key, size_bytes in self.blobs]
        # Metadata may have half a surrogate pair, which json.loads reads back unchanged.
        return b"".join(json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass") + b"\n" for line in lines)

    @classmethod
    def parse(cls, data: bytes) -> Group:
        """Parse the output of `to_bytes`; rows come without the ids of a store.

        Raises:
            ManifestError: A line is not what an export writes, or lines contradict each other.
        """
        group = cls()
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                values = json.loads(line)
                group._take(values.pop("kind"), values)
            except ManifestError as error:
                raise ManifestError(f"line {number}: {error}") from error
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ManifestError(f"line {number} is not an entry: {type(error).__name__}") from error
        sizes = dict(group.blobs)
        for row in group.with_blobs:
            if sizes.get(row.blob_key, row.size_bytes) != row.size_bytes:
                raise ManifestError(f"blob {row.blob_key} has two sizes")
        for cache in group.caches:
            if cache.fingerprint not in group.fingerprints:
                raise ManifestError(f"a cache has no fingerprint {cache.fingerprint}")
        if len({rows.document.document_id for rows in group.documents}) != len(group.documents):
            raise ManifestError("a document occurs twice")
        if not sizes.keys() <= {row.blob_key for row in group.with_blobs}:
            raise ManifestError("a blob belongs to no row")
        return group

    def _take(self, kind: str, values: dict[str, Any]) -> None:
        match kind:
            case "fingerprint":
                if hashlib.sha256(values["json"].encode()).hexdigest() != values["digest"]:
                    raise ManifestError("a fingerprint does not match its digest")
                self.fingerprints[values["digest"]] = values["json"]
            case "cache":
                row = _unpack(CacheRow, values)
                _check_hashes(row.text_sha256, row.blob_key)
                if not 0 < row.keep_ratio <= 1 or row.size_bytes < 0:
                    raise ManifestError("a cache's keep_ratio or size_bytes is out of range")
                self.caches.append(row)
            case "prefix":
                prefix = _unpack(PrefixRow, values)
                _check_hashes(prefix.blob_key)
                self.prefixes.append(prefix)
            case "document":
                passages = [_unpack(PassageRow, passage) for passage in values.pop("passages")]
                for ordinal, passage in enumerate(passages):
                    _check_hashes(passage.text_sha256)
                    text: str | None = passage.text
                    if text is not None and hashlib.sha256(text.encode()).hexdigest() != passage.text_sha256:
                        raise ManifestError("a passage's text does not match its hash")
                    if passage.terms is not None:
                        _check_terms(passage.terms)
                    if passage.ordinal != ordinal:
                        raise ManifestError(f"found passage {passage.ordinal} instead of passage {ordinal}")
                self.documents.append(DocumentRows(document=_unpack(DocumentRow, values), passages=passages))
            case "blob":
                _check_hashes(values["key"])
                if type(values["size_bytes"]) is not int or values["size_bytes"] < 0:
                    raise ManifestError("a blob's size is out of range")
                self.blobs.append((values["key"], values["size_bytes"]))
            case _:
                raise ManifestError(f"an entry of unknown kind {str(kind)[:40]!r}")


def _check_hashes(*digests: object) -> None:
    for digest in digests:
        if not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
            raise ManifestError(f"{str(digest)[:80]!r} is not a SHA-256")


def _check_terms(terms: object) -> None:
    if not isinstance(terms, dict) or not all(
        _WORD_HASH.fullmatch(word) and type(n) is int and n > 0 for word, n in terms.items()
    ):
        raise ManifestError("a passage's terms must map word hashes to positive integers")


def _pack(row: Base) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _columns(type(row))}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _unpack(kind: type[_ROW], values: dict[str, Any]) -> _ROW:
    """A row with these values; columns that an older version did not write get their defaults."""
    row = kind()
    for name, column in _columns(kind).items():
        value = values.get(name)
        if value is None:
            if name in values and not column.nullable:
                raise ManifestError(f"{name} is empty")
            if name not in values and not (column.nullable or column.default):
                raise ManifestError(f"{name} is missing")
            # A None is not set: a JSON column would then hold a JSON null instead of SQL NULL. Missing dates are set
            # here, because the row may be compared before it is stored.
            if name == "created_at":
                setattr(row, name, utc_now())
            continue
        expected = _type_of(column)
        if expected is datetime:
            value = _moment(value)
        elif expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise ManifestError(f"{name} is {str(value)[:40]!r}, not of type {expected.__name__}")
        setattr(row, name, value)
    return row


def _type_of(column: Any) -> type:
    # These two column types do not report it themselves.
    if isinstance(column.type, UTCDateTime):
        return datetime
    kind: type = dict if isinstance(column.type, JSON) else column.type.python_type
    return kind


def _moment(value: object) -> datetime:
    if not isinstance(value, str):
        raise ManifestError(f"{str(value)[:40]!r} is not a timestamp")
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _columns(kind: type[Base]) -> dict[str, Any]:
    """The columns of a table by attribute name, without those that are only meaningful in its store."""
    return {attr.key: attr.columns[0] for attr in inspect(kind).column_attrs if attr.key not in _OWN}
