"""KVMemory, the facade: documents in, distilled caches on disk, answers out."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from kv_memory.answers import Answer, AnswerStream, Asker, ReadFrom
from kv_memory.assembly import load_backbone, load_compressor, share_prefix
from kv_memory.cache.keep import Keep, given_keep
from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings, DtypeName, Layout, SelectorName, StorageName, check_choice
from kv_memory.documents import DocumentLike, read_documents
from kv_memory.generate import iterate_in_thread
from kv_memory.ingest.pipeline import AddProgress, AddReport, IngestPipeline
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm, PromptName
from kv_memory.query import Reader
from kv_memory.retrieval.bm25 import CollectionIndex, Hit
from kv_memory.settings import MemorySettings, given_settings, resolve_settings
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
        self._others: dict[tuple[str, Keep], KVMemory] = {}
        self._lock = threading.RLock()
        self._extend_lock = threading.Lock()  # not `_lock`: questions would wait for it

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        model: str | Path | Backbone | None = None,
        adapter: str | Path | None = None,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
        selector: SelectorName | None = None,
        passage_tokens: int | Literal["auto"] | None = "auto",
        prompt: PromptName | PromptForm | None = None,
        layout: Layout | None = None,
        refine_steps: int | None = None,
        min_fidelity: float | None = None,
        storage: StorageName | None = None,
        keep_text: bool | None = None,
        dtype: DtypeName = "auto",
        device: str = "auto",
        collection: str = "default",
        catalog: str | None = None,
        blobs: str | None = None,
        tier_size_bytes: int | None = None,
        create: bool = True,
        load_model: bool = True,
    ) -> KVMemory:
        """Open a store, or create one.

        Settings that are not given keep the values that the store recorded at the last `add`. A new store starts with
        the defaults of `MemorySettings`.

        Args:
            path: Folder of the store.
            model: Model to use: `qwen-0.5b`, `smollm2`, a model folder, a hub id, or a `Backbone`. A new store takes
                `qwen-0.5b`, or `smollm2` if only that one is prepared, and records its choice.
            adapter: Adapter folder for that model, `shipped` (the default of `smollm2`) or `none`.
            keep_ratio: Share of the tokens kept, in (0, 1].
            keep_tokens: Number of tokens kept of each passage in every layer and head, instead of a share. It is an
                average where heads share their entries. Shorter passages are kept whole.
            max_bytes: Largest file size of a passage's cache in bytes, instead of a share. A cache that fits is kept
                whole.
            selector: Training-free selector, used without an adapter; or `combined`, an adapter and `matched`
                together, which prefills each passage twice and selects more reliably.
            passage_tokens: Length of the longest passage in tokens; None keeps documents whole.
            prompt: Prompt form: `auto`, `chat`, `brief`, `passage`, or a `PromptForm`. A `Backbone` brings its own
                form: set it there instead.
            layout: Placement of documents: `source` or `packed`.
            refine_steps: Refinement steps for the cache of every passage during `add`; 0 for none. Refined caches
                answer closer to the full cache, at the cost of hundreds of prefills. Given without `min_fidelity`, it
                clears the recorded `min_fidelity`.
            min_fidelity: KL to the full cache on held-out probes, in nats, at which refinement stops. Refinement gives
                up after 192 steps, or after `refine_steps` if that is more. Without `refine_steps` it starts with 48.
            storage: Storage type of keys and values: `auto` (as the model computes them), `float32`, `bfloat16`,
                `float16` or `int8`, which takes half the bytes of bfloat16 and is the default of `smollm2`. It applies
                to documents added from now on; one store may hold several types.
            keep_text: True to keep the texts of documents added from now on. Texts are needed to show them with an
                answer, to replace a damaged cache, for `read_from="text"`, and to `refresh` documents that are not
                files. A new store keeps none, and finds passages by hashes of their words. Unchanged documents that
                are added again gain or lose their text without being compressed again.
            dtype: Type of the model's weights and caches; `auto` takes bfloat16 where that is fast.
            device: Device of the model: `auto`, `cpu`, `cuda`, ...
            collection: Name of the collection. Tenants are collections; a lookup never leaves its own.
            catalog: URL of a PostgreSQL database, for a new store; see `Store.open`.
            blobs: URL of an object store, for a new store; see `Store.open`.
            tier_size_bytes: Size limit in bytes for local copies of an object store's blobs.
            create: True to create the store if it does not exist.
            load_model: True to load the model now, so that its errors are raised here. False loads it at first use;
                listing, checking and removing need no model.

        Raises:
            ConfigError: A setting is out of range, or two settings exclude each other.
            BudgetError: `keep_tokens` or `max_bytes` is too small for any cache of this model; the error names the
                smallest value that works.
            ModelError: The model cannot be found, loaded or used; see its subclasses.
            AdapterError: The adapter cannot be read or belongs to another model.
            StoreError: The store cannot be opened; see its subclasses.
        """
        form = prompt if isinstance(prompt, PromptForm) else None
        given = given_settings(
            model=model.name if isinstance(model, Backbone) else model,
            adapter=adapter,
            keep_ratio=keep_ratio,
            keep_tokens=keep_tokens,
            max_bytes=max_bytes,
            selector=selector,
            passage_tokens=passage_tokens,
            prompt=None if isinstance(prompt, PromptForm) else prompt,
            layout=layout,
            refine_steps=refine_steps,
            min_fidelity=min_fidelity,
            storage=storage,
            keep_text=keep_text,
        )
        backbone = model if isinstance(model, Backbone) else None
        compressor = None
        if load_model and create and not Path(path).exists():
            # Load first: a faulty model or adapter must not leave an empty store behind.
            settings = resolve_settings(given, {})
            backbone = backbone or load_backbone(settings, dtype=dtype, device=device, prompt_form=form)
            compressor = load_compressor(settings, backbone)
            settings.keep.check(compressor.fingerprint())
        store = Store.open(
            path,
            collection=collection,
            create=create,
            catalog=catalog,
            blobs=blobs,
            tier_size_bytes=tier_size_bytes,
        )
        try:
            settings = resolve_settings(given, store.settings())
            memory = cls(store, settings, dtype=dtype, device=device, backbone=backbone, prompt_form=form)
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

    def in_collection(
        self,
        name: str,
        *,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
    ) -> KVMemory:
        """Another collection of this store, with the same model.

        The collection is created if it does not exist, and closed together with this one.

        Args:
            name: Name of the collection: a tenant, a conversation.
            keep_ratio: Share of the tokens kept of documents added to it. If none of the three is given, this
                collection's setting applies.
            keep_tokens: See `open`.
            max_bytes: See `open`.
        """
        given: dict[str, Any] = given_keep(keep_ratio, keep_tokens, max_bytes)
        settings = dataclasses.replace(self.settings, **given)
        if name == self.collection and settings == self.settings:
            return self
        with self._lock:
            found = self._others.get((name, settings.keep))
            if found is None:
                found = KVMemory(self.store.in_collection(name), settings, backbone=self.backbone)
                found._compressor, found._prefix_shared = self.compressor, True
                self._others[name, settings.keep] = found
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
                self._backbone = load_backbone(
                    self.settings, dtype=self._dtype, device=self._device, prompt_form=self._prompt_form
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
                share_prefix(self.store, self._compressor.backbone)
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
        report = self.pipeline(on_progress).add(read.documents, errors=read.errors, skipped=read.skipped)
        self._remember()
        return report

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
        pipeline = self.pipeline(on_progress, keep_text=keep_text)
        with self._extend_lock:  # extending reads the document and writes it back with more passages
            report = pipeline.add_passages(document_id, texts, metadata=metadata, extend=extend, drop=drop)
        self._remember()
        return report

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
        report = self.pipeline(on_progress).refresh(encoding=encoding)
        self._remember()
        return report

    def pipeline(
        self,
        on_progress: Callable[[AddProgress], None] | None = None,
        *,
        keep_text: bool | None = None,
        writer: Executor | None = None,
    ) -> IngestPipeline:
        """The pipeline of `add`, for callers with more documents than fit into memory.

        Args:
            on_progress: Called after every passage.
            keep_text: True to keep these texts, False not to; None follows the settings.
            writer: Executor that stores caches while the next ones are compressed; None stores them at once.
        """
        return IngestPipeline(
            self.store,
            self.compressor,
            keep_ratio=self.settings.keep,
            passage_tokens=self.settings.passage_tokens,
            storage=self.settings.storage,
            keep_text=self.settings.keep_text if keep_text is None else keep_text,
            on_progress=on_progress,
            writer=writer,
        )

    def _remember(self) -> None:
        values = dataclasses.asdict(self.settings)
        if self.store.settings() != values:
            self.store.update_settings(values)

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
            CacheNotFoundError: A passage has no cache under the current settings.
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
        return self._asker.ask_batch(questions, self.document(document_id), settings=settings)

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
        return self._asker.stream(
            question, self.retrieve(question, top_k=top_k), settings=settings, read_from=read_from
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

    @property
    def reader(self) -> Reader:
        """Replies to whole conversations from referenced caches; the framework integrations are built on it."""
        return Reader(
            self.store,
            self.compressor,
            keep_ratio=self.settings.keep,
            layout=self.settings.layout,
            storage=self.settings.storage,
            store_of=lambda name: self.store.in_collection(name, create=False),
        )

    @property
    def _asker(self) -> Asker:
        return Asker(self.reader)

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
