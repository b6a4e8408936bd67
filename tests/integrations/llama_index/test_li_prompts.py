from __future__ import annotations

from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.response.schema import PydanticResponse
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.prompts import ChatMessage, ChatPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from pydantic import BaseModel

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import KVMemoryLLM, KVMemoryQueryEngine
from tests.integrations.llama_index.li_samples import (
    WordRetriever,
    engine_over,
    expected,
    keys_of,
    names_of,
    prompt_of,
    recorded_events,
    recorded_texts,
    sent_keys,
    sent_messages,
    two_nodes,
)
from tests.memories import FERRY, FERRY_QUESTION

BRACES = "When does the {ferry} leave, {{and}} why {?"


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_can_be_listed_and_replaced(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    engine = engine_over(llm)
    (name,) = engine.get_prompts()
    assert name == "response_synthesizer:text_qa_template"
    assert engine.get_prompts()[name].get_template() == "{query_str}"
    engine.update_prompts({name: PromptTemplate("In one word: {query_str}")})
    with recorded_texts(wide) as texts:
        response = engine.query(BRACES)
    assert texts == [prompt_of(wide, f"In one word: {BRACES}")]
    assert str(response) == expected(memory, f"In one word: {BRACES}", FERRY)


def test_the_context_of_a_template_becomes_a_remark(llm: KVMemoryLLM, wide: Any) -> None:
    template = PromptTemplate("Context: {context_str}\nAnswer {how}: {query_str}").partial_format(how="briefly")
    with recorded_texts(wide) as texts:
        engine_over(llm, text_qa_template=template).query(BRACES)
    assert texts == [prompt_of(wide, f"Context: (see the documents above)\nAnswer briefly: {BRACES}")]


def test_a_chat_template_of_messages(llm: KVMemoryLLM, wide: Any) -> None:
    template = ChatPromptTemplate(
        [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="{query_str}")]
    )
    with recorded_texts(wide) as texts, recorded_events() as events:
        engine_over(llm, text_qa_template=template).query(BRACES)
    assert texts == [prompt_of(wide, f"Be brief.\n\n{BRACES}")]
    assert sent_keys(events) == [keys_of(FERRY)]


def test_the_system_prompt_of_an_llm_is_prefilled(memory: KVMemory, wide: Any) -> None:
    llm = KVMemoryLLM(memory, max_tokens=2, system_prompt="Be brief.")
    with recorded_texts(wide) as texts:
        engine_over(llm).query(FERRY_QUESTION)
    assert texts == [prompt_of(wide, f"Be brief.\n\n{FERRY_QUESTION}")]


# -- tracing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
async def test_events_and_callbacks_equal_those_of_a_stock_engine(
    memory: KVMemory, streaming: bool, is_async: bool
) -> None:
    seen = []
    for kind in ("stock", "ours"):
        handler = LlamaDebugHandler(print_trace_on_end=False)
        manager = CallbackManager([handler])
        llm = KVMemoryLLM(memory, max_tokens=6, callback_manager=manager)
        retriever = WordRetriever(two_nodes(), callback_manager=manager)
        engine: Any
        if kind == "stock":
            synthesizer = get_response_synthesizer(
                llm=llm, response_mode=ResponseMode.SIMPLE_SUMMARIZE, streaming=streaming, callback_manager=manager
            )
            engine = RetrieverQueryEngine(retriever, synthesizer, callback_manager=manager)
        else:
            engine = KVMemoryQueryEngine.from_defaults(retriever, llm=llm, streaming=streaming)
        with recorded_events() as events:
            response: Any = await engine.aquery(FERRY_QUESTION) if is_async else engine.query(FERRY_QUESTION)
            if streaming and is_async:
                assert [piece async for piece in response.async_response_gen()]
            elif streaming:
                assert list(response.response_gen)
        callbacks = [event.event_type for event in handler.get_events()]
        seen.append((names_of(events), callbacks, type(response)))
    assert seen[0] == seen[1]
    assert {"QueryStartEvent", "RetrievalEndEvent", "SynthesizeEndEvent", "LLMChatEndEvent"} <= set(seen[1][0])


def test_traces_contain_the_question_but_no_document_text(llm: KVMemoryLLM) -> None:
    with recorded_events() as events:
        engine_over(llm).query(FERRY_QUESTION)
    (messages,) = sent_messages(events)
    assert [message.content or "" for message in messages] == ["", FERRY_QUESTION]
    assert messages[0].additional_kwargs == {"kv_ids": keys_of(FERRY)}


# -- structured answers ------------------------------------------------------------------------------------------------


class Departure(BaseModel):
    """Where and how often."""

    pier: Literal[4, 5]
    daily: bool


async def test_structured_answers_of_an_output_class(memory: KVMemory) -> None:
    llm = KVMemoryLLM(memory, max_tokens=100, temperature=1.0, seed=3)
    engine = engine_over(llm, output_cls=Departure)
    with recorded_events() as events:
        responses: list[Any] = [engine.query(FERRY_QUESTION), await engine.aquery(FERRY_QUESTION)]
    assert all(isinstance(response, PydanticResponse) for response in responses)
    assert isinstance(responses[0].response, Departure) and responses[0].response == responses[1].response
    assert sent_keys(events) == [keys_of(FERRY)] * 2
