from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from kv_memory import CacheNotFoundError, ConfigError, KVMemory
from kv_memory.integrations.llama_index import (
    KVMemoryLLM,
    KVMemoryQueryEngine,
    KVMemoryRetriever,
    KVMemoryStoreRetriever,
    KVMemorySynthesizer,
)
from kv_memory.integrations.references import OnMissing
from kv_memory.query import key_of
from tests.integrations.llama_index.li_samples import (
    WALRUS,
    WordRetriever,
    engine_over,
    expected,
    keys_of,
    prompt_of,
    recorded_events,
    recorded_texts,
    sent_keys,
    text_node,
    two_nodes,
)
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, blob_of, open_memory, wide_backbone
from tests.reference import recorded_inputs

EITHER_QUESTION = "When does the ferry leave, and what did the lamp burn?"
BRACES = "When does the {ferry} leave, {{and}} why {?"


# -- what reaches the model --------------------------------------------------------------------------------------------


async def test_all_query_forms_answer_from_caches(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    answer = expected(memory, FERRY_QUESTION, FERRY)
    whole, streaming = engine_over(llm), engine_over(llm, streaming=True)
    with recorded_texts(wide) as texts, recorded_events() as events:
        responses = [whole.query(FERRY_QUESTION), await whole.aquery(FERRY_QUESTION)]
        streams: list[Any] = [streaming.query(FERRY_QUESTION), await streaming.aquery(FERRY_QUESTION)]
        pieces = "".join(streams[0].response_gen), "".join([piece async for piece in streams[1].async_response_gen()])
    assert [str(response) for response in responses] == [answer, answer] == list(pieces)
    assert texts == [prompt_of(wide, FERRY_QUESTION)] * 4
    assert sent_keys(events) == [keys_of(FERRY)] * 4
    for response in (*responses, *streams):
        ((node, score),) = [(item.node, item.score) for item in response.source_nodes]
        assert (node.node_id, node.get_content(), score) == ("ferry-node", FERRY, 1)
        assert response.metadata == {"ferry-node": {"kv_id": key_of(FERRY)}}


def test_caches_are_used_in_the_order_of_their_nodes(memory: KVMemory, llm: KVMemoryLLM) -> None:
    for question, texts in (("lighthouse lamp ferry", (LAMP, FERRY)), ("ferry leaves lamp", (FERRY, LAMP))):
        with recorded_events() as events:
            response = engine_over(llm, top_k=2).query(question)
        assert sent_keys(events) == [keys_of(*texts)]
        assert str(response) == expected(memory, question, *texts)


def test_a_text_shared_by_two_nodes_is_used_once(llm: KVMemoryLLM) -> None:
    # With metadata of its own, which the model is not shown: old releases take nodes of one text and metadata for one.
    nodes = [*two_nodes(), text_node("copy", FERRY, metadata={"page": 2}, excluded_llm_metadata_keys=["page"])]
    with recorded_events() as events:
        response = KVMemoryQueryEngine.from_defaults(WordRetriever(nodes, top_k=3), llm=llm).query(FERRY_QUESTION)
    assert sent_keys(events) == [keys_of(FERRY)]
    assert [item.node.node_id for item in response.source_nodes] == ["ferry-node", "copy-node"]


def test_braces_in_a_question_are_kept(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    with recorded_texts(wide) as texts:
        response = engine_over(llm).query(BRACES)
    assert texts == [prompt_of(wide, BRACES)]
    assert str(response) == expected(memory, BRACES, FERRY)


def test_nothing_found_is_an_empty_response(llm: KVMemoryLLM, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        assert str(engine_over(llm).query("Xylophone?")) == "Empty Response"
    assert inputs == []


def test_text_is_prefilled_for_missing_caches(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    nodes = [text_node("walrus", WALRUS), *two_nodes()]
    question = "Does the walrus sleep on the ferry?"
    engine = KVMemoryQueryEngine.from_defaults(WordRetriever(nodes, top_k=2), llm=llm)
    with recorded_texts(wide) as texts:
        engine.query(question)
    assert texts == [wide.prompt.document(WALRUS), prompt_of(wide, question)]
    assert not memory.reader.has(WALRUS)


@pytest.mark.parametrize("on_missing", ["compress", "skip"])
def test_missing_caches_can_be_compressed_or_skipped(memory: KVMemory, llm: KVMemoryLLM, on_missing: Any) -> None:
    nodes = [text_node("walrus", WALRUS), *two_nodes()]
    question = "Does the walrus sleep on the ferry?"
    read = (WALRUS, FERRY) if on_missing == "compress" else (FERRY,)
    with recorded_events() as events:
        for engine in (
            KVMemoryQueryEngine.from_defaults(WordRetriever(nodes, top_k=2), llm=llm, on_missing=on_missing),
            # A retriever of LlamaIndex's own beneath the synthesizer: it looks itself.
            RetrieverQueryEngine(WordRetriever(nodes, top_k=2), KVMemorySynthesizer(llm, on_missing=on_missing)),
        ):
            assert str(engine.query(question)) == expected(memory, question, *read)
    assert sent_keys(events) == [keys_of(*read)] * 2


async def test_missing_caches_can_raise(llm: KVMemoryLLM) -> None:
    retriever = WordRetriever([text_node("walrus", WALRUS)])
    for engine in (
        KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="raise"),
        RetrieverQueryEngine(retriever, KVMemorySynthesizer(llm, on_missing="raise")),
    ):
        with pytest.raises(CacheNotFoundError):
            engine.query("walrus")
        with pytest.raises(CacheNotFoundError):
            await engine.aquery("walrus")


@pytest.mark.parametrize("on_missing", ["text", "compress"])
def test_a_damaged_cache_is_replaced_from_the_nodes_text(tmp_path: Path, wide: Any, on_missing: OnMissing) -> None:
    """The store does not keep the text; the application has it."""
    with open_memory(tmp_path / "no-texts", wide, keep_text=False) as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
        blob = blob_of(memory, "ferry")
        blob.write_bytes(b"\0" * blob.stat().st_size)
        synthesizer = KVMemorySynthesizer(KVMemoryLLM(memory, max_tokens=6), on_missing=on_missing)
        nodes = [NodeWithScore(node=node) for node in two_nodes()[:1]]
        with recorded_texts(wide) as texts:
            synthesizer.synthesize(FERRY_QUESTION, nodes)
        assert FERRY in "".join(texts)
        assert memory.stats().n_quarantined == 1 and memory.reader.sound(FERRY)
        with recorded_texts(wide) as texts:
            synthesizer.synthesize(FERRY_QUESTION, nodes)
        assert texts == [prompt_of(wide, FERRY_QUESTION)]  # it was made again


def test_nodes_without_text_are_left_out(llm: KVMemoryLLM, wide: Any) -> None:
    nodes = [TextNode(text=""), ImageNode(image="aGk="), *two_nodes()[:1]]
    with recorded_texts(wide) as texts, recorded_events() as events:
        response = KVMemorySynthesizer(llm).synthesize(FERRY_QUESTION, [NodeWithScore(node=node) for node in nodes])
    assert sent_keys(events) == [keys_of(FERRY)] and texts == [prompt_of(wide, FERRY_QUESTION)]
    assert len(response.source_nodes) == 3


def test_texts_without_nodes_are_refused(llm: KVMemoryLLM) -> None:
    with pytest.raises(ConfigError, match="from nodes") as caught:
        KVMemorySynthesizer(llm).get_response(FERRY_QUESTION, [FERRY])
    assert "synthesize(" in str(caught.value.next_step)


# -- another LLM -------------------------------------------------------------------------------------------------------


def test_another_llm_is_refused(memory: KVMemory) -> None:
    for make in (
        lambda: KVMemorySynthesizer(MockLLM()),  # type: ignore[arg-type]
        lambda: KVMemoryQueryEngine.from_defaults(WordRetriever([]), llm=MockLLM()),  # type: ignore[arg-type]
        lambda: KVMemoryQueryEngine.from_defaults(WordRetriever([]), llm=None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="cannot answer from distilled caches") as caught:
            make()
        assert "KVMemoryLLM(memory)" in str(caught.value.next_step)


def test_collections_with_the_same_node_ids_do_not_mix(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    other = memory.in_collection("tenant")
    other.add_passages("ferry", [WALRUS])
    nodes = {"default": text_node("ferry", FERRY), "tenant": text_node("ferry", WALRUS)}
    tenant = KVMemoryLLM(other, max_tokens=6)
    for mine, own, foreign in ((llm, "default", "tenant"), (tenant, "tenant", "default")):
        question = "ferry walrus"
        engine = KVMemoryQueryEngine.from_defaults(WordRetriever([nodes[own]]), llm=mine, on_missing="raise")
        assert str(engine.query(question)) == expected(mine.memory, question, nodes[own].text)
        with pytest.raises(CacheNotFoundError):
            KVMemoryQueryEngine.from_defaults(WordRetriever([nodes[foreign]]), llm=mine, on_missing="raise").query(
                question
            )


# -- under LlamaIndex's own engines ------------------------------------------------------------------------------------


def test_query_engine_of_an_index_answers_from_caches(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    index = VectorStoreIndex(two_nodes()[:1], embed_model=MockEmbedding(embed_dim=4))
    engines = [
        index.as_query_engine(llm=llm, response_synthesizer=KVMemorySynthesizer(llm)),
        RetrieverQueryEngine(index.as_retriever(), KVMemorySynthesizer(llm)),
        KVMemoryQueryEngine.from_defaults(index, llm=llm),
    ]
    with recorded_texts(wide) as texts:
        answers = {str(engine.query(FERRY_QUESTION)) for engine in engines}
    assert answers == {expected(memory, FERRY_QUESTION, FERRY)}
    assert texts == [prompt_of(wide, FERRY_QUESTION)] * 3
    # The same index under the same LLM, answered by LlamaIndex's own synthesizer, reads the text.
    with recorded_texts(wide) as texts:
        index.as_query_engine(llm=llm).query(FERRY_QUESTION)
    assert FERRY in texts[0]


def test_an_index_uses_the_memorys_top_k(llm: KVMemoryLLM) -> None:
    index = VectorStoreIndex(
        [text_node(f"n{i}", f"Walrus number {i}.") for i in range(5)], embed_model=MockEmbedding(embed_dim=4)
    )
    assert len(KVMemoryQueryEngine.from_defaults(index, llm=llm).query("?").source_nodes) == 3
    engine = KVMemoryQueryEngine.from_defaults(index, llm=llm, similarity_top_k=4)
    assert len(engine.query("?").source_nodes) == 4


async def test_query_engine_over_the_store_retriever(memory: KVMemory, llm: KVMemoryLLM) -> None:
    retriever = KVMemoryStoreRetriever(memory, similarity_top_k=1)
    engine = KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="raise")
    for response in (engine.query(LAMP_QUESTION), await engine.aquery(LAMP_QUESTION)):
        assert str(response) == expected(memory, LAMP_QUESTION, LAMP)


async def test_query_engine_as_a_tool(memory: KVMemory, llm: KVMemoryLLM) -> None:
    tool = QueryEngineTool.from_defaults(engine_over(llm), name="ferries", description="About ferries.")
    answer = expected(memory, FERRY_QUESTION, FERRY)
    assert tool.call(FERRY_QUESTION).content == answer
    assert (await tool.acall(FERRY_QUESTION)).content == answer


class Halves(BaseQuestionGenerator):
    """One question for each tool."""

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        asked = {"ferries": FERRY_QUESTION, "lamps": LAMP_QUESTION}
        return [SubQuestion(sub_question=asked[str(tool.name)], tool_name=str(tool.name)) for tool in tools]

    async def agenerate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        pass


async def test_under_a_sub_question_engine(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    tools = [
        QueryEngineTool.from_defaults(engine_over(llm), name=name, description=name) for name in ("ferries", "lamps")
    ]
    answers = [expected(memory, FERRY_QUESTION, FERRY), expected(memory, LAMP_QUESTION, LAMP)]
    for synthesizer in (None, KVMemorySynthesizer(llm)):
        engine: Any = SubQuestionQueryEngine.from_defaults(
            tools, llm=llm, question_gen=Halves(), response_synthesizer=synthesizer, use_async=False, verbose=False
        )
        for response in (engine.query(EITHER_QUESTION), await engine.aquery(EITHER_QUESTION)):
            texts = [item.node.get_content() for item in response.source_nodes]
            assert all(answer in text for answer, text in zip(answers, texts, strict=False)), texts
            assert str(response)


# -- postprocessors ----------------------------------------------------------------------------------------------------


class Reverse(BaseNodePostprocessor):
    """A reranker, of a sort."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return [NodeWithScore(node=item.node, score=float(i)) for i, item in enumerate(reversed(nodes))]


class Shout(BaseNodePostprocessor):
    """Rewrites what it gets, in place."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        for item in nodes:
            item.node.set_content(item.node.get_content().upper())
        return nodes


async def test_rerankers(memory: KVMemory, llm: KVMemoryLLM) -> None:
    engine = engine_over(llm, top_k=2, node_postprocessors=[Reverse()])
    question = "ferry leaves lamp"
    with recorded_events() as events:
        for response in (engine.query(question), await engine.aquery(question)):
            assert str(response) == expected(memory, question, LAMP, FERRY)
            assert [item.score for item in response.source_nodes] == [0.0, 1.0]
    assert sent_keys(events) == [keys_of(LAMP, FERRY)] * 2


@pytest.mark.parametrize("on_missing", ["text", "compress"])
def test_the_reference_follows_a_replaced_text(memory: KVMemory, llm: KVMemoryLLM, on_missing: Any) -> None:
    window = f"{FERRY} It is red."
    node = text_node("ferry", FERRY, metadata={"window": window}, excluded_llm_metadata_keys=["window"])
    engine = KVMemoryQueryEngine.from_defaults(
        WordRetriever([node]),
        llm=llm,
        on_missing=on_missing,
        node_postprocessors=[MetadataReplacementPostProcessor(target_metadata_key="window")],
    )
    with recorded_events() as events:
        response = engine.query(FERRY_QUESTION)
    assert sent_keys(events) == [keys_of(window)]
    assert memory.reader.has(window) == (on_missing == "compress")
    assert response.source_nodes[0].node.get_content() == window
    assert node.text == FERRY


def test_postprocessors_that_rewrite_in_place_change_only_copies(memory: KVMemory, llm: KVMemoryLLM) -> None:
    nodes = two_nodes()
    engine = KVMemoryQueryEngine.from_defaults(WordRetriever(nodes), llm=llm, node_postprocessors=[Shout()])
    with recorded_events() as events:
        engine.query(FERRY_QUESTION)
    assert sent_keys(events) == [keys_of(FERRY.upper())]
    assert [node.text for node in nodes] == [FERRY, LAMP]


# -- a store that was made elsewhere -----------------------------------------------------------------------------------


def test_a_reopened_store_gives_the_same_answer(memory: KVMemory, llm: KVMemoryLLM, tmp_path: Path) -> None:
    answer = str(engine_over(llm).query(FERRY_QUESTION))
    with open_memory(memory.path, wide_backbone()) as other:
        again = KVMemoryLLM(other, max_tokens=6)
        retriever = KVMemoryRetriever(WordRetriever(two_nodes()), other, on_missing="raise")
        assert str(KVMemoryQueryEngine.from_defaults(retriever, llm=again).query(FERRY_QUESTION)) == answer


def test_a_kv_memory_retriever_is_used_unchanged(memory: KVMemory, llm: KVMemoryLLM) -> None:
    retriever: BaseRetriever = KVMemoryRetriever(WordRetriever(two_nodes()), memory, on_missing="skip")
    assert KVMemoryQueryEngine.from_defaults(retriever, llm=llm).retriever is retriever
