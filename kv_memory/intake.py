"""Intake: documents into passages, passages into distilled caches, both into the store.

Caches are put one by one and their document last, in one transaction. Whatever breaks a long `add` off, what is done
stays done: the next call finds the caches and goes on behind them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_memory.compress import Compressor
from kv_memory.config import StorageName
from kv_memory.documents import Document, split_passages
from kv_memory.errors import ConfigError, EmptyDocumentError, KVMemoryError
from kv_memory.store import DocumentRecord, PassageRecord, Store

__all__ = ["AddProgress", "AddReport", "Intake"]


@dataclass(frozen=True, kw_only=True)
class AddProgress:
    """How far a long `add` is.

    Attributes:
        document_id: Whose passage was just compressed.
        n_documents: Documents done.
        n_documents_total: Documents to do; unchanged ones are not counted.
        n_tokens: Tokens compressed so far.
        n_tokens_total: Tokens to compress.
    """

    document_id: str
    n_documents: int
    n_documents_total: int
    n_tokens: int
    n_tokens_total: int


@dataclass(kw_only=True)
class AddReport:
    """What `add` or `refresh` did.

    Attributes:
        added: Ids that are new.
        replaced: Ids whose text, metadata or settings had changed.
        unchanged: Ids for which there was nothing to do.
        errors: Documents left out, with `on_error="skip"`.
        skipped: Files of unknown types that lay in a folder.
        n_passages: Compressed.
        n_tokens: Compressed, wrappers included.
        n_kept: Entries kept of them in every layer and head.
        cache_bytes: Of the new distilled caches.
        full_kv_bytes: What their uncompressed caches would take.
        n_refined: Of the passages compressed, those that were refined.
        fidelity: Mean KL of these to the full cache on held-out probes, in nats; None where none was refined.
        elapsed_s: Wall time.
    """

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    errors: list[KVMemoryError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    n_passages: int = 0
    n_tokens: int = 0
    n_kept: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0
    n_refined: int = 0
    fidelity: float | None = None
    elapsed_s: float = 0.0


class Intake:
    """Compresses documents into a store.

    Args:
        store: Where they go.
        compressor: What reads them.
        keep_ratio: For all of them.
        passage_tokens: Longest passage; None keeps documents whole.
        storage: How keys and values of new caches are stored; those that are there stay as they are.
        on_progress: Called after every passage.
    """

    def __init__(
        self,
        store: Store,
        compressor: Compressor,
        *,
        keep_ratio: float,
        passage_tokens: int | None,
        storage: StorageName = "auto",
        on_progress: Callable[[AddProgress], None] | None = None,
    ) -> None:
        self._store = store
        self._compressor = compressor
        self._keep_ratio = keep_ratio
        self._passage_tokens = passage_tokens
        self._storage = storage
        self._on_progress = on_progress
        self._fingerprint = compressor.fingerprint()  # hashes an adapter's weights: once, not per passage

    def add(
        self, documents: Sequence[Document], *, errors: Iterable[KVMemoryError] = (), skipped: Iterable[Path] = ()
    ) -> AddReport:
        """Add or replace documents; those that are there unchanged cost nothing."""
        report = AddReport(errors=list(errors), skipped=[str(path) for path in skipped])
        start_s = time.perf_counter()
        before = {summary.id: summary for summary in self._store.documents()}
        stale = {passage.document_id for passage in self._store.missing(self._fingerprint, self._keep_ratio)}
        todo: list[DocumentRecord] = []
        for document in documents:
            old = before.get(document.id)
            same = (
                old is not None
                and old.content_sha256 == document.content_sha256
                and old.passage_tokens == self._passage_tokens
            )
            if same and document.id not in stale and old is not None and old.metadata == dict(document.metadata):
                report.unchanged.append(document.id)
                continue
            (report.added if old is None else report.replaced).append(document.id)
            todo.append(self._store.document(document.id) if same else self._cut(document))
            if same:  # the passages are as they were; metadata may not be
                todo[-1] = _with_metadata(todo[-1], document)
        self._compress(todo, report)
        report.elapsed_s = time.perf_counter() - start_s
        return report

    def refresh(self) -> AddReport:
        """Compress every stored passage that has no cache under the present settings."""
        report = AddReport()
        start_s = time.perf_counter()
        stale = {passage.document_id for passage in self._store.missing(self._fingerprint, self._keep_ratio)}
        for summary in self._store.documents():
            (report.replaced if summary.id in stale else report.unchanged).append(summary.id)
        self._compress([self._store.document(id_) for id_ in report.replaced], report)
        report.elapsed_s = time.perf_counter() - start_s
        return report

    def add_passages(
        self, document: str, texts: Sequence[str], *, metadata: Mapping[str, Any] | None, extend: bool
    ) -> AddReport:
        """Add or replace a document that somebody else has cut into passages. See `KVMemory.add_passages`."""
        report = AddReport()
        start_s = time.perf_counter()
        if isinstance(texts, str):
            raise ConfigError("passages are a list of texts, not one text", where="texts", next_step="Pass [text].")
        checked = [Document(id=document, text=text, metadata=metadata or {}) for text in texts]
        if not checked:
            raise EmptyDocumentError("no passages", where=document, next_step="Leave the document out, or remove it.")
        old = self._store.document(document) if self._store.has_document(document) else None
        before = list(old.passages) if old is not None and extend else []
        known = {passage.text for passage in before}
        new = list(dict.fromkeys(item.text for item in checked if item.text not in known))
        counts = self._compressor.backbone.count_tokens(new)
        passages = (*before, *(PassageRecord(text=t, n_tokens=n) for t, n in zip(new, counts, strict=True)))
        record = DocumentRecord(
            id=document,
            content_sha256=hashlib.sha256("\0".join(passage.text_sha256 for passage in passages).encode()).hexdigest(),
            metadata=old.metadata if old is not None and extend and metadata is None else dict(checked[0].metadata),
            passages=passages,
        )
        whole = all(self._store.has(p.text_sha256, self._fingerprint, self._keep_ratio) for p in passages)
        if whole and old is not None and (old.content_sha256, old.metadata) == (record.content_sha256, record.metadata):
            report.unchanged.append(document)
        else:
            (report.added if old is None else report.replaced).append(document)
            self._compress([record], report)
        report.elapsed_s = time.perf_counter() - start_s
        return report

    def _cut(self, document: Document) -> DocumentRecord:
        count = self._compressor.backbone.count_tokens
        texts = split_passages(document.text, max_tokens=self._passage_tokens, count_tokens=count)
        counts = count(texts)
        return DocumentRecord(
            id=document.id,
            content_sha256=document.content_sha256,
            source_uri=document.source_uri,
            metadata=dict(document.metadata),
            passage_tokens=self._passage_tokens,
            passages=tuple(PassageRecord(text=t, n_tokens=n) for t, n in zip(texts, counts, strict=True)),
        )

    def _compress(self, todo: list[DocumentRecord], report: AddReport) -> None:
        total = sum(record.n_tokens for record in todo)
        done = 0
        for index, record in enumerate(todo):
            for passage in record.passages:
                self._make(passage, report)
                done += passage.n_tokens
                self._tell(record, index, len(todo), done, total)
            self._store.put_document(record)

    def _make(self, passage: PassageRecord, report: AddReport) -> None:
        wanted = passage.text_sha256, self._fingerprint, self._keep_ratio
        if self._store.has(*wanted):
            return
        with self._store.making(*wanted):  # one makes it, the others wait and find it
            if self._store.has(*wanted):
                return
            cache = self._compressor.compress(passage.text, keep_ratio=self._keep_ratio)
            info = self._store.put(passage.text_sha256, cache, storage=self._storage)
        report.n_passages += 1
        report.n_tokens += cache.n_tokens
        report.n_kept += cache.n_kept
        report.cache_bytes += info.size_bytes
        if cache.fidelity is not None:
            report.n_refined += 1
            before = report.fidelity or 0.0
            report.fidelity = before + (cache.fidelity - before) / report.n_refined
        report.full_kv_bytes += cache.n_tokens * self._compressor.backbone.kv_bytes_per_token

    def _tell(self, record: DocumentRecord, index: int, n_documents: int, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(
                AddProgress(
                    document_id=record.id,
                    n_documents=index,
                    n_documents_total=n_documents,
                    n_tokens=done,
                    n_tokens_total=total,
                )
            )


def _with_metadata(record: DocumentRecord, document: Document) -> DocumentRecord:
    return DocumentRecord(
        id=record.id,
        content_sha256=record.content_sha256,
        source_uri=document.source_uri,
        metadata=dict(document.metadata),
        passage_tokens=record.passage_tokens,
        passages=record.passages,
    )
