"""KVMemory, the facade: documents in, distilled caches on disk, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from kv_memory.compress import Adapter, Compressor, RefineSettings
from kv_memory.config import DecodeSettings, DtypeName, check_choice, check_names
from kv_memory.documents import DocumentLike, read_documents
from kv_memory.errors import CorruptCacheError, StoreFullError, TextNotKeptError
from kv_memory.generate import Answer, AnswerStream, ReadFrom, Turn, iterate_in_thread
from kv_memory.ingest.pipeline import AddProgress, AddReport, IngestPipeline
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import adapter_folder
from kv_memory.model.prompts import PromptForm
from kv_memory.query import Reader, Reference
from kv_memory.retrieval.bm25 import CollectionIndex, Hit
from kv_memory.settings import KEEP_NAMES, MemorySettings
from kv_memory.store import (
    CheckReport,
    DocumentRecord,
    DocumentSummary,
    GcReport,
    Store,
    StoreStats,
)

__all__ = ["AddProgress", "AddReport", "Answer", "AnswerStream", "KVMemory", "MemorySettings"]


class KVMemory:
    """A collection of documents, each compressed once and stored as distilled caches. Created with `open`.

    Example:
        ```python
        from kv_memory import KVMemory

        with KVMemory.open("my-store") as memory:
            memory.add(["The ferry to Skarholm leaves at 7.40 from pier 4."])
            print(memory.ask("When does the ferry to Skarholm leave?").text)
        ```
    """

    def __init__(
        self,
        store: Store,
        settings: MemorySettings,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        backbone: Backbone | None = None,
        prompt_form: PromptForm | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self._dtype = dtype
        self._device = device
        self._backbone = backbone
        self._prompt_form = prompt_form
        self._prefix_shared = False
        self._compressor: Compressor | None = None
        self._index = CollectionIndex(store)
        self._others: dict[tuple[str, MemorySettings], KVMemory] = {}
        self._lock = threading.RLock()
        self._extend_lock = threading.Lock()  # not `_lock`: questions would wait for it

    @classmethod
    def open(
        cls,
        path: Path | str,
        settings: MemorySettings | None = None,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        collection: str = "default",
        catalog: str | None = None,
        blobs: str | None = None,
        tier_size_bytes: int | None = None,
        create: bool = True,
        load_model: bool = True,
        **changes: Any,
    ) -> KVMemory:
        """Open a store, or create one.

        The settings are `MemorySettings`, which describes them all. Those that are not given keep the values that the
        store recorded at the last `add`; a new store starts with the defaults.

        Args:
            path: Folder of the store.
            settings: All settings, instead of the recorded ones.
            dtype: Type of the model's weights and caches; `auto` takes bfloat16 where that is fast.
            device: Device of the model: `auto`, `cpu`, `cuda`, ...
            collection: Name of the collection. Tenants are collections; a lookup never leaves its own.
            catalog: URL of a PostgreSQL database, for a new store; see `Store.open`.
            blobs: URL of an object store, for a new store; see `Store.open`.
            tier_size_bytes: Size limit in bytes for local copies of an object store's blobs.
            create: True to create the store if it does not exist.
            load_model: True to load the model now, so that its errors are raised here. False loads it at first use;
                listing, checking and removing need no model.
            changes: Single settings by name, e.g. `keep_ratio=1/8`; see `MemorySettings.resolve`. `model` may also be a
                `Backbone`, and `prompt` a `PromptForm`, unless a `Backbone` brings its own.

        Raises:
            ConfigError: A name is unknown, a setting is out of range, or two settings exclude each other.
            BudgetError: `keep_tokens` or `max_bytes` is too small for any cache of this model; the error names the
                smallest value that works.
            ModelError: The model cannot be found, loaded or used; see its subclasses.
            AdapterError: The adapter cannot be read or belongs to another model.
            StoreError: The store cannot be opened; see its subclasses.
        """
        check_names(changes, {*MemorySettings.__dataclass_fields__, *cls.open.__kwdefaults__})
        backbone = form = None
        if isinstance(changes.get("model"), Backbone):
            backbone = changes["model"]
            changes["model"] = backbone.name
        if isinstance(changes.get("prompt"), PromptForm):
            form = changes.pop("prompt")
        given = {} if settings is None else dataclasses.asdict(settings)
        resolved = MemorySettings.resolve(given, **changes)
        compressor = None
        if load_model and create and not Path(path).exists():
            # Load first: a faulty model or adapter must not leave an empty store behind.
            prompt = form or resolved.prompt
            backbone = backbone or Backbone.load(resolved.model, dtype=dtype, device=device, prompt=prompt)
            compressor = load_compressor(resolved, backbone)
            resolved.keep.check(compressor.fingerprint())
        store = Store.open(
            path,
            collection=collection,
            create=create,
            catalog=catalog,
            blobs=blobs,
            tier_size_bytes=tier_size_bytes,
        )
        try:
            resolved = MemorySettings.resolve(given or store.settings(), **changes)
            memory = cls(store, resolved, dtype=dtype, device=device, backbone=backbone, prompt_form=form)
            memory._compressor = compressor
            if load_model:
                memory.load()
            return memory
        except BaseException:
            store.close()
            raise

    def load(self) -> None:
        """Load the model and the adapter, and prefill the shared prefix, now instead of at first use."""
        _ = self.compressor

    def in_collection(self, name: str, **changes: Any) -> KVMemory:
        """Another collection of this store, with the same model.

        The collection is created if it does not exist, and closed together with this one.

        Args:
            name: Name of the collection: a tenant, a conversation.
            changes: One of keep_ratio, keep_tokens and max_bytes, for documents added to it; without any, this
                collection's setting applies.

        Raises:
            ConfigError: Another setting is named, or a value is out of range.
        """
        check_names(changes, KEEP_NAMES, what="setting of a collection")
        settings = MemorySettings.resolve(dataclasses.asdict(self.settings), **changes)
        if name == self.collection and settings == self.settings:
            return self
        with self._lock:
            found = self._others.get((name, settings))
            if found is None:
                found = KVMemory(self.store.in_collection(name), settings, backbone=self.backbone)
                found._compressor, found._prefix_shared = self.compressor, True
                self._others[name, settings] = found
            return found

    def close(self) -> None:
        """Close the store; the model is freed with the object."""
        for other in self._others.values():
            other.close()
        self._others.clear()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self.store.path

    @property
    def collection(self) -> str:
        """Name of the collection."""
        return self.store.collection

    @property
    def backbone(self) -> Backbone:
        """The model, loaded on first use."""
        with self._lock:
            if self._backbone is None:
                self._backbone = Backbone.load(
                    self.settings.model,
                    dtype=self._dtype,
                    device=self._device,
                    prompt=self._prompt_form or self.settings.prompt,
                )
            return self._backbone

    @property
    def compressor(self) -> Compressor:
        """The compressor with its adapter, loaded on first use."""
        with self._lock:
            if self._compressor is None:
                self._compressor = load_compressor(self.settings, self.backbone)
            if not self._prefix_shared:
                self._prefix_shared = True
                _share_prefix(self.store, self._compressor.backbone)
            return self._compressor

    # -- documents -----------------------------------------------------------------------------------------------

    def add(
        self,
        documents: DocumentLike | Iterable[DocumentLike],
        *,
        encoding: str = "utf-8",
        on_error: Literal["raise", "skip"] = "raise",
        on_progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """Compress documents and store their caches.

        Unchanged documents cost nothing. Changed documents are replaced.

        Args:
            documents: A text (`str`), a file or folder (`Path`), a `Document`, `(id, text)`, `(id, text, metadata)`,
                or an iterable of these. The id of a file is its absolute path.
            encoding: Encoding of text files.
            on_error: `skip` leaves bad documents out and reports them; `raise` stops before any work.
            on_progress: Called after every passage.

        Raises:
            DocumentError: A document cannot be read; see its subclasses.
            StoreError: The store cannot be written; its previous content is untouched.
        """
        read = read_documents(documents, encoding=encoding, on_error=on_error)
        pipeline = self.pipeline(on_progress=on_progress)
        return self._remember(pipeline.add(read.documents, errors=read.errors, skipped=read.skipped))

    def add_passages(
        self,
        document_id: str,
        texts: Sequence[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        extend: bool = False,
        drop: Collection[str] = (),
        keep_text: bool | None = None,
        on_progress: Callable[[AddProgress], None] | None = None,
    ) -> AddReport:
        """Add a document that is already split, e.g. by a framework's node parser.

        Passages that are already stored cost nothing.

        Args:
            document_id: Id of the document; a stored document with this id is replaced.
            texts: Passages of the document, each exactly the text that will be looked up later.
            metadata: JSON-serialisable metadata. None means empty, or with `extend` the document's current metadata.
            extend: True to keep the stored passages and add the new ones. Only one process at a time may extend a
                document.
            drop: Keys (`query.key_of`) of stored passages to remove, with `extend`; `texts` may then be empty.
            keep_text: True to keep these texts, False not to; None follows the settings.
            on_progress: Called after every passage.

        Raises:
            ConfigError: `texts` is not a list of texts, or the metadata is not JSON-serialisable.
            DocumentError: There is no text, or one is blank or binary.
            StoreError: The store cannot be written.
        """
        pipeline = self.pipeline(on_progress=on_progress, keep_text=keep_text)
        with self._extend_lock:  # extending reads the document and writes it back with more passages
            report = pipeline.add_passages(document_id, texts, metadata=metadata, extend=extend, drop=drop)
        return self._remember(report)

    def refresh(
        self, *, encoding: str = "utf-8", on_progress: Callable[[AddProgress], None] | None = None
    ) -> AddReport:
        """Compress every stored passage that has no cache under the current settings.

        The text comes from the store or, if it is not kept there, from the document's file. Documents whose file is
        gone or has changed, and documents without a text that are not files, are listed in the report's `errors` and
        stay unchanged.

        Args:
            encoding: Encoding of the text files.
            on_progress: Called after every passage.
        """
        return self._remember(self.pipeline(on_progress=on_progress).refresh(encoding=encoding))

    def pipeline(
        self,
        *,
        on_progress: Callable[[AddProgress], None] | None = None,
        keep_text: bool | None = None,
        writer: Executor | None = None,
    ) -> IngestPipeline:
        """The pipeline behind `add`, for callers with too many documents to hold in memory.

        Args:
            on_progress: Called after every passage.
            keep_text: True to keep texts, False not to; None follows the settings.
            writer: Executor that stores caches while the next ones are compressed; None stores them at once.
        """
        return IngestPipeline(
            self.store,
            self.compressor,
            self.settings,
            keep_text=keep_text,
            on_progress=on_progress,
            writer=writer,
        )

    def _remember(self, report: AddReport) -> AddReport:
        """Record the settings of an `add` that had nothing to store; otherwise the documents brought them."""
        values = dataclasses.asdict(self.settings)
        if not report.added and not report.replaced and self.store.settings() != values:
            self.store.update_settings(values)
        return report

    def remove(self, document_id: str | Path) -> None:
        """Delete a document with its passages and caches.

        Args:
            document_id: Id of the document, or the path of a file that was added.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        id_ = document_id.resolve().as_posix() if isinstance(document_id, Path) else document_id
        self.store.delete_document(id_)

    def documents(self) -> list[DocumentSummary]:
        """All documents, without their texts, ordered by id."""
        return self.store.documents()

    def document(self, document_id: str) -> DocumentRecord:
        """One document with its passages.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        return self.store.document(document_id)

    # -- questions -----------------------------------------------------------------------------------------------

    def retrieve(self, question: str, *, top_k: int | None = None) -> list[Hit]:
        """The passages that match a question best, by BM25.

        Args:
            question: Any text.
            top_k: Largest number of passages; None means 1 for `smollm2` and 3 for other models.
        """
        return self._index.retrieve(question, top_k=self.settings.top_k if top_k is None else top_k)

    def ask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        settings: DecodeSettings | None = None,
        read_from: ReadFrom = "caches",
    ) -> Answer:
        """Answer a question from the passages that match it.

        Args:
            question: Any text.
            top_k: See `retrieve`.
            settings: Decoding settings.
            read_from: `caches` keeps the text out of the prompt. `text` puts it into the prompt, as in plain RAG, for
                comparison.

        Raises:
            CacheNotFoundError: A passage has no cache under the current model, adapter and prompt.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            CorruptCacheError: A cache is damaged, and the text that would replace it is not kept.
            TextNotKeptError: `read_from` is `text`, and the text of a passage is not kept.
            ContextWindowError: Passages, question and answer do not fit the model.
        """
        return self.stream(question, top_k=top_k, settings=settings, read_from=read_from).answer

    def ask_many(
        self, questions: Sequence[str], *, document_id: str, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions about one document as one batch.

        The questions are answered from all passages of the document.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        passages = self.document(document_id).passages
        hits = tuple(
            Hit(document_id=document_id, ordinal=i, score=1.0, text=p.text, text_sha256=p.text_sha256, metadata={})
            for i, p in enumerate(passages)
        )
        so_far = [Answer(question=question, sources=hits) for question in questions]
        return self.reader.reply_batch(questions, _references(hits), settings=settings, so_far=so_far)

    def stream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        settings: DecodeSettings | None = None,
        read_from: ReadFrom = "caches",
    ) -> AnswerStream:
        """`ask`, piece by piece.

        Iterate for the text, then read `.answer`. Arguments and errors as in `ask`.
        """
        check_choice(read_from, ReadFrom, where="read_from")
        hits = tuple(self.retrieve(question, top_k=top_k))
        so_far = Answer(question=question, sources=hits, read_from=read_from)
        if not hits:
            step = "Use words that occur in the documents."
            return AnswerStream(None, dataclasses.replace(so_far, next_step=step))
        return self.reader.reply(
            [Turn("user", question)],
            _references(hits) if read_from == "caches" else (),
            texts=_texts(hits) if read_from == "text" else (),
            settings=settings,
            so_far=so_far,
        )

    async def aask(
        self,
        question: str,
        *,
        top_k: int | None = None,
        settings: DecodeSettings | None = None,
        read_from: ReadFrom = "caches",
    ) -> Answer:
        """`ask` for asyncio: runs in a thread."""
        return await asyncio.to_thread(self.ask, question, top_k=top_k, settings=settings, read_from=read_from)

    async def astream(
        self,
        question: str,
        *,
        top_k: int | None = None,
        settings: DecodeSettings | None = None,
        read_from: ReadFrom = "caches",
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: every step runs in a thread, so that the model never blocks the event loop."""
        stream = await asyncio.to_thread(self.stream, question, top_k=top_k, settings=settings, read_from=read_from)
        async for piece in iterate_in_thread(stream):
            yield piece

    @cached_property
    def reader(self) -> Reader:
        """Replies to whole conversations from referenced caches; the framework integrations are built on it."""
        return Reader(
            self.store,
            self.compressor,
            self.settings,
            store_of=lambda name: self.store.in_collection(name, create=False),
        )

    # -- upkeep --------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Counts and sizes of the collection."""
        return self.store.stats()

    def check(self) -> CheckReport:
        """Compare catalog and blobs, and verify every blob; damaged blobs are quarantined."""
        return self.store.check()

    def gc(self) -> GcReport:
        """Delete caches and blobs that nothing refers to any more."""
        return self.store.gc()


def load_compressor(settings: MemorySettings, backbone: Backbone) -> Compressor:
    """The compressor for a store's settings. Errors as in `Adapter.load`."""
    adapter = None if settings.adapter is None else Adapter.load(adapter_folder(settings.adapter), backbone)
    refine = None
    if settings.refine_steps:
        most = max(settings.refine_steps, RefineSettings().max_steps)
        refine = RefineSettings(steps=settings.refine_steps, min_fidelity=settings.min_fidelity, max_steps=most)
    return Compressor(backbone, selector=settings.selector, adapter=adapter, refine=refine)


def _references(hits: Iterable[Hit]) -> list[Reference]:
    # No texts: a missing cache is an error here, and for a damaged one the reader takes the text from the store.
    return [Reference(key=hit.text_sha256) for hit in hits]


def _texts(hits: Sequence[Hit]) -> list[str]:
    lacking = next((hit for hit in hits if hit.text is None), None)
    if lacking is not None:
        raise TextNotKeptError(
            "the text of a passage is not kept, so it can only be answered from its cache",
            where=f"{lacking.document_id}, passage {lacking.ordinal}",
            next_step="Add the document again with `--keep-text` (keep_text=True); it is not compressed again.",
        )
    return [hit.text for hit in hits if hit.text is not None]


def _share_prefix(store: Store, backbone: Backbone) -> None:
    """Load the prefilled prefix from the store, or store it there for the next process."""
    store.warm()
    with contextlib.suppress(CorruptCacheError):  # quarantined by the store; prefilled again below
        path = store.get_prefix(backbone.prefix_key)
        if path is not None:
            backbone.load_prefix(path)
            return
    with contextlib.suppress(StoreFullError):  # a stored prefix only saves time
        store.put_prefix(backbone.prefix_key, backbone.prefix.to_bytes(key=backbone.prefix_key))
