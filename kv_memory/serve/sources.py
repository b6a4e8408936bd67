"""The documents of a request: from its model's name and its field `kv_memory` to references to caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_memory.config import DecodeSettings
from kv_memory.errors import CacheNotFoundError
from kv_memory.generate import Answer, AnswerStream, Turn
from kv_memory.memory import KVMemory
from kv_memory.query import Reference, texts_of
from kv_memory.retrieval.retriever import Hit
from kv_memory.serve.auth import Access
from kv_memory.serve.errors import ApiError
from kv_memory.serve.schemas import Choice

HIDDEN = "conversation:"  # collections of `Conversation`, which hold chats of single users


def model_name(memory: KVMemory) -> str:
    """The name of the model for clients; that of a folder is its last part, as its path is nobody's business."""
    name = memory.settings.model
    return Path(name).name if Path(name).is_absolute() else name


def collections_of(memory: KVMemory, access: Access) -> list[str]:
    """The names of the collections that a request may use."""
    names = memory.store.collections()
    return [name for name in names if access.may_use(name) and not name.startswith(HIDDEN)]


def existing(memory: KVMemory, collection: str) -> KVMemory:
    """A collection of the store; a request that only looks must not create one.

    Raises:
        ApiError: There is no such collection.
    """
    if collection == memory.collection:
        return memory
    if collection not in memory.store.collections():
        raise ApiError(404, f"no collection {collection!r}; add a document to create it", code="collection_not_found")
    return memory.in_collection(collection)


@dataclass(frozen=True)
class Target:
    """What a request asks: a collection with a choice of its documents, or without any the model alone."""

    memory: KVMemory
    choice: Choice | None

    @classmethod
    def of(cls, memory: KVMemory, model: str, choice: Choice | None, access: Access) -> Target:
        """The target of a request.

        The model `MODEL` alone uses no documents, unless `kv_memory` is given. `MODEL/COLLECTION` answers from a
        collection, for clients that can only choose a model.

        Raises:
            ApiError: There is no such model or collection, the two name different collections, or the access does not
                include it.
        """
        name = model_name(memory)
        if model != name and not model.startswith(f"{name}/"):
            raise ApiError(404, f"no model {model!r}; GET /v1/models lists them", code="model_not_found", param="model")
        named = model.removeprefix(name).removeprefix("/") or None
        if named is None and choice is None:
            return cls(memory, None)
        choice = choice or Choice()
        if named is not None and choice.collection not in {None, named}:
            raise ApiError(
                400,
                f"the model names the collection {named!r}, kv_memory.collection {choice.collection!r}",
                code="invalid_value",
                param="kv_memory.collection",
            )
        collection = named or choice.collection or memory.collection
        access.check(collection)
        return cls(existing(memory, collection), choice)

    def start(self, turns: Sequence[Turn], settings: DecodeSettings) -> AnswerStream:
        """Start the answer. Errors as in `KVMemory.ask` and `Reader.reply`."""
        if self.choice is None:
            return self.memory.reader.reply_alone(turns, settings=settings)
        hits = self._find(turns)
        try:
            return self._reply(turns, hits, settings)
        except CacheNotFoundError:  # a document may have been replaced since it was found
            if hits == (hits := self._find(turns)):
                raise
            return self._reply(turns, hits, settings)

    def _reply(self, turns: Sequence[Turn], hits: Sequence[Hit], settings: DecodeSettings) -> AnswerStream:
        assert self.choice is not None
        read_from = self.choice.read_from
        so_far = Answer(sources=tuple(hits), read_from=read_from)
        references = [Reference(key=hit.text_sha256) for hit in hits] if read_from == "caches" else ()
        texts = texts_of(hits) if read_from == "text" else ()
        return self.memory.reader.reply(turns, references, texts=texts, settings=settings, so_far=so_far)

    def _find(self, turns: Sequence[Turn]) -> list[Hit]:
        """The passages to answer from; none is fine: the model then replies without."""
        assert self.choice is not None
        choice, ids = self.choice, self.choice.document_ids
        if ids is not None and choice.top_k is None:
            return [hit for id_ in dict.fromkeys(ids) for hit in self._whole(id_)]
        options: dict[str, Any] = {"document_ids": ids, "filter": choice.filter, "min_score": choice.min_score}
        asked = [turn.text for turn in turns if turn.role == "user"]
        # "And on Sundays?" may share no word with any passage; with what was asked before, it does.
        for question in dict.fromkeys((asked[-1], "\n".join(asked))) if asked else ():
            if hits := self.memory.retrieve(question, top_k=choice.top_k, **options):
                return hits
        return []

    def _whole(self, document_id: str) -> list[Hit]:
        record = self.memory.document(document_id)
        return [
            Hit(
                document_id=record.id,
                ordinal=ordinal,
                score=1.0,
                text=passage.text,
                text_sha256=passage.text_sha256,
                metadata=record.metadata,
            )
            for ordinal, passage in enumerate(record.passages)
        ]
