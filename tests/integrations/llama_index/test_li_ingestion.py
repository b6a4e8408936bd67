from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import ImageNode, MetadataMode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from kv_memory import ConfigError, KVMemory
from kv_memory.errors import DocumentError
from kv_memory.integrations.llama_index import KVCompressTransform, KVMemoryRetriever
from kv_memory.query import key_of
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
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LONG, open_memory
from tests.reference import recorded_inputs

EMBEDDING = MockEmbedding(embed_dim=4)
NEW_FERRY = FERRY.replace("7.40", "8.15")


BOTH = pytest.mark.parametrize("run", [sync_run, async_run])
# -- KVCompressTransform -----------------------------------------------------------------------------------------------


@BOTH
def test_nodes_pass_unchanged_and_are_compressed(empty: KVMemory, wide: Any, run: Run) -> None:
    nodes = splitter().get_nodes_from_documents(documents())
    before = [node.model_dump() for node in nodes]
    passed = run(IngestionPipeline(transformations=[KVCompressTransform(empty)]), [], nodes=nodes)
    assert [node.model_dump() for node in passed] == before and len(before) == 2
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP]}
    with recorded_inputs(wide) as inputs:
        run(IngestionPipeline(transformations=[splitter(), KVCompressTransform(empty)]), documents())
    assert inputs == []
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP]}


@BOTH
def test_a_hit_in_the_pipeline_cache_does_not_skip_compression(
    empty: KVMemory, wide: Any, tmp_path: Path, run: Run
) -> None:
    cache = IngestionCache()
    for _ in range(2):
        run(IngestionPipeline(transformations=[splitter(), KVCompressTransform(empty)], cache=cache), documents())
    for id_ in ("ferry", "lamp"):
        empty.remove(id_)
    assert texts_in(empty) == {}
    pipeline = IngestionPipeline(transformations=[splitter(), KVCompressTransform(empty)], cache=cache)
    run(pipeline, documents())
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [LAMP]}
    with open_memory(tmp_path / "another", wide) as other:
        run(IngestionPipeline(transformations=[splitter(), KVCompressTransform(other)], cache=cache), documents())
        assert texts_in(other) == {"ferry": [FERRY], "lamp": [LAMP]}


@BOTH
def test_with_a_document_store_only_changed_documents_are_compressed(empty: KVMemory, wide: Any, run: Run) -> None:
    def pipeline() -> IngestionPipeline:
        return IngestionPipeline(
            transformations=[splitter(), KVCompressTransform(empty)],
            docstore=docstore,
            docstore_strategy=DocstoreStrategy.DUPLICATES_ONLY,
        )

    docstore = SimpleDocumentStore()
    assert len(run(pipeline(), documents())) == 2
    with recorded_inputs(wide) as inputs:
        assert run(pipeline(), documents()) == []
        assert inputs == []
        assert len(run(pipeline(), [Document(text=NEW_FERRY, id_="ferry"), documents()[1]])) == 1
    assert len(inputs) == 1
    assert texts_in(empty) == {"ferry": [NEW_FERRY], "lamp": [LAMP]}


# By tokens: llama-index-core 0.14.0 fetches what it needs to know sentences from the network.
BY_TOKENS = TokenTextSplitter(chunk_size=64, chunk_overlap=0)


def nodes_of(text: str, **options: Any) -> list[Any]:
    """The nodes of a document of several, as a parser makes them."""
    return BY_TOKENS.get_nodes_from_documents([Document(text=text, id_="long", **options)])


def test_a_shortened_document_loses_its_removed_passages(empty: KVMemory) -> None:
    transform = KVCompressTransform(empty)
    whole = nodes_of(f"{LONG} {LONG[::-1]}")
    assert len(whole) > 2
    transform(whole)
    shorter = nodes_of(" ".join(node.text for node in whole[:2]))
    transform(shorter)
    assert texts_in(empty) == {"long": [node.text for node in shorter]} and len(shorter) < len(whole)


# -- one document in several runs --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("by_hand", [False, True])
def test_nodes_of_one_document_can_come_in_several_runs(empty: KVMemory, run: Run, by_hand: bool) -> None:
    nodes = nodes_of(f"{LONG} {LONG[::-1]}")
    if by_hand:  # without the hash of the source document
        nodes = [text_node("long", node.text) for node in nodes]
        for i, node in enumerate(nodes):
            node.id_ = f"n{i}"
    assert len(nodes) > 2
    for node in nodes:
        run(IngestionPipeline(transformations=[KVCompressTransform(empty)]), [], nodes=[node])
    assert texts_in(empty) == {"long": [node.text for node in nodes]}
    assert set(empty.document("long").metadata["nodes"]) == {node.node_id for node in nodes}


async def test_concurrent_runs_of_one_document_lose_nothing(empty: KVMemory) -> None:
    nodes = nodes_of(f"{LONG} {LONG[::-1]}")
    pipeline = IngestionPipeline(transformations=[KVCompressTransform(empty)])
    await asyncio.gather(*(pipeline.arun(nodes=[node]) for node in nodes))
    assert sorted(texts_in(empty)["long"]) == sorted(node.text for node in nodes)


def test_a_new_version_that_comes_in_several_runs_replaces_the_old_one(empty: KVMemory) -> None:
    transform = KVCompressTransform(empty)
    transform(nodes_of(LONG))
    changed = nodes_of(LONG[::-1])
    assert len(changed) > 1
    for node in changed:
        transform([node])
    assert texts_in(empty) == {"long": [node.text for node in changed]}


def test_changed_metadata_of_a_document_replace_its_nodes(empty: KVMemory) -> None:
    transform = KVCompressTransform(empty)
    transform(nodes_of(FERRY, metadata={"year": 1}))
    transform(nodes_of(FERRY, metadata={"year": 2}))
    assert texts_in(empty) == {"long": [f"year: 2\n\n{FERRY}"]}


def test_running_again_adds_no_bookkeeping(empty: KVMemory) -> None:
    transform = KVCompressTransform(empty)
    for _ in range(3):
        for node in (nodes := nodes_of(f"{LONG} {LONG[::-1]}")):  # with new random ids
            transform([node])
    assert set(empty.document("long").metadata["nodes"]) == {node.node_id for node in nodes}


@pytest.mark.parametrize("is_async", [False, True])
def test_nodes_inserted_one_by_one_into_an_index_stay(empty: KVMemory, is_async: bool) -> None:
    index, _ = index_over(empty)
    nodes = nodes_of(f"{LONG} {LONG[::-1]}")
    for node in [*nodes, text_node("blank", " \n")]:
        asyncio.run(index.ainsert_nodes([node])) if is_async else index.insert_nodes([node])
    assert texts_in(empty) == {"long": [node.text for node in nodes]}
    index.delete_ref_doc("long")
    assert texts_in(empty) == {}


def test_refreshing_an_index_replaces_only_changed_documents(empty: KVMemory) -> None:
    index, _ = index_over(empty)
    for document in documents():
        index.insert(document)
    assert index.refresh_ref_docs([documents()[0], Document(text=WALRUS, id_="lamp")]) == [False, True]
    assert texts_in(empty) == {"ferry": [FERRY], "lamp": [WALRUS]}
    plain = VectorStoreIndex([], embed_model=EMBEDDING, transformations=[splitter(), KVCompressTransform(empty)])
    plain.insert(Document(text=NEW_FERRY, id_="ferry"))
    plain.insert(Document(text=f"{NEW_FERRY} Again.", id_="ferry"))
    plain.update_ref_doc(Document(text=LAMP, id_="lamp"))
    assert texts_in(empty) == {"ferry": [f"{NEW_FERRY} Again."], "lamp": [LAMP]}


def test_nodes_that_a_retriever_compressed_are_replaced_with_their_document(empty: KVMemory) -> None:
    (old,) = nodes_of(FERRY)
    KVMemoryRetriever(WordRetriever([old]), empty, on_missing="compress").retrieve(FERRY_QUESTION)
    assert texts_in(empty) == {"long": [FERRY]}
    KVCompressTransform(empty)(nodes_of(NEW_FERRY))
    assert texts_in(empty) == {"long": [NEW_FERRY]}


# -- what is compressed ------------------------------------------------------------------------------------------------


def test_metadata_mode_decides_which_metadata_are_compressed(empty: KVMemory) -> None:
    node = text_node("ferry", FERRY, metadata={"file": "a.md", "hidden": 1}, excluded_llm_metadata_keys=["hidden"])
    for mode, text in (
        (MetadataMode.LLM, f"file: a.md\n\n{FERRY}"),
        (MetadataMode.NONE, FERRY),
        (MetadataMode.EMBED, f"file: a.md\nhidden: 1\n\n{FERRY}"),
    ):
        KVCompressTransform(empty, metadata_mode=mode)([node])
        assert texts_in(empty) == {"ferry": [text]}
        retriever = KVMemoryRetriever(WordRetriever([node]), empty, on_missing="raise", metadata_mode=mode)
        assert retriever.retrieve(FERRY_QUESTION)[0].node.metadata["kv_id"] == key_of(text)


@pytest.mark.parametrize("blank", [" ", "\u3000\n", "\u200b\ufeff", "\u00ad\u2060"])
def test_nodes_without_text_pass(empty: KVMemory, blank: str) -> None:
    nodes = [TextNode(text=blank), ImageNode(image="aGk="), text_node("ferry", FERRY)]
    assert KVCompressTransform(empty)(nodes) == nodes
    assert texts_in(empty) == {"ferry": [FERRY]}


def test_binary_text_is_refused(empty: KVMemory) -> None:
    with pytest.raises(DocumentError):
        KVCompressTransform(empty)([text_node("bad", "binary \0\1\2\3 rubbish")])


def test_progress_is_shown_only_on_request(empty: KVMemory, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [text_node("ferry", FERRY)]
    KVCompressTransform(empty)(nodes)
    assert capsys.readouterr().err == ""
    KVCompressTransform(empty)(nodes, show_progress=True)
    assert "Compressing documents" in capsys.readouterr().err


@BOTH
def test_worker_processes_are_refused_with_a_next_step(empty: KVMemory, run: Run) -> None:
    pipeline = IngestionPipeline(transformations=[splitter(), KVCompressTransform(empty)])
    with pytest.raises(ConfigError, match="another process") as caught:
        run(pipeline, documents(), num_workers=2)
    assert "num_workers" in str(caught.value.where) and "without num_workers" in str(caught.value.next_step)
