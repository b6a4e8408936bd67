"""KVMemory, the facade: documents in, distilled caches on disk, answers out."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakValueDictionary

from kv_memory.config import DtypeName, WeightsName, check_choice, check_names
from kv_memory.documents import DocumentLike, read_documents
from kv_memory.documents.loaders import file_id
from kv_memory.generate.scheduler import MAX_BATCH, MAX_QUEUE
from kv_memory.ingest.pipeline import AddPlan, AddProgress, AddReport, IngestPipeline
from kv_memory.lazy_compressor import LazyCompressor
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm
from kv_memory.questions import Questions
from kv_memory.retrieval.encoder import Encoder, as_encoder
from kv_memory.settings import KEEP_NAMES, MemorySettings
from kv_memory.store import CheckReport, DocumentRecord, DocumentSummary, GcReport, Store, StoreStats


class KVMemory(Questions):
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
        self, store: Store, settings: MemorySettings, model: LazyCompressor, encoder: Encoder | None = None
    ) -> None:
        super().__init__(store, settings, model, encoder)
        # Other collections: those in use, and the latest, whose search index the next request is likely to need.
        self._others: WeakValueDictionary[tuple[str, MemorySettings], KVMemory] = WeakValueDictionary()
        self._latest: deque[KVMemory] = deque(maxlen=64)
        self._lock = threading.Lock()
        self._extend_lock = threading.Lock()  # not `_lock`: other collections would wait for it

    @classmethod
    def open(
        cls,
        path: Path | str,
        settings: MemorySettings | None = None,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        weights: WeightsName = "plain",
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        collection: str = "default",
        catalog: str | None = None,
        blobs: str | None = None,
        tier_size_bytes: int | None = None,
        hot_size_bytes: int | None = None,
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
            weights: `int8` takes about 0.6 of the time a token on a CPU, see `Backbone.load`. It is not recorded:
                caches are the same with either.
            max_batch: Largest number of questions, of all threads and tasks, decoded together.
            max_queue: Largest number of further questions that wait; one more raises `QueueFullError`.
            collection: Name of the collection. Tenants are collections; a lookup never leaves its own.
            catalog: URL of a PostgreSQL database, for a new store; see `Store.open`.
            blobs: URL of an object store, for a new store; see `Store.open`.
            tier_size_bytes: Size limit in bytes for local copies of an object store's blobs.
            hot_size_bytes: Size limit in bytes of caches that stay composed in memory for further questions; 0 keeps
                none. None means 512 MiB, or a sixteenth of the machine's memory if that is less.
            create: True to create the store if it does not exist.
            load_model: True to load the model now, so that its errors are raised here. False loads it at first use;
                listing, checking and removing need no model.
            changes: Single settings by name, e.g. `keep_ratio=1/8`; see `MemorySettings.resolve`. `model` may also be a
                `Backbone`, and `prompt` a `PromptForm`, unless a `Backbone` brings its own. `encoder` may be any object
                that `kv_memory.retrieval.encoder.as_encoder` takes, such as an embedding of LlamaIndex or LangChain;
                its name is recorded, so pass it again to add documents or to retrieve by it.

        Raises:
            ConfigError: A name is unknown, a setting is out of range, or two settings exclude each other; `keep_tokens`
                or `max_bytes` is too small for any cache of this model; the error names the smallest value that works.
            ModelError: The model cannot be found, loaded or used; see its subclasses.
            AdapterError: The adapter cannot be read or belongs to another model.
            StoreError: The store cannot be opened; see its subclasses.
        """
        check_names(changes, {*MemorySettings.__dataclass_fields__, *(cls.open.__kwdefaults__ or ())})
        given = {} if settings is None else dataclasses.asdict(settings)
        check_choice(weights, WeightsName, where="weights")
        load: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights}
        load |= {"max_batch": max_batch, "max_queue": max_queue, "hot_size_bytes": hot_size_bytes}
        if isinstance(changes.get("model"), Backbone):
            load["backbone"] = changes["model"]
            changes["model"] = changes["model"].name
        if isinstance(changes.get("prompt"), PromptForm):
            load["prompt_form"] = changes.pop("prompt")
        encoder = None
        if not isinstance(changes.get("encoder"), str | None):
            encoder = as_encoder(changes["encoder"])
            changes["encoder"] = encoder.name
        model = None
        if load_model and create and not Path(path).exists():
            # Load first: a faulty model or adapter must not leave an empty store behind.
            resolved = MemorySettings.resolve(given, **changes)
            model = LazyCompressor(resolved, **load)
            resolved.keep.ratio_for(1, model.load().fingerprint())  # raises if no document fits the budget
        place: dict[str, Any] = {"catalog": catalog, "blobs": blobs, "tier_size_bytes": tier_size_bytes}
        store = Store.open(path, collection=collection, create=create, **place)
        try:
            resolved = MemorySettings.resolve(given or store.settings(), **changes)
            memory = cls(store, resolved, model or LazyCompressor(resolved, **load), encoder)
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
                found = KVMemory(self.store.in_collection(name), settings, self._model, self._encoder)
                self._others[name, settings] = found
            self._latest.append(found)
            return found

    def close(self) -> None:
        """Close the store; the model is freed with the object."""
        for other in list(self._others.values()):
            other.close()
        self.store.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also in another process, open the same store with the same settings; each loads the model itself."""
        options = {**self._model.options, "collection": self.collection, "create": False, "load_model": False}
        options |= {} if self._encoder is None else {"encoder": self._encoder}
        return partial(KVMemory.open, self.path, self.settings, **options), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        return self._model.backbone

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
        return pipeline.add(read.documents, errors=read.errors, skipped=read.skipped)

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
            return pipeline.add_passages(document_id, texts, metadata=metadata, extend=extend, drop=drop)

    def refresh(
        self, *, encoding: str = "utf-8", on_progress: Callable[[AddProgress], None] | None = None
    ) -> AddReport:
        """Make the caches and vectors that stored passages lack under the current settings.

        The text comes from the store or, if it is not kept there, from the document's file. Documents whose file is
        gone or has changed, and documents without a text that are not files, are listed in the report's `errors` and
        stay unchanged. Arguments as in `add`.
        """
        return self.pipeline(on_progress=on_progress).refresh(encoding=encoding)

    def pipeline(
        self,
        *,
        on_plan: Callable[[AddPlan], None] | None = None,
        on_progress: Callable[[AddProgress], None] | None = None,
        keep_text: bool | None = None,
        writer: Executor | None = None,
    ) -> IngestPipeline:
        """The pipeline behind `add`, for callers with too many documents to hold in memory.

        Arguments as in `IngestPipeline`.
        """
        options: dict[str, Any] = {"on_plan": on_plan, "on_progress": on_progress}
        options |= {"keep_text": keep_text, "writer": writer}
        options["encoder"] = self.encoder
        return IngestPipeline(self.store, self.compressor, self.settings, **options)

    def remove(self, document_id: str | Path) -> None:
        """Delete a document with its passages and caches, by its id or by the path of a file that was added.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        id_ = file_id(document_id) if isinstance(document_id, Path) else document_id
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

    def stats(self) -> StoreStats:
        """Counts and sizes of the collection."""
        return self.store.stats()

    def check(self) -> CheckReport:
        """Compare catalog and blobs, and verify every blob; damaged blobs are quarantined."""
        return self.store.check()

    def gc(self) -> GcReport:
        """Delete caches and blobs that nothing refers to any more."""
        return self.store.gc()
