"""What the tests of the LlamaIndex integration share: a retriever that makes sense, and what was sent to the model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from pydantic import Field

from kv_memory import DecodeSettings, KVMemory, Reference, Turn
from kv_memory.integrations.llama_index import KVMemoryLLM, KVMemoryQueryEngine, KVMemoryVectorStore
from kv_memory.query import key_of
from tests.memories import FERRY, LAMP

WALRUS = "The walrus sleeps on the ice all day."


def text_node(id_: str, text: str, **changes: Any) -> TextNode:
    """A node of the document `id_`, as a parser makes them."""
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=id_)}
    return TextNode(id_=f"{id_}-node", text=text, relationships=source, **changes)


def two_nodes() -> list[TextNode]:
    """Nodes of the texts that the `memory` fixture holds."""
    return [text_node("ferry", FERRY), text_node("lamp", LAMP)]


class WordRetriever(BaseRetriever):
    """Nodes by the number of words they share with the question. Hands out the very nodes it was given."""

    def __init__(self, nodes: Sequence[BaseNode], *, top_k: int = 1, **options: Any) -> None:
        self.nodes = list(nodes)
        self.top_k = top_k
        super().__init__(**options)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = _words(query_bundle.query_str)
        found = [NodeWithScore(node=node, score=float(len(asked & _words(node.get_content())))) for node in self.nodes]
        found.sort(key=lambda item: -(item.score or 0))
        return [item for item in found if item.score][: self.top_k]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - {"the", "a", "did", "is", "to", "of"}


class _Recorder(BaseEventHandler):
    events: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)


@contextmanager
def recorded_events() -> Iterator[list[Any]]:
    """LlamaIndex's instrumentation events while the block runs."""
    handler, root = _Recorder(), get_dispatcher()
    root.add_event_handler(handler)
    try:
        yield handler.events
    finally:
        root.event_handlers = [other for other in root.event_handlers if other is not handler]


def names_of(events: Sequence[Any]) -> list[str]:
    """Class names; of what comes in a row, such as pieces of a stream, the first."""
    return [name for name, _ in groupby(type(event).__name__ for event in events)]


def sent_messages(events: Sequence[Any]) -> list[list[ChatMessage]]:
    """The messages of every chat with an LLM."""
    return [list(event.messages) for event in events if type(event) is LLMChatStartEvent]


def sent_keys(events: Sequence[Any]) -> list[list[str]]:
    """The references of every chat with an LLM."""
    return [
        [key for message in messages for key in message.additional_kwargs.get("kv_ids", [])]
        for messages in sent_messages(events)
    ]


@contextmanager
def recorded_texts(backbone: Any) -> Iterator[list[str]]:
    """What was prefilled while the block ran, text by text; tokens that were decoded are left out."""
    texts: list[str] = []

    def record(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        ids, packed = kwargs["input_ids"][0], kwargs["kv_memory"].packed
        parts = [ids[row.tokens] for row in packed] or [ids]  # answers that are decoded together share a pass
        texts.extend(backbone.tokenizer.decode(part) for part in parts if len(part) > 1)

    handle = backbone.decoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield texts
    finally:
        handle.remove()


def prompt_of(backbone: Any, *turns: str) -> str:
    """What is prefilled for turns of user and assistant, beginning with the user's, behind documents."""
    form, text = backbone.prompt, ""
    for index, turn in enumerate(turns):
        text += form.question(turn) if index % 2 == 0 else form.answer_before + turn + form.answer_after
    return text


def keys_of(*texts: str) -> list[str]:
    """References as strings."""
    return [key_of(text) for text in texts]


def splitter() -> SentenceSplitter:
    """A splitter whose node ids are random, as they are by default; the samples are shorter than its chunks."""
    return SentenceSplitter(chunk_size=64, chunk_overlap=0)


def documents() -> list[Document]:
    """The texts that the `memory` fixture holds, as LlamaIndex's documents under the same ids."""
    return [Document(text=FERRY, id_="ferry"), Document(text=LAMP, id_="lamp")]


def index_over(memory: Any, docs: Sequence[Document] = (), **options: Any) -> tuple[VectorStoreIndex, Any]:
    """A vector index over a `KVMemoryVectorStore`, and that store. Its embeddings are all alike."""
    store = KVMemoryVectorStore(SimpleVectorStore(), memory, **options)
    index = VectorStoreIndex.from_documents(
        list(docs),
        embed_model=MockEmbedding(embed_dim=4),
        transformations=[splitter()],
        storage_context=StorageContext.from_defaults(vector_store=store),
    )
    return index, store


def sync_run(pipeline: IngestionPipeline, docs: Sequence[Document], **options: Any) -> list[Any]:
    return list(pipeline.run(documents=list(docs), **options))


def async_run(pipeline: IngestionPipeline, docs: Sequence[Document], **options: Any) -> list[Any]:
    return list(asyncio.run(pipeline.arun(documents=list(docs), **options)))


Run = Callable[..., list[Any]]


def texts_in(memory: KVMemory) -> dict[str, list[str]]:
    """The passages of every document; each has a cache, and there are no others."""
    found = {document.id: [p.text for p in memory.document(document.id).passages] for document in memory.documents()}
    assert {info.text_sha256 for info in memory.store.caches()} == {
        key_of(t) for texts in found.values() for t in texts
    }
    return found


def engine_over(llm: KVMemoryLLM, *, top_k: int = 1, **options: Any) -> KVMemoryQueryEngine:
    return KVMemoryQueryEngine.from_defaults(WordRetriever(two_nodes(), top_k=top_k), llm=llm, **options)


def expected(memory: KVMemory, question: str, *texts: str, n: int = 6) -> str:
    """What the reader replies."""
    references = [Reference(key=key_of(text)) for text in texts]
    reply = memory.reader.reply([Turn("user", question)], references, settings=DecodeSettings(max_new_tokens=n)).answer
    return reply.text.strip()
