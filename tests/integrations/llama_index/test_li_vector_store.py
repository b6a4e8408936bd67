from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQuery

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import (
    KVCompressTransform,
    KVMemoryLLM,
    KVMemoryQueryEngine,
    KVMemoryRetriever,
    KVMemoryVectorStore,
)
from tests.integrations.llama_index.li_samples import (
    WALRUS,
    Run,
    WordRetriever,
    async_run,
    documents,
    index_over,
    splitter,
    sync_run,
    text_node,
    texts_in,
)
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LONG
from tests.reference import recorded_inputs

EMBEDDING = MockEmbedding(embed_dim=4)
NEW_FERRY = FERRY.replace("7.40", "8.15")


BOTH = pytest.mark.parametrize("run", [sync_run, async_run])
# -- KVMemoryVectorStore -----------------------------------------------------------------------------------------------


def upserting(memory: KVMemory, docstore: SimpleDocumentStore, strategy: DocstoreStrategy) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[splitter(), EMBEDDING],
        docstore=docstore,
        docstore_strategy=strategy,
        vector_store=KVMemoryVectorStore(SimpleVectorStore(), memory),
    )


@BOTH
def test_upserts_replace_changed_documents_and_keep_the_others(empty: KVMemory, wide: Any, run: Run) -> None:
    pipeline = upserting(empty, SimpleDocumentStore(), DocstoreStrategy.UPSERTS)
    run(pipeline, documents())
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP]}
    with recorded_inputs(wide) as inputs:
        run(pipeline, documents())
    assert inputs == []
    with recorded_inputs(wide) as inputs:
        run(pipeline, [Document(text=NEW_FERRY, id_="ferry"), Document(text=WALRUS, id_="walrus")])
    assert len(inputs) == 2
    assert texts_in(empty) == {"ferry": [NEW_FERRY], "lamp": [LAMP], "walrus": [WALRUS]}


@BOTH
def test_upserts_and_delete_removes_missing_documents(empty: KVMemory, run: Run) -> None:
    pipeline = upserting(empty, SimpleDocumentStore(), DocstoreStrategy.UPSERTS_AND_DELETE)
    run(pipeline, documents())
    run(pipeline, documents()[1:])
    assert texts_in(empty) == {"lamp": [LAMP]}


def test_deletions_through_an_index_remove_caches(empty: KVMemory) -> None:
    index, _ = index_over(empty, documents())
    index.delete_ref_doc("ferry", delete_from_docstore=True)
    assert texts_in(empty) == {"lamp": [LAMP]}
    index.update_ref_doc(Document(text=WALRUS, id_="lamp"))
    assert texts_in(empty) == {"lamp": [WALRUS]}
    asyncio.run(index.adelete_ref_doc("lamp"))
    assert texts_in(empty) == {}
    index.delete_ref_doc("never there")


@pytest.mark.parametrize("is_async", [False, True])
def test_deleting_single_nodes_keeps_shared_texts(empty: KVMemory, is_async: bool) -> None:
    index, store = index_over(empty)
    nodes = [text_node("both", FERRY), text_node("both", LAMP), text_node("other", WALRUS)]
    nodes[1].id_ = "lamp-node"
    twin = text_node("both", LAMP)
    twin.id_ = "twin"
    index.insert_nodes([*nodes, twin])

    def delete(*ids: str) -> None:
        if is_async:
            asyncio.run(store.adelete_nodes(list(ids)))
        else:
            store.delete_nodes(list(ids))

    delete("both-node", "nobody")
    assert texts_in(empty) == {"both": [LAMP], "other": [WALRUS]}
    delete("lamp-node")
    assert texts_in(empty) == {"both": [LAMP], "other": [WALRUS]}  # its twin has the same text
    delete("twin")
    assert texts_in(empty) == {"other": [WALRUS]}
    assert store.query(VectorStoreQuery(query_embedding=[0.5] * 4, similarity_top_k=9)).ids == ["other-node"]


@pytest.mark.parametrize("is_async", [False, True])
def test_clear_removes_only_documents_added_as_nodes(memory: KVMemory, is_async: bool) -> None:
    _, store = index_over(memory, [Document(text=WALRUS, id_="walrus")])
    assert memory.stats().n_documents == 3
    asyncio.run(store.aclear()) if is_async else store.clear()
    assert texts_in(memory) == {"ferry": [FERRY], "lamp": [LAMP]}  # added otherwise
    assert store.vector_store.query(VectorStoreQuery(query_embedding=[0.5] * 4, similarity_top_k=9)).ids == []


def test_caches_made_by_a_retriever_are_removed_too(empty: KVMemory) -> None:
    docs = [*documents(), Document(text=WALRUS, id_="walrus")]
    index, store = index_over(empty, docs, compress=False)
    assert texts_in(empty) == {}
    retriever = KVMemoryRetriever(index.as_retriever(similarity_top_k=3), empty, on_missing="compress")
    ids = {item.node.ref_doc_id: item.node.node_id for item in retriever.retrieve("?")}
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP], "walrus": [WALRUS]}
    store.delete_nodes([ids["walrus"]])
    index.delete_ref_doc("lamp")
    assert texts_in(empty) == {"ferry": [FERRY]}
    store.clear()
    assert texts_in(empty) == {}


def test_both_texts_of_a_node_that_a_postprocessor_rewrites_are_kept(empty: KVMemory, wide: Any) -> None:
    window = f"{FERRY} It is red."
    node = text_node("ferry", FERRY, metadata={"window": window}, excluded_llm_metadata_keys=["window"])
    engine = KVMemoryQueryEngine.from_defaults(
        WordRetriever([node]),
        llm=KVMemoryLLM(empty, max_tokens=2),
        on_missing="compress",
        node_postprocessors=[MetadataReplacementPostProcessor(target_metadata_key="window")],
    )
    engine.query(FERRY_QUESTION)
    assert texts_in(empty) == {"ferry": [FERRY, window]}
    with recorded_inputs(wide) as inputs:
        engine.query(FERRY_QUESTION)
    assert len(inputs) == 2  # the question and the first token of the answer
    KVMemoryVectorStore(SimpleVectorStore(), empty).delete_nodes(["ferry-node"])
    assert texts_in(empty) == {}


async def test_concurrent_questions_compress_all_missing_nodes_of_a_document(empty: KVMemory) -> None:
    nodes = [text_node("long", f"Walrus number x{i}.") for i in range(6)]
    for i, node in enumerate(nodes):
        node.id_ = f"n{i}"
    retriever = KVMemoryRetriever(WordRetriever(nodes), empty, on_missing="compress")
    await asyncio.gather(*(retriever.aretrieve(f"x{i}") for i in range(6)))
    assert sorted(texts_in(empty)["long"]) == [node.text for node in nodes]
    assert set(empty.document("long").metadata["nodes"]) == {f"n{i}" for i in range(6)}


def test_other_metadata_and_texts_of_a_document_stay(memory: KVMemory) -> None:
    _, store = index_over(memory, [Document(text=f"{LAMP} It is red.", id_="lamp")])
    (node_id,) = memory.document("lamp").metadata["nodes"]
    assert memory.document("lamp").metadata["year"] == 1921
    store.delete_nodes([node_id])
    assert memory.document("lamp").metadata["year"] == 1921
    assert texts_in(memory)["lamp"] == [LAMP]


def test_a_node_added_again_with_another_text_replaces_it(empty: KVMemory) -> None:
    _, store = index_over(empty)
    for text in (FERRY, NEW_FERRY):
        store.add([text_node("ferry", text, embedding=[0.5] * 4)])
    assert texts_in(empty) == {"ferry": [NEW_FERRY]}


@BOTH
def test_new_random_node_ids_leave_no_orphaned_caches(empty: KVMemory, wide: Any, tmp_path: Path, run: Run) -> None:
    def ingest() -> list[str]:
        pipeline = IngestionPipeline(
            transformations=[splitter(), EMBEDDING],
            vector_store=KVMemoryVectorStore(SimpleVectorStore(), empty),
            disable_cache=True,
        )
        return [node.node_id for node in run(pipeline, [Document(text=f"{FERRY} {LONG}", id_="a.md"), *documents()])]

    first = ingest()
    before = texts_in(empty), empty.store.stats()
    assert before[1].n_caches > 3
    with recorded_inputs(wide) as inputs:
        second = ingest()
    assert not set(first) & set(second)
    assert inputs == []
    assert (texts_in(empty), empty.store.stats().n_caches) == (before[0], before[1].n_caches)
    nodes = [TextNode(id_=id_, text=p) for id_, p in zip(second, before[0]["a.md"], strict=False)]
    retriever = KVMemoryRetriever(WordRetriever(nodes, top_k=9), empty, on_missing="raise")
    assert len(retriever.retrieve(LONG)) == len(before[0]["a.md"]) > 1


def test_a_long_document_is_inserted_in_several_batches(empty: KVMemory) -> None:
    index = VectorStoreIndex(
        [],
        embed_model=EMBEDDING,
        storage_context=StorageContext.from_defaults(vector_store=KVMemoryVectorStore(SimpleVectorStore(), empty)),
        insert_batch_size=2,
    )
    nodes = [text_node("long", f"Walrus number {i}.") for i in range(7)]
    for i, node in enumerate(nodes):
        node.id_ = f"n{i}"
    index.insert_nodes(nodes)
    assert texts_in(empty) == {"long": [node.text for node in nodes]}
    assert set(empty.document("long").metadata["nodes"]) == {f"n{i}" for i in range(7)}


async def test_an_index_built_asynchronously(empty: KVMemory) -> None:
    store = KVMemoryVectorStore(SimpleVectorStore(), empty)
    index = VectorStoreIndex(
        [], embed_model=EMBEDDING, storage_context=StorageContext.from_defaults(vector_store=store)
    )
    await index.ainsert_nodes([text_node("ferry", FERRY), text_node("lamp", LAMP)])
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP]}


def test_metadata_mode_of_a_vector_store(empty: KVMemory) -> None:
    docs = [Document(text=FERRY, id_="ferry", metadata={"file": "a.md"})]
    index_over(empty, docs)
    assert texts_in(empty) == {"ferry": [f"file: a.md\n\n{FERRY}"]}
    index_over(empty, docs, metadata_mode=MetadataMode.NONE)
    assert texts_in(empty)["ferry"][-1] == FERRY


def test_a_transform_in_the_same_pipeline_compresses_once(empty: KVMemory, wide: Any) -> None:
    pipeline = IngestionPipeline(
        transformations=[splitter(), KVCompressTransform(empty), EMBEDDING],
        vector_store=KVMemoryVectorStore(SimpleVectorStore(), empty, compress=False),
    )
    with recorded_inputs(wide) as inputs:
        nodes = pipeline.run(documents=documents())
    assert len(inputs) == len(nodes) == 2
    pipeline.vector_store.delete_nodes([nodes[0].node_id])  # type: ignore[union-attr]
    assert texts_in(empty) == {"lamp": [LAMP]}


def test_queries_are_passed_to_the_inner_store(empty: KVMemory, tmp_path: Path) -> None:
    _, store = index_over(empty, documents())
    query = VectorStoreQuery(query_embedding=[0.5] * 4, similarity_top_k=9)
    inner = store.vector_store
    assert set(store.query(query).ids) == set(inner.query(query).ids) == set(asyncio.run(store.aquery(query)).ids)
    assert len(store.query(query).ids) == 2
    assert (store.stores_text, store.client) == (inner.stores_text, inner.client)
    store.persist(str(tmp_path / "vectors.json"))
    assert set(SimpleVectorStore.from_persist_path(str(tmp_path / "vectors.json")).query(query).ids) == set(
        inner.query(query).ids
    )
    with pytest.raises(NotImplementedError):
        store.get_nodes([])
    with pytest.raises(NotImplementedError):
        asyncio.run(store.aget_nodes([]))


RED = MetadataFilters(filters=[MetadataFilter(key="colour", value="red")])


class Listing(SimpleVectorStore):
    """A vector store that holds its nodes, as most do."""

    stores_text: bool = True

    def get_nodes(self, node_ids: Any = None, filters: Any = None, **_: Any) -> list[Any]:
        return [node for node in HELD if filters is None or node.metadata.get("colour") == "red"]


HELD: list[TextNode] = []


@pytest.mark.parametrize("inner", [Listing, SimpleVectorStore])
def test_deleting_by_filters_needs_a_store_that_lists_nodes(
    empty: KVMemory, inner: type[BasePydanticVectorStore], caplog: pytest.LogCaptureFixture
) -> None:
    HELD[:] = [
        text_node("ferry", FERRY, metadata={"colour": "red"}, embedding=[0.5] * 4),
        text_node("lamp", LAMP, embedding=[0.5] * 4),
    ]
    store = KVMemoryVectorStore(inner(), empty, metadata_mode=MetadataMode.NONE)
    store.add(HELD)
    with caplog.at_level(logging.WARNING):
        store.delete_nodes(filters=RED)
    if inner is Listing:
        assert texts_in(empty) == {"lamp": [LAMP]} and caplog.text == ""
    else:
        assert set(texts_in(empty)) == {"ferry", "lamp"}
        assert "cannot list nodes by filters" in caplog.text


def test_from_ingestion_to_an_answer(empty: KVMemory) -> None:
    index, _ = index_over(empty, documents())
    llm = KVMemoryLLM(empty, max_tokens=4)
    engine = KVMemoryQueryEngine.from_defaults(index.as_retriever(similarity_top_k=2), llm=llm, on_missing="raise")
    assert str(engine.query(FERRY_QUESTION))
    index.delete_ref_doc("ferry", delete_from_docstore=True)
    assert [item.node.ref_doc_id for item in engine.query(FERRY_QUESTION).source_nodes] == ["lamp"]
