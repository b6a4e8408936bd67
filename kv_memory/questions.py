"""The questions of a `KVMemory`: retrieval, answers, and their options."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any, Unpack

from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings
from kv_memory.errors import CacheNotFoundError
from kv_memory.generate import Answer, AnswerStream, ReadFrom, iterate_in_thread
from kv_memory.lazy_compressor import LazyCompressor
from kv_memory.query import Reader
from kv_memory.retrieval.encoder import Encoder
from kv_memory.retrieval.minilm import built_in_encoder
from kv_memory.retrieval.retriever import Hit, RetrieveOptions, Retriever
from kv_memory.settings import MemorySettings
from kv_memory.store import Store


class AskOptions(RetrieveOptions, total=False):
    """Options of a question: which passages (see `RetrieveOptions`), decoding, and the passages' form.

    `read_from="caches"` keeps the text out of the prompt; `text` puts it there, as in plain RAG, for comparison.
    """

    settings: DecodeSettings | None
    read_from: ReadFrom


class Questions:
    """The half of `KVMemory` that answers questions about the documents of a collection.

    Args:
        store: The collection.
        settings: Its settings.
        model: The model that answers.
        encoder: Encoder that was passed as an object; None for one that the settings name.
    """

    def __init__(
        self, store: Store, settings: MemorySettings, model: LazyCompressor, encoder: Encoder | None = None
    ) -> None:
        self.store = store
        self.settings = settings
        self._model = model
        self._encoder = encoder
        self._retriever = Retriever(store)

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor with its adapter, loaded on first use."""
        return self._model.load(self.store)

    @cached_property
    def encoder(self) -> Encoder | None:
        """The encoder that the settings name, or None.

        Raises:
            EncoderError: It is an object that was not passed to `open`.
            ModelNotFoundError: The built-in encoder is not prepared.
        """
        name = self.settings.encoder
        if name is None or (self._encoder is not None and self._encoder.name == name):
            return None if name is None else self._encoder
        return built_in_encoder(name)

    def retrieve(self, question: str, **options: Unpack[RetrieveOptions]) -> list[Hit]:
        """The passages that match a question best, by the retriever of the settings; options as in `RetrieveOptions`.

        Raises:
            DocumentNotFoundError: The collection has no document with one of the ids.
            ConfigError: An option is malformed, or no document has metadata of a name in the filter.
            EncoderError: The encoder is not given or fails, or passages have no vector of it.
        """
        given: dict[str, Any] = {**options}
        if given.get("top_k") is None:
            given["top_k"] = self.settings.top_k
        retriever = self.settings.retriever
        encoder = None if retriever == "bm25" else self.encoder
        return self._retriever.retrieve(question, retriever=retriever, encoder=encoder, **given)

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Answer a question from the passages that match it.

        Args:
            question: Any text.
            options: See `AskOptions`.

        Raises: those of `retrieve`, and
            CacheNotFoundError: A passage has no cache under the current model, adapter and prompt.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            CorruptCacheError: A cache is damaged, and the text that would replace it is not kept.
            TextNotKeptError: `read_from` is `text`, and the text of a passage is not kept.
            ContextWindowError: Passages, question and answer do not fit the model.
            QueueFullError: `max_batch` questions are being answered, and `max_queue` wait.
            DecodeFailedError: Decoding failed or was interrupted for the questions that were decoded together.
        """
        return self.stream(question, **options).answer

    def ask_many(
        self, questions: Sequence[str], *, document_id: str, settings: DecodeSettings | None = None
    ) -> list[Answer]:
        """Answer several questions from all passages of one document, as one batch.

        Raises:
            DocumentNotFoundError: There is no such document.
        """
        return self.reader.answer_batch(questions, self.store.document(document_id), settings=settings)

    def stream(self, question: str, **options: Unpack[AskOptions]) -> AnswerStream:
        """`ask`, piece by piece: iterate for the text, then read `.answer`. Arguments and errors as in `ask`."""
        return self._stream(question, options)

    def _stream(self, question: str, options: AskOptions, *, called_s: float | None = None) -> AnswerStream:
        """`stream`; `called_s` is `time.perf_counter()` at the call, if that was earlier, in another thread."""
        waited_s = 0.0 if called_s is None else time.perf_counter() - called_s
        passages: dict[str, Any] = dict(options)
        reply = {"settings": passages.pop("settings", None), "read_from": passages.pop("read_from", "caches")}
        hits = self.retrieve(question, **passages)
        reply["start_s"] = time.perf_counter() - waited_s  # without retrieval
        try:
            return self.reader.answer(question, hits, **reply)
        except CacheNotFoundError:  # a document may have been replaced since it was found
            if hits == (hits := self.retrieve(question, **passages)):
                raise
            return self.reader.answer(question, hits, **reply)

    async def aask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """`ask` for asyncio: questions of all tasks are decoded together; cancelling one stops it within a token."""
        stream = await asyncio.to_thread(self._stream, question, options, called_s=time.perf_counter())
        async for _ in iterate_in_thread(stream):
            pass
        return stream.answer

    async def astream(self, question: str, **options: Unpack[AskOptions]) -> AsyncIterator[str]:
        """`stream` for asyncio: every step runs in a thread, so that the model never blocks the event loop."""
        stream = await asyncio.to_thread(self._stream, question, options, called_s=time.perf_counter())
        async for piece in iterate_in_thread(stream):
            yield piece

    @cached_property
    def reader(self) -> Reader:
        """Replies to whole conversations from referenced caches; the framework integrations are built on it."""
        return Reader(self.store, self.compressor, self.settings, self._model.scheduler)
