"""Prepare documents for the store: their records, and the texts to compress, which need not be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from kv_memory.documents import Document, read_file, split_passages
from kv_memory.documents.splitter import CountTokens
from kv_memory.errors import ConfigError, DocumentError, EmptyDocumentError, TextNotKeptError
from kv_memory.retrieval.tokenize import terms_of
from kv_memory.store import DocumentRecord, PassageRecord, Store

__all__ = ["Prepared", "RecordBuilder"]


class Prepared(NamedTuple):
    """A document on its way into the store.

    Attributes:
        record: Record to store.
        texts: Texts of its passages by their SHA-256, as far as they are known.
    """

    record: DocumentRecord
    texts: Mapping[str, str]


class RecordBuilder:
    """Builds the records of documents, with or without their texts.

    Args:
        store: Store that receives the documents.
        count_tokens: Function that counts the tokens of texts.
        keep_text: True to keep the passages' texts; otherwise their words are kept as hashes, for retrieval.
    """

    def __init__(self, store: Store, count_tokens: CountTokens, *, keep_text: bool) -> None:
        self._store = store
        self._count_tokens = count_tokens
        self._keep_text = keep_text

    def stored(self, document_id: str) -> DocumentRecord | None:
        """The stored document with this id; None if it is not in the store."""
        return self._store.document(document_id) if self._store.has_document(document_id) else None

    def is_kept_so(self, passages: Sequence[PassageRecord]) -> bool:
        """Whether the texts of these passages are kept or left out as `keep_text` requires."""
        return all((passage.text is not None) == self._keep_text for passage in passages)

    def cut(self, document: Document, limit: int | None) -> Prepared:
        """Split a document into passages of at most `limit` tokens; None leaves it whole."""
        return self._cut(document, limit, keep_text=self._keep_text)

    def _cut(self, document: Document, limit: int | None, *, keep_text: bool) -> Prepared:
        texts = self._split(document.text, limit)
        lengths = self._count_tokens(texts)
        record = DocumentRecord(
            id=document.id,
            content_sha256=document.content_sha256,
            source_uri=document.source_uri,
            metadata=dict(document.metadata),
            passage_tokens=limit,
            passages=tuple(self._passage(t, n, keep_text) for t, n in zip(texts, lengths, strict=True)),
        )
        return Prepared(record, _by_key(texts))

    def again(self, document: Document, old: DocumentRecord) -> Prepared:
        """Prepare a document that is stored with the same text and limit; its passages stay unchanged.

        It is split again if passages without kept text cannot be restored, because the tokenizer has changed.
        """
        texts, keys = _texts_in(old.passages), {passage.text_sha256 for passage in old.passages}
        if texts.keys() != keys:
            texts = _by_key(self._split(document.text, old.passage_tokens))
            if not texts.keys() >= keys:
                return self.cut(document, old.passage_tokens)
        passages = tuple(self._passage(texts[p.text_sha256], p.n_tokens, self._keep_text) for p in old.passages)
        record = replace(old, source_uri=document.source_uri, metadata=dict(document.metadata), passages=passages)
        return Prepared(record, texts)

    def passages(
        self,
        document: str,
        texts: Sequence[str],
        *,
        old: DocumentRecord | None,
        metadata: Mapping[str, Any] | None,
        extend: bool,
        drop: Collection[str],
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
        keep = self._keep_text
        passages = (
            *(self._passage(given[p.text_sha256], p.n_tokens, keep) if p.text_sha256 in given else p for p in before),
            *(self._passage(text, n, keep) for text, n in zip(new, self._count_tokens(new), strict=True)),
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
        return Prepared(record, {**_texts_in(before), **given})

    def read_again(self, old: DocumentRecord, *, encoding: str) -> Prepared:
        """Prepare a stored document with missing texts by reading its source file again.

        Raises:
            TextNotKeptError: The document did not come from a file, or the file cannot be read or has a new text.
            ConfigError: The encoding is unknown.
        """
        url = urlsplit(old.source_uri or "")
        if url.scheme != "file":
            raise _lost(old, "it did not come from a file")
        try:
            document = read_file(Path(url2pathname(url.path)), encoding=encoding)
        except DocumentError as error:
            raise _lost(old, f"its file cannot be read: {error.what}") from error
        if document.content_sha256 != old.content_sha256:
            raise _lost(old, "its file now has a different text")
        texts = _by_key(self._split(document.text, old.passage_tokens))
        if texts.keys() >= {passage.text_sha256 for passage in old.passages}:
            return Prepared(old, texts)
        # It was split with another tokenizer, so it is split again.
        again = replace(document, id=old.id, source_uri=old.source_uri, metadata=old.metadata)
        return self._cut(again, old.passage_tokens, keep_text=False)

    def as_it_is(self, old: DocumentRecord) -> Prepared:
        """Prepare a stored document with the texts that are kept."""
        return Prepared(old, _texts_in(old.passages))

    def _split(self, text: str, limit: int | None) -> list[str]:
        return split_passages(text, max_tokens=limit, count_tokens=self._count_tokens)

    def _passage(self, text: str, n_tokens: int, keep_text: bool) -> PassageRecord:
        whole = PassageRecord(text=text, n_tokens=n_tokens)
        if keep_text:
            return whole
        return replace(whole, text=None, terms=terms_of(text))


def _by_key(texts: Sequence[str]) -> dict[str, str]:
    return {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}


def _texts_in(passages: Sequence[PassageRecord]) -> dict[str, str]:
    return {passage.text_sha256: passage.text for passage in passages if passage.text is not None}


def _lost(record: DocumentRecord, why: str) -> TextNotKeptError:
    return TextNotKeptError(
        f"a document's text is not kept, and {why}",
        where=record.id,
        next_step="Add the document again; until then, its stored data stay unchanged.",
    )
