"""IngestPipeline: split documents into passages, compress the passages, and store both.

Caches are stored one by one and their document last, in one transaction. If a long `add` is interrupted, its finished
work is kept: the next call finds the caches and continues after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Compressor
from kv_memory.documents import Document
from kv_memory.errors import ConfigError, KVMemoryError, TextNotKeptError
from kv_memory.ingest.document_records import (
    Prepared,
    lacks_vectors,
    prepare,
    prepare_again,
    prepare_from_file,
    prepare_passages,
    texts_in,
    with_vectors,
)
from kv_memory.retrieval.encoder import Encoder
from kv_memory.retrieval.language import language_of
from kv_memory.settings import MemorySettings
from kv_memory.store import DocumentRecord, Store
from kv_memory.tracing import span

_BATCH_ON_GPU = 8  # passages; each holds a lock in the catalog meanwhile, on PostgreSQL with its own connection


@dataclass(frozen=True, kw_only=True)
class AddProgress:
    """The progress of a long `add`.

    Attributes:
        document_id: Id of the document with the passage compressed last.
        n_documents: Number of finished documents.
        n_documents_total: Number of documents to process, without unchanged ones.
        n_tokens: Number of tokens compressed so far.
        n_tokens_total: Number of tokens to compress.
    """

    document_id: str
    n_documents: int
    n_documents_total: int
    n_tokens: int
    n_tokens_total: int


@dataclass(frozen=True, kw_only=True)
class AddPlan:
    """The work of an `add`, before it begins.

    Attributes:
        n_documents: Number of documents to process, without unchanged ones.
        n_passages: Number of passages to compress.
        n_tokens: Number of tokens in them.
        text_bytes: Size of their texts in UTF-8, in bytes.
        cache_bytes: Estimated size of their caches on disk, in bytes.
    """

    n_documents: int
    n_passages: int
    n_tokens: int
    text_bytes: int
    cache_bytes: int


@dataclass(kw_only=True)
class AddReport:
    """The result of `add` or `refresh`.

    Attributes:
        added: Ids of new documents.
        replaced: Ids of documents with changed text, metadata or settings.
        unchanged: Ids of documents that needed no work.
        errors: Errors of documents left out: with `on_error="skip"`, or by `refresh` because their text is missing.
        skipped: Hidden entries, folder links and files of unknown type that were found in a folder.
        notes: Remarks on documents that were added or replaced: what their parsers replaced or lost.
        n_passages: Number of passages compressed.
        n_tokens: Number of tokens compressed, wrappers included.
        n_kept: Number of entries kept of these tokens in every layer and head.
        text_bytes: Size of the texts of these passages in UTF-8, in bytes.
        cache_bytes: Size of the new distilled caches on disk, in bytes.
        full_kv_bytes: Size that their uncompressed caches would have, in bytes.
        n_refined: Number of the compressed passages that were refined.
        fidelity: Mean KL of the refined caches to the full cache on held-out probes, in nats; None without refinement.
        elapsed_s: Wall time in seconds.
    """

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    errors: list[KVMemoryError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_passages: int = 0
    n_tokens: int = 0
    n_kept: int = 0
    text_bytes: int = 0
    cache_bytes: int = 0
    full_kv_bytes: int = 0
    n_refined: int = 0
    fidelity: float | None = None
    elapsed_s: float = 0.0


class IngestPipeline:
    """Compresses documents into a store.

    Args:
        store: Store that receives documents and caches; it records the settings with each document.
        compressor: Compressor of the passages.
        settings: Settings for passages, caches and texts.
        keep_text: True to keep the texts of added documents, False not to; None follows the settings.
        on_plan: Callback before the first passage, if there is any to compress.
        on_progress: Callback after every batch of passages.
        writer: Executor that stores the caches of a batch while the next one is compressed; None stores them at once.
        encoder: Encoder whose vectors are stored with the passages; None stores no vectors.
        batch_size: Number of passages of a document compressed at once, grouped by similar length. None means 8 on a
            GPU, which a single passage does not fill, and 1 elsewhere.
    """

    def __init__(
        self,
        store: Store,
        compressor: Compressor,
        settings: MemorySettings,
        *,
        keep_text: bool | None = None,
        on_plan: Callable[[AddPlan], None] | None = None,
        on_progress: Callable[[AddProgress], None] | None = None,
        writer: Executor | None = None,
        encoder: Encoder | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._compressor = compressor
        self._settings = settings
        self._count_tokens = compressor.backbone.count_tokens
        self._keep_text = settings.keep_text if keep_text is None else keep_text
        self._on_plan = on_plan
        self._on_progress = on_progress
        self._writer = writer
        on_gpu = compressor.backbone.device.type == "cuda"
        self._batch_size = batch_size if batch_size is not None else _BATCH_ON_GPU if on_gpu else 1
        self._written: Future[None] | None = None
        self._recorded = False  # whether the store has these settings
        self.fingerprint = compressor.fingerprint()
        settings.keep.ratio_for(1, self.fingerprint)  # raises, before any work, if no document fits the budget

    def add(
        self, documents: Iterable[Document], *, errors: Iterable[KVMemoryError] = (), skipped: Iterable[Path] = ()
    ) -> AddReport:
        """Add or replace documents; unchanged documents are not compressed again."""
        start_s, report = time.perf_counter(), AddReport(errors=list(errors), skipped=[str(path) for path in skipped])
        todo = [made for document in documents if (made := self._prepared(document, report)) is not None]
        return self._compress(todo, report, start_s)

    def add_passages(
        self,
        document: str,
        texts: Sequence[str],
        *,
        metadata: Mapping[str, Any] | None,
        extend: bool,
        drop: Collection[str] = (),
    ) -> AddReport:
        """Add or replace a document that the caller has split into passages; see `KVMemory.add_passages`."""
        start_s, report = time.perf_counter(), AddReport()
        old, cached = self._store.find_document(document, self.fingerprint, self._settings.keep) or (None, set[str]())
        made = prepare_passages(
            document,
            texts,
            self._count_tokens,
            old=old,
            metadata=metadata,
            extend=extend,
            drop=drop,
            keep_text=self._keep_text,
            language=self._settings.language,
        )
        same = old is not None and _same(old, made.record) and not lacks_vectors(old, self._encoder)
        if same and made.texts.keys() <= cached:
            report.unchanged.append(document)
            return self._compress([], report, start_s)
        (report.added if old is None else report.replaced).append(document)
        return self._compress([made._replace(cached=cached)], report, start_s)

    def refresh(self, *, encoding: str = "utf-8") -> AddReport:
        """Make the caches and vectors that stored passages lack under the current settings; see `KVMemory.refresh`."""
        start_s, report = time.perf_counter(), AddReport()
        uncached: dict[str, set[str]] = {}  # hashes of texts by document
        for passage in self._store.missing(self.fingerprint, self._settings.keep):
            uncached.setdefault(passage.document_id, set()).add(passage.text_sha256)
        name = None if self._encoder is None else self._encoder.name
        no_vector = set() if name is None else self._store.documents_without_vectors(name)
        todo: list[Prepared] = []
        for summary in self._store.documents():
            if summary.id not in uncached and summary.id not in no_vector:
                report.unchanged.append(summary.id)
                continue
            record = self._store.document(summary.id)
            needed = uncached.get(summary.id, set())
            cached = {passage.text_sha256 for passage in record.passages} - needed
            if name is not None:
                needed = needed | {passage.text_sha256 for passage in record.passages if passage.encoder != name}
            try:
                made = Prepared(record, texts_in(record))
                if not needed <= made.texts.keys():
                    made = prepare_from_file(
                        record, self._count_tokens, encoding=encoding, language=self._settings.language
                    )
            except TextNotKeptError as error:
                report.errors.append(error)
            else:
                todo.append(made._replace(cached=cached))
                report.replaced.append(summary.id)
        return self._compress(todo, report, start_s)

    def _prepared(self, document: Document, report: AddReport) -> Prepared | None:
        """Classify a document in the report, and prepare it for compression; return None if it is unchanged.

        Only this document is looked up: listing the collection for each document of a job would be quadratic.
        """
        found = self._store.find_document(document.id, self.fingerprint, self._settings.keep)
        old, cached = found or (None, set[str]())
        limit, language = self._settings.passage_tokens, self._settings.language
        form: dict[str, Any] = {"keep_text": self._keep_text, "language": language}
        if old is None or (old.content_sha256, old.passage_tokens) != (document.content_sha256, limit):
            (report.added if old is None else report.replaced).append(document.id)
            report.notes += [f"{note} [{document.id}]" for note in document.notes]
            made = prepare(document, limit, self._count_tokens, **form)
            return made._replace(cached=cached)
        found_by = self._keep_text, language_of(document.text, language)
        kept = all((passage.text is not None, passage.language) == found_by for passage in old.passages)
        kept = kept and not lacks_vectors(old, self._encoder)
        if kept and old.metadata == document.metadata and all(p.text_sha256 in cached for p in old.passages):
            report.unchanged.append(document.id)
            return None
        report.replaced.append(document.id)  # the passages are unchanged; the metadata may have changed
        made = prepare_again(document, old, self._count_tokens, **form)
        return made._replace(cached=cached)

    def _compress(self, todo: list[Prepared], report: AddReport, start_s: float) -> AddReport:
        if self._on_plan is not None and (plan := self._planned(todo)).n_passages:
            self._on_plan(plan)
        total = sum(made.record.n_tokens for made in todo)
        settings = asdict(self._settings)
        done = 0
        for index, (record, texts, cached) in enumerate(todo):
            try:
                passages = list(record.passages)
                if self._batch_size > 1:
                    passages.sort(key=lambda passage: passage.n_tokens)
                for start in range(0, len(passages), self._batch_size):
                    batch = passages[start : start + self._batch_size]
                    # A passage without text stays unchanged; `refresh` reports it if it has no cache.
                    keys = {passage.text_sha256 for passage in batch} & texts.keys() - cached
                    self._make({key: texts[key] for key in sorted(keys)}, report)
                    done += sum(passage.n_tokens for passage in batch)
                    if self._on_progress is not None:
                        self._on_progress(
                            AddProgress(
                                document_id=record.id,
                                n_documents=index,
                                n_documents_total=len(todo),
                                n_tokens=done,
                                n_tokens_total=total,
                            )
                        )
            finally:
                if self._writer is not None:
                    self._wait()
            self._store.put_document(with_vectors(record, texts, self._encoder), settings=settings)
            self._recorded = True
        if not self._recorded:  # no document has brought the settings, with which later calls continue
            if self._store.settings() != settings:
                self._store.update_settings(settings)
            self._recorded = True
        report.elapsed_s = time.perf_counter() - start_s
        return report

    def _planned(self, todo: list[Prepared]) -> AddPlan:
        """What the documents take; a text that occurs twice is compressed once."""
        passages = {
            passage.text_sha256: (passage.n_tokens, len(made.texts[passage.text_sha256].encode()))
            for made in todo
            for passage in made.record.passages
            if passage.text_sha256 in made.texts.keys() - made.cached
        }
        n_bytes = 0
        for n_tokens, _ in passages.values():
            with suppress(ConfigError):  # no cache of it fits: an error when its turn comes
                n_bytes += self._settings.keep.size_bytes(n_tokens, self.fingerprint)
        return AddPlan(
            n_documents=len(todo),
            n_passages=len(passages),
            n_tokens=sum(n_tokens for n_tokens, _ in passages.values()),
            text_bytes=sum(text_bytes for _, text_bytes in passages.values()),
            cache_bytes=n_bytes,
        )

    def _make(self, texts: dict[str, str], report: AddReport) -> None:
        """Compress and store the texts, by their sorted hashes, that have no cache."""
        if not texts:
            return
        keep = self._settings.keep
        ratios = {key: self._compressor.ratio_for(text, keep) for key, text in texts.items()}
        with ExitStack() as stack:
            # 1. Lock the texts: one process compresses a text, the others wait and find its cache. The locks are
            #    acquired in sorted order, so that two processes with the same texts cannot deadlock.
            for key, ratio in ratios.items():
                stack.enter_context(self._store.making(key, self.fingerprint, ratio))
            # 2. Leave out texts that another process has cached meanwhile.
            cached = self._store.cached_texts(texts, self.fingerprint, keep)
            missing = [key for key in texts if key not in cached]
            if not missing:
                return
            # 3. Compress the rest as one batch.
            with span("compress", keep_ratio=ratios[missing[0]], collection=self._store.collection):
                if len(missing) == 1:
                    caches = [self._compressor.compress(texts[missing[0]], keep_ratio=ratios[missing[0]])]
                else:
                    caches = self._compressor.compress_many(
                        [texts[key] for key in missing], keep_ratio=[ratios[key] for key in missing]
                    )
            report.text_bytes += sum(len(texts[key].encode()) for key in missing)
            # 4. Store the caches; `_write` then releases the locks.
            held = stack.pop_all()
        made = list(zip(missing, caches, strict=True))
        if self._writer is None:
            self._write(made, report, held)
            return
        self._wait()  # at most one batch waits in memory
        self._written = self._writer.submit(self._write, made, report, held)

    def _write(self, made: list[tuple[str, DistilledCache]], report: AddReport, held: ExitStack) -> None:
        with held:
            for text_sha256, cache in made:
                info = self._store.put(text_sha256, cache, storage=self._settings.storage)
                report.n_passages += 1
                report.n_tokens += info.n_tokens
                report.n_kept += info.n_kept
                report.cache_bytes += info.size_bytes
                report.full_kv_bytes += info.n_tokens * self._compressor.backbone.kv_bytes_per_token
                if cache.fidelity is not None:
                    report.n_refined += 1
                    before = report.fidelity or 0.0
                    report.fidelity = before + (cache.fidelity - before) / report.n_refined

    def _wait(self) -> None:
        """Wait until the previous batch is stored; errors as in `Store.put`."""
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _same(old: DocumentRecord, new: DocumentRecord) -> bool:
    """Whether two records agree in content, metadata, kept texts and language, so that nothing has to be written."""
    kept = [[(passage.text is not None, passage.language) for passage in record.passages] for record in (old, new)]
    return (old.content_sha256, old.metadata) == (new.content_sha256, new.metadata) and kept[0] == kept[1]
