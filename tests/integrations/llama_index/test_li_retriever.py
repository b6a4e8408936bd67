from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, get_leaf_nodes
from llama_index.core.retrievers import AutoMergingRetriever, BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import ImageNode, IndexNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters

from kv_memory import CacheNotFoundError, ConfigError, FingerprintMismatchError, KVMemory, TextNotKeptError
from kv_memory.errors import EmptyDocumentError, UnsupportedRequestError
from kv_memory.integrations.llama_index import (
    KVMemoryLLM,
    KVMemoryQueryEngine,
    KVMemoryRetriever,
    KVMemoryStoreRetriever,
)
from kv_memory.query import key_of
from tests.integrations.llama_index.li_samples import (
    WALRUS,
    WordRetriever,
    documents,
    names_of,
    recorded_events,
    splitter,
    text_node,
    two_nodes,
)
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, open_memory
from tests.reference import recorded_inputs

WALRUS_QUESTION = "Where does the walrus sleep, and when does the ferry leave?"


def sync(retriever: BaseRetriever, question: str) -> list[NodeWithScore]:
    return retriever.retrieve(question)


def in_async(retriever: BaseRetriever, question: str) -> list[NodeWithScore]:
    return asyncio.run(retriever.aretrieve(question))


BOTH = pytest.mark.parametrize("retrieve", [sync, in_async])
Retrieve = Callable[[BaseRetriever, str], list[NodeWithScore]]


def marks(found: list[NodeWithScore]) -> dict[str, str | None]:
    """The mark of every node, by the first word of its text that tells them apart."""
    return {item.node.get_content().split()[1]: item.node.metadata.get("kv_id") for item in found}


def vector_index(*extra: Document) -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(
        [*documents(), *extra], embed_model=MockEmbedding(embed_dim=4), transformations=[splitter()]
    )


# -- what it wraps -----------------------------------------------------------------------------------------------------


@BOTH
def test_a_retriever_of_ones_own(memory: KVMemory, retrieve: Retrieve) -> None:
    inner = WordRetriever(two_nodes(), top_k=2)
    found = retrieve(KVMemoryRetriever(inner, memory), "ferry lamp lighthouse")
    assert marks(found) == {"ferry": key_of(FERRY), "lighthouse": key_of(LAMP)}
    assert [(item.node.node_id, item.score) for item in found] == [("lamp-node", 2), ("ferry-node", 1)]


@BOTH
def test_a_vector_retriever(memory: KVMemory, retrieve: Retrieve) -> None:
    inner = vector_index().as_retriever(similarity_top_k=2)
    assert marks(retrieve(KVMemoryRetriever(inner, memory), "lamp")) == {
        "ferry": key_of(FERRY),
        "lighthouse": key_of(LAMP),
    }


@BOTH
def test_a_fusion_retriever(memory: KVMemory, llm: KVMemoryLLM, retrieve: Retrieve) -> None:
    vectors = vector_index().as_retriever(similarity_top_k=2)
    inner = QueryFusionRetriever(
        [vectors, WordRetriever(two_nodes())], llm=llm, num_queries=1, similarity_top_k=2, use_async=False
    )
    assert marks(retrieve(KVMemoryRetriever(inner, memory), LAMP_QUESTION)) == {
        "ferry": key_of(FERRY),
        "lighthouse": key_of(LAMP),
    }


@BOTH
def test_an_auto_merging_retriever(memory: KVMemory, retrieve: Retrieve) -> None:
    text = f"{FERRY} {LAMP} {WALRUS}"
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[128, 16], chunk_overlap=0)
    nodes = parser.get_nodes_from_documents([Document(text=text, id_="all")])
    leaves = get_leaf_nodes(nodes)
    assert len(nodes) == len(leaves) + 1 > 2
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    inner = AutoMergingRetriever(WordRetriever(leaves, top_k=len(leaves)), storage)
    found = retrieve(KVMemoryRetriever(inner, memory, on_missing="compress"), text)
    assert [item.node.get_content() for item in found] == [text]  # merged: the parent's cache, not the leaves'
    assert marks(found) == {"ferry": key_of(text)}
    assert memory.reader.has(text)


@BOTH
def test_an_index_node_stands_for_another(memory: KVMemory, retrieve: Retrieve) -> None:
    ferry = two_nodes()[0]
    named = IndexNode(text="About a ferry.", index_id="ferry")
    for inner in (
        WordRetriever([IndexNode(text="About a ferry.", index_id="ferry", obj=ferry)]),
        WordRetriever([named], object_map={"ferry": ferry}),
    ):
        assert marks(retrieve(KVMemoryRetriever(inner, memory), FERRY_QUESTION)) == {"ferry": key_of(FERRY)}


@BOTH
def test_events_equal_those_of_the_wrapped_retriever(memory: KVMemory, retrieve: Retrieve) -> None:
    inner = WordRetriever(two_nodes())
    names = []
    for retriever in (inner, KVMemoryRetriever(inner, memory)):
        with recorded_events() as events:
            retrieve(retriever, FERRY_QUESTION)
        names.append(names_of(events))
    assert names[0] == names[1] != []


@BOTH
def test_the_store_retriever_finds_passages_of_the_memory(memory: KVMemory, retrieve: Retrieve) -> None:
    (found,) = retrieve(KVMemoryStoreRetriever(memory, similarity_top_k=1), LAMP_QUESTION)
    assert (found.node.ref_doc_id, found.node.get_content()) == ("lamp", LAMP)
    assert found.node.get_content(metadata_mode=MetadataMode.LLM) == LAMP  # `year` is for filters
    assert found.node.metadata == {"year": 1921, "kv_id": key_of(LAMP)}
    assert len(retrieve(KVMemoryStoreRetriever(memory), "the ferry and the lamp")) == 2


def test_the_stores_retriever_filters_documents(memory: KVMemory) -> None:
    def found(**options: Any) -> set[str]:
        own = KVMemoryStoreRetriever(memory, **options)
        return {item.node.ref_doc_id for item in own.retrieve("the ferry and the lamp")}

    memory.add([("old", "The lamp of the ferry.", {"year": 1900})])
    year = MetadataFilter(key="year", value=1900)
    assert found(filters=MetadataFilters(filters=[year])) == {"old"}
    some = MetadataFilter(key="year", value=[1900, 1950], operator=FilterOperator.IN)
    assert found(filters=MetadataFilters(filters=[some])) == {"old"}
    assert found(doc_ids=["ferry"]) == {"ferry"}
    assert found(min_score=1000) == set()
    above = MetadataFilter(key="year", value=1900, operator=FilterOperator.GT)
    for filters in (MetadataFilters(filters=[above]), MetadataFilters(filters=[year], condition="or")):
        with pytest.raises(UnsupportedRequestError, match="filters"):
            KVMemoryStoreRetriever(memory, filters=filters)


@BOTH
def test_passages_without_texts_are_answered_from_their_caches(
    bare: KVMemory, memory: KVMemory, retrieve: Retrieve
) -> None:
    retriever = KVMemoryStoreRetriever(bare, similarity_top_k=1)
    (found,) = retrieve(retriever, LAMP_QUESTION)
    assert (found.node.ref_doc_id, found.node.get_content()) == ("lamp", "")
    assert found.node.metadata == {"year": 1921, "kv_id": key_of(LAMP)}
    for mode in MetadataMode:  # metadata alone is never read in the place of a passage
        for on_missing in ("text", "compress", "skip", "raise"):
            around = KVMemoryRetriever(retriever, bare, on_missing=on_missing, metadata_mode=mode)
            assert [item.node.metadata["kv_id"] for item in retrieve(around, LAMP_QUESTION)] == [key_of(LAMP)]
    answers = []
    for kept in (bare, memory):
        own = KVMemoryStoreRetriever(kept, similarity_top_k=1)
        engine = KVMemoryQueryEngine.from_defaults(own, llm=KVMemoryLLM(kept, max_tokens=4))
        answers.append(str(engine.query(LAMP_QUESTION)))
    assert answers[0] == answers[1]


def test_passages_with_neither_text_nor_cache_fail_or_are_skipped(bare: KVMemory) -> None:
    for cache in list(bare.store.caches()):
        bare.store.delete(cache.text_sha256)
    own = KVMemoryStoreRetriever(bare, similarity_top_k=1)
    for on_missing in ("text", "compress"):
        with pytest.raises(TextNotKeptError, match="--stale"):
            KVMemoryRetriever(own, bare, on_missing=on_missing).retrieve(LAMP_QUESTION)
    assert KVMemoryRetriever(own, bare, on_missing="skip").retrieve(LAMP_QUESTION) == []


# -- the mark ----------------------------------------------------------------------------------------------------------


@BOTH
def test_only_copies_are_marked(memory: KVMemory, retrieve: Retrieve) -> None:
    index = vector_index()
    nodes = {node.node_id: node for node in index.docstore.docs.values()}
    before = {id_: (node.model_dump(), node.hash) for id_, node in nodes.items()}
    handed_out = WordRetriever(list(nodes.values()), top_k=2)
    for inner in (handed_out, index.as_retriever(similarity_top_k=2)):
        found = retrieve(KVMemoryRetriever(inner, memory), "ferry lamp")
        assert len(found) == 2 and all(item.node.metadata["kv_id"] for item in found)
    assert {id_: (node.model_dump(), node.hash) for id_, node in nodes.items()} == before


@BOTH
def test_the_mark_does_not_change_the_text(memory: KVMemory, retrieve: Retrieve) -> None:
    node = text_node("ferry", FERRY, metadata={"file": "a.md"})
    retriever = KVMemoryRetriever(WordRetriever([node]), memory, on_missing="compress")
    (found,) = retrieve(retriever, FERRY_QUESTION)
    for mode in (MetadataMode.LLM, MetadataMode.EMBED, MetadataMode.NONE):
        assert found.node.get_content(metadata_mode=mode) == node.get_content(metadata_mode=mode)
    assert found.node.metadata == {"file": "a.md", "kv_id": key_of(f"file: a.md\n\n{FERRY}")}
    # What is found again, or goes through two of them, has the same text, hence the same mark.
    again = KVMemoryRetriever(WordRetriever([found.node]), memory, on_missing="raise")
    assert retrieve(again, FERRY_QUESTION)[0].node.metadata == found.node.metadata


def test_metadata_mode_decides_which_metadata_the_text_includes(memory: KVMemory) -> None:
    node = text_node("ferry", FERRY, metadata={"file": "a.md", "hidden": 1}, excluded_llm_metadata_keys=["hidden"])
    texts = {
        MetadataMode.NONE: FERRY,
        MetadataMode.LLM: f"file: a.md\n\n{FERRY}",
        MetadataMode.EMBED: f"file: a.md\nhidden: 1\n\n{FERRY}",
    }
    for mode, text in texts.items():
        retriever = KVMemoryRetriever(WordRetriever([node]), memory, on_missing="compress", metadata_mode=mode)
        (found,) = retriever.retrieve(FERRY_QUESTION)
        assert found.node.metadata["kv_id"] == key_of(text) and memory.reader.has(text)


# -- without a cache ---------------------------------------------------------------------------------------------------


def walrus_and_ferry() -> WordRetriever:
    return WordRetriever([text_node("walrus", WALRUS), *two_nodes()[:1]], top_k=2)


@BOTH
def test_text_leaves_the_node_unmarked(memory: KVMemory, wide: Any, retrieve: Retrieve) -> None:
    with recorded_inputs(wide) as inputs:
        found = retrieve(KVMemoryRetriever(walrus_and_ferry(), memory), WALRUS_QUESTION)
    assert marks(found) == {"ferry": key_of(FERRY), "walrus": None}
    assert inputs == [] and not memory.reader.has(WALRUS)


@BOTH
def test_compress_makes_the_cache_and_keeps_it(memory: KVMemory, wide: Any, retrieve: Retrieve) -> None:
    retriever = KVMemoryRetriever(walrus_and_ferry(), memory, on_missing="compress")
    assert marks(retrieve(retriever, WALRUS_QUESTION)) == {"ferry": key_of(FERRY), "walrus": key_of(WALRUS)}
    assert [p.text for p in memory.document("walrus").passages] == [WALRUS]
    with recorded_inputs(wide) as inputs:
        assert marks(retrieve(retriever, WALRUS_QUESTION)) == {"ferry": key_of(FERRY), "walrus": key_of(WALRUS)}
    assert inputs == []


@BOTH
def test_skip_drops_the_node(memory: KVMemory, retrieve: Retrieve) -> None:
    found = retrieve(KVMemoryRetriever(walrus_and_ferry(), memory, on_missing="skip"), WALRUS_QUESTION)
    assert marks(found) == {"ferry": key_of(FERRY)}


@BOTH
def test_raise_reports_missing_and_mismatched_caches(memory: KVMemory, wide: Any, retrieve: Retrieve) -> None:
    with pytest.raises(CacheNotFoundError):
        retrieve(KVMemoryRetriever(walrus_and_ferry(), memory, on_missing="raise"), WALRUS_QUESTION)
    with open_memory(memory.path, wide, selector="sink_recent") as other:
        retriever = KVMemoryRetriever(WordRetriever(two_nodes()), other, on_missing="raise")
        with pytest.raises(FingerprintMismatchError) as caught:
            retrieve(retriever, FERRY_QUESTION)
        assert caught.value.next_step


@pytest.mark.parametrize("node", [TextNode(id_="blank", text=" \n"), ImageNode(id_="blank", image="aGk=")])
@BOTH
def test_nodes_without_text_get_no_mark_or_are_skipped(memory: KVMemory, retrieve: Retrieve, node: TextNode) -> None:
    class All(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return [NodeWithScore(node=item, score=1) for item in (node, *two_nodes())]

    n_caches = memory.stats().n_caches
    for on_missing, left in (("text", 3), ("compress", 3), ("skip", 2)):
        found = retrieve(KVMemoryRetriever(All(), memory, on_missing=on_missing), "?")  # type: ignore[arg-type]
        assert len(found) == left
        assert [item.node.metadata.get("kv_id") for item in found][-2:] == [key_of(FERRY), key_of(LAMP)]
        assert left == 2 or "kv_id" not in found[0].node.metadata
    assert memory.stats().n_caches == n_caches
    with pytest.raises(EmptyDocumentError, match="no text"):
        retrieve(KVMemoryRetriever(All(), memory, on_missing="raise"), "?")


def test_an_unknown_on_missing_is_refused(memory: KVMemory) -> None:
    with pytest.raises(ConfigError, match="'ignore'") as caught:
        KVMemoryRetriever(WordRetriever([]), memory, on_missing="ignore")  # type: ignore[arg-type]
    assert caught.value.next_step == "Use one of text, compress, skip, raise."
