"""Prepare documents for the store: their records, and the texts to compress, which need not be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kv_memory.documents import Document, read_file, split_passages
from kv_memory.documents.headings import headings_above
from kv_memory.documents.loaders import path_of
from kv_memory.documents.splitter import CountTokens
from kv_memory.errors import ConfigError, DocumentError, EmptyDocumentError, TextNotKeptError
from kv_memory.retrieval.encoder import Encoder
from kv_memory.retrieval.hashed_terms import terms_of
from kv_memory.retrieval.language import language_of
from kv_memory.retrieval.vectors import to_bytes
from kv_memory.store import DocumentRecord, PassageRecord


class Prepared(NamedTuple):
    """A document on its way into the store.

    Attributes:
        record: Record to store.
        texts: Texts of its passages by their SHA-256, as far as they are known.
        cached: Hashes of texts that are known to have their cache.
    """

    record: DocumentRecord
    texts: Mapping[str, str]
    cached: AbstractSet[str] = frozenset()


class _Form(NamedTuple):
    """How passages are stored: with or without their texts, and by the stems of which language they are found."""

    keep_text: bool
    language: str

    def passage(self, text: str, n_tokens: int, headings: str = "") -> PassageRecord:
        whole = PassageRecord(text=text, n_tokens=n_tokens, language=self.language, headings=headings)
        if self.keep_text:
            return whole
        # The store leaves the headings out; until then they serve the encoder.
        return replace(whole, text=None, terms=terms_of(f"{headings}\n{text}", self.language))


def prepare(
    document: Document, limit: int | None, count_tokens: CountTokens, *, keep_text: bool, language: str
) -> Prepared:
    """Split a document into passages of at most `limit` tokens; None leaves it whole.

    Without `keep_text`, words of the passages and of the headings above them are kept as hashes, for retrieval.
    """
    texts = split_passages(document.text, max_tokens=limit, count_tokens=count_tokens)
    form = _Form(keep_text, language_of(document.text, language))
    passages = tuple(map(form.passage, texts, count_tokens(texts), _headings(document, texts)))
    record = DocumentRecord(
        id=document.id,
        content_sha256=document.content_sha256,
        source_uri=document.source_uri,
        metadata=dict(document.metadata),
        passage_tokens=limit,
        passages=passages,
    )
    return Prepared(record, {passage.text_sha256: text for passage, text in zip(passages, texts, strict=True)})


def prepare_again(
    document: Document, old: DocumentRecord, count_tokens: CountTokens, *, keep_text: bool, language: str
) -> Prepared:
    """Prepare a document that is stored with the same text and limit; the texts of its passages stay unchanged.

    It is split again if passages without kept text cannot be restored, because the tokenizer has changed.
    """
    texts = texts_in(old)
    if not _covers(texts, old):
        texts = _by_key(split_passages(document.text, max_tokens=old.passage_tokens, count_tokens=count_tokens))
        if not _covers(texts, old):
            return prepare(document, old.passage_tokens, count_tokens, keep_text=keep_text, language=language)
    form, ordered = _Form(keep_text, language_of(document.text, language)), [texts[p.text_sha256] for p in old.passages]
    passages = tuple(map(form.passage, ordered, (p.n_tokens for p in old.passages), _headings(document, ordered)))
    record = replace(old, source_uri=document.source_uri, metadata=dict(document.metadata), passages=passages)
    return Prepared(record, texts)


def prepare_passages(
    document: str,
    texts: Sequence[str],
    count_tokens: CountTokens,
    *,
    old: DocumentRecord | None,
    metadata: Mapping[str, Any] | None,
    extend: bool,
    drop: Collection[str],
    keep_text: bool,
    language: str,
) -> Prepared:
    """Prepare a document that is already split, to replace or extend `old`; see `KVMemory.add_passages`."""
    if isinstance(texts, str):
        raise ConfigError("passages must be a list of texts, not one text", where="texts", next_step="Pass [text].")
    checked = [Document(id=document, text=text, metadata=metadata or {}) for text in texts]
    given = _by_key([item.text for item in checked])
    before = [p for p in old.passages if p.text_sha256 not in drop] if old is not None and extend else []
    if not checked and not (before and (drop or metadata is not None)):
        raise EmptyDocumentError("no passages", where=document, next_step="Leave the document out, or remove it.")
    known = {passage.text_sha256 for passage in before}
    new = [text for key, text in given.items() if key not in known]

    def passage(text: str, n_tokens: int) -> PassageRecord:
        # The language of this text alone: a passage that is given again with others must not change.
        return _Form(keep_text, language_of(text, language)).passage(text, n_tokens)

    passages = (
        *(passage(given[p.text_sha256], p.n_tokens) if p.text_sha256 in given else p for p in before),
        *map(passage, new, count_tokens(new)),
    )
    if old is not None and extend and metadata is None:
        details = old.metadata
    else:
        details = dict(checked[0].metadata if checked else metadata or {})
    record = DocumentRecord(
        id=document,
        content_sha256=hashlib.sha256("\0".join(p.text_sha256 for p in passages).encode()).hexdigest(),
        metadata=details,
        passages=passages,
    )
    return Prepared(record, {**{p.text_sha256: p.text for p in before if p.text is not None}, **given})


def prepare_from_file(old: DocumentRecord, count_tokens: CountTokens, *, encoding: str, language: str) -> Prepared:
    """Prepare a stored document with missing texts by reading its source file again.

    Raises:
        TextNotKeptError: The document did not come from a file, or the file cannot be read or has a new text.
        ConfigError: The encoding is unknown.
    """
    url = urlsplit(old.source_uri or "")
    if url.scheme != "file":
        raise _lost(old, "it did not come from a file")
    try:
        document = read_file(path_of(old.source_uri or ""), encoding=encoding)
    except DocumentError as error:
        raise _lost(old, f"its file cannot be read: {error.what}") from error
    if document.content_sha256 != old.content_sha256:
        raise _lost(old, "its file now has a different text")
    texts = _by_key(split_passages(document.text, max_tokens=old.passage_tokens, count_tokens=count_tokens))
    if _covers(texts, old):
        headings = _headings(document, [texts[passage.text_sha256] for passage in old.passages])
        passages = map(lambda passage, above: replace(passage, headings=above), old.passages, headings)
        return Prepared(replace(old, passages=tuple(passages)), texts)
    # It was split with another tokenizer, so it is split again.
    again = replace(document, id=old.id, source_uri=old.source_uri, metadata=old.metadata)
    return prepare(again, old.passage_tokens, count_tokens, keep_text=False, language=language)


def lacks_vectors(record: DocumentRecord, encoder: Encoder | None) -> bool:
    """Whether a passage has no vector of this encoder; False without an encoder."""
    return encoder is not None and any(passage.encoder != encoder.name for passage in record.passages)


def with_vectors(record: DocumentRecord, texts: Mapping[str, str], encoder: Encoder | None) -> DocumentRecord:
    """The record with vectors of this encoder, as far as the texts are known; unchanged without an encoder.

    Raises:
        EncoderError: The encoder fails.
    """
    if encoder is None:
        return record
    title = str(record.metadata.get("title") or "")
    # A passage rarely repeats what it is about: title and headings say it.
    todo = {
        index: "\n".join(filter(None, (title, passage.headings, texts[passage.text_sha256])))
        for index, passage in enumerate(record.passages)
        if passage.encoder != encoder.name and passage.text_sha256 in texts
    }
    passages = list(record.passages)
    for index, vector in zip(todo, encoder.embed(list(todo.values())), strict=True):
        passages[index] = replace(passages[index], encoder=encoder.name, vector=to_bytes(vector))
    return replace(record, passages=tuple(passages))


def texts_in(record: DocumentRecord) -> dict[str, str]:
    """The texts that a stored document keeps, by their SHA-256."""
    return {passage.text_sha256: passage.text for passage in record.passages if passage.text is not None}


def _covers(texts: Mapping[str, str], record: DocumentRecord) -> bool:
    return all(passage.text_sha256 in texts for passage in record.passages)


def _headings(document: Document, texts: Sequence[str]) -> list[str]:
    return headings_above(document.text, texts, title=str(document.metadata.get("title") or ""))


def _by_key(texts: Sequence[str]) -> dict[str, str]:
    return {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}


def _lost(record: DocumentRecord, why: str) -> TextNotKeptError:
    return TextNotKeptError(
        f"a document's text is not kept, and {why}",
        where=record.id,
        next_step="Add the document again; until then, its stored data stay unchanged.",
    )
