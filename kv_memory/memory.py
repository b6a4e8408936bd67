"""KVMemory: documents in, distilled caches on disk, answers out. The facade over everything else."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
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
from kv_memory.ingest.pipeline import AddProgress, AddReport, Intake
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
    """A collection of documents, each read once and kept as distilled caches; made with `open`.

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
        self._extend_lock = threading.Lock()  # not `_lock`, for which questions would wait

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
        """Open a store, or make one.

        What is not given is as the store remembers it from the last `add`; a new store starts with the defaults of
        `MemorySettings`.

        Args:
            path: The store's folder.
            model: `qwen-0.5b`, `smollm2`, a model folder, a hub id, or a `Backbone`. A new store takes `qwen-0.5b`, or
                `smollm2` where only that is prepared, and remembers which.
            adapter: An adapter folder for that model, `shipped` (the default of `smollm2`) or `none`.
            keep_ratio: Share of the tokens kept, in (0, 1].
            keep_tokens: In its place, how many tokens are kept of each passage, in every layer and head (on average,
                where heads share them). Shorter passages are kept whole.
            max_bytes: In its place, the largest file of a passage's cache, in bytes. What fits is kept whole.
            selector: The training-free selector used without an adapter; or `combined`, an adapter and `matched`
                together, which reads each passage twice and keeps what matters more surely.
            passage_tokens: Longest passage; None keeps documents whole.
            prompt: `auto`, `chat`, `brief`, `passage`, or a `PromptForm` (with a `Backbone` give it the form instead).
            layout: `source` or `packed`.
            refine_steps: Refine every passage's cache by so many steps while adding, 0 for not at all: closer answers
                for hundreds of prefills more. Named alone, it forgets a `min_fidelity` of before.
            min_fidelity: Refine further until the KL to the full cache on held-out probes is at most this, in nats, or
                192 steps are done; without `refine_steps` it begins with 48.
            storage: How keys and values are stored: `auto` (as the model computes them), `float32`, `bfloat16`,
                `float16` or `int8`, half of bfloat16 and the default of `smollm2`. For what is added from now on; one
                store may hold several.
            keep_text: Keep the texts of what is added from now on: for showing them with an answer, for reading them in
                the place of a damaged cache, for `read_from="text"`, and for `refresh` of what was no file. A new store
                keeps none: passages are found by hashes of their words. Documents that are added again unchanged get
                or lose their text without being compressed.
            dtype: Of the model and its caches; `auto` takes bfloat16 where that is fast.
            device: `auto`, `cpu`, `cuda`, ...
            collection: Tenants are collections; every lookup stays in its own.
            catalog: For a new store: the URL of a PostgreSQL database, see `Store.open`.
            blobs: For a new store: the URL of an object store, see `Store.open`.
            tier_size_bytes: What copies of an object store's blobs may take in the folder.
            create: Make the store if there is none.
            load_model: Load the model now, so that what is wrong with it shows now. False leaves that to the first
                use; listing, checking and removing need no model.

        Raises:
            ConfigError: A setting is out of range, or two exclude each other.
            BudgetError: `keep_tokens` or `max_bytes` is too small for any cache of this model; names what works.
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
            # What is wrong with model or adapter must not leave an empty store behind.
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
        """Load model and adapter and prefill the shared prefix now, instead of at the first use."""
        _ = self.compressor

    def in_collection(
        self,
        name: str,
        *,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
    ) -> KVMemory:
        """Another collection of this store, read by the same model; made if there is none, closed with this one.

        Args:
            name: Of the collection: a tenant, a conversation.
            keep_ratio: For what is added to it. Without this and the next two it is as in this collection.
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
        """Close the store. The model is freed with the object."""
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
        """The store's folder."""
        return self.store.path

    @property
    def collection(self) -> str:
        """The collection's name."""
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
        """Reads documents; carries the adapter, loaded on first use."""
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
        """Read documents, distil them, store them. What is there unchanged costs nothing; what changed is replaced.

        Args:
            documents: A text (`str`), a file or folder (`Path`), a `Document`, `(id, text)`, `(id, text, metadata)`,
                or an iterable of these. The id of a file is its absolute path.
            encoding: Of text files.
            on_error: `skip` leaves bad documents out and reports them; `raise` stops before any work.
            on_progress: Called after every passage.

        Raises:
            DocumentError: A document cannot be read; see its subclasses.
            StoreError: It cannot be written; what was there before is untouched.
        """
        read = read_documents(documents, encoding=encoding, on_error=on_error)
        report = self._intake(on_progress).add(read.documents, errors=read.errors, skipped=read.skipped)
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
        """Add a document that is cut already, e.g. by a framework's node parser. What is there costs nothing.

        Args:
            document_id: Replaces the document of this id.
            texts: Its passages, each the exact text that will be asked for.
            metadata: What JSON can hold; if None there is none, or with `extend` that which it has.
            extend: Keep the passages it has, and add those that are new. One process at a time may extend a document.
            drop: Keys (`reader.key_of`) of passages that it does not keep, with `extend`; `texts` may then be empty.
            keep_text: Keep these texts; as the settings say if None.
            on_progress: Called after every passage.

        Raises:
            ConfigError: `texts` is no list of texts, or JSON cannot hold the metadata.
            DocumentError: There is no text, or one is blank or binary.
            StoreError: It cannot be written.
        """
        intake = self._intake(on_progress, keep_text=keep_text)
        with self._extend_lock:  # it reads what there is, and writes it back with more
            report = intake.add_passages(document_id, texts, metadata=metadata, extend=extend, drop=drop)
        self._remember()
        return report

    def refresh(
        self, *, encoding: str = "utf-8", on_progress: Callable[[AddProgress], None] | None = None
    ) -> AddReport:
        """Compress every stored passage that has no cache under the present settings.

        From its text, or where that is not kept from the file that its document came from. Documents whose file is gone
        or has changed, and those that were no file, are among the report's `errors`; they stay as they are.

        Args:
            encoding: Of text files that are read again.
            on_progress: Called after every passage.
        """
        report = self._intake(on_progress).refresh(encoding=encoding)
        self._remember()
        return report

    def _intake(self, on_progress: Callable[[AddProgress], None] | None, *, keep_text: bool | None = None) -> Intake:
        return Intake(
            self.store,
            self.compressor,
            keep_ratio=self.settings.keep,
            passage_tokens=self.settings.passage_tokens,
            storage=self.settings.storage,
            keep_text=self.settings.keep_text if keep_text is None else keep_text,
            on_progress=on_progress,
        )

    def _remember(self) -> None:
        values = dataclasses.asdict(self.settings)
        if self.store.settings() != values:
            self.store.update_settings(values)

    def remove(self, document_id: str | Path) -> None:
        """Delete a document with its passages and caches.

        Args:
            document_id: Its id, or the path of a file that was added.

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
        """The passages that fit a question best, by BM25.

        Args:
            question: Any text.
            top_k: How many at most; 1 for `smollm2` and 3 for others if None.
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
        """Answer a question from the passages that fit it.

        Args:
            question: Any text.
            top_k: See `retrieve`.
            settings: How to decode.
            read_from: `caches`: the text does not enter the prompt. `text`: it does, as in plain RAG, to compare.

        Raises:
            CacheNotFoundError: A passage has no cache under the present settings.
            FingerprintMismatchError: Its cache was made by another model, adapter or prompt.
            CorruptCacheError: Its cache is damaged, and its text, which would be read instead, is not kept.
            TextNotKeptError: `read_from` is `text`, and the text of a passage is not kept.
            ContextWindowError: Passages, question and answer do not fit the model.
        """
        return self.stream(question, top_k=top_k, settings=settings, read_from=read_from).answer

    def ask_many(
        self, questions: Sequence[str], *, document_id: str, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions about one document as one batch; all its passages are read.

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
        """`ask`, piece by piece: iterate for text, then read `.answer`. Arguments and errors as in `ask`."""
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
        """`stream` for asyncio: every step runs in a thread, so that the event loop never waits for the model."""
        stream = await asyncio.to_thread(self.stream, question, top_k=top_k, settings=settings, read_from=read_from)
        async for piece in iterate_in_thread(stream):
            yield piece

    @property
    def reader(self) -> Reader:
        """Replies to whole conversations, from caches that are named: what the frameworks' adapters stand on."""
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
        """Compare catalog and blobs, verify every blob; damaged ones are quarantined."""
        return self.store.check()

    def gc(self) -> GcReport:
        """Delete what nothing refers to any more."""
        return self.store.gc()
