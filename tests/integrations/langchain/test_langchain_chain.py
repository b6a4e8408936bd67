"""Chains: what enters the prompt, what the answer depends on, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import PydanticOutputParser, StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import ConfigurableField, Runnable

from kv_memory import ConfigError, KVMemory, Reference, Turn, errors
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_chain, create_kv_retrieval_chain
from kv_memory.integrations.references import DOCUMENTS_ABOVE
from kv_memory.query import key_of
from tests.integrations.langchain.test_langchain_structured import Pier
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, SETTINGS, blob_of, open_memory
from tests.reference import recorded_inputs

KIOSK = "The kiosk on the quay sells waffles."
PROMPTS = {
    "default": None,
    "system": ChatPromptTemplate.from_messages(
        [("system", "Use {context} only."), MessagesPlaceholder("chat_history", optional=True), ("human", "{input}")]
    ),
    "text": PromptTemplate.from_template("{context}\n\nQuestion: {input}"),
    "without": ChatPromptTemplate.from_messages([("human", "In {language}: {input}")]),
}


def documents(memory: KVMemory, question: str = FERRY_QUESTION, k: int = 1) -> list[Document]:
    return KVMemoryRetriever(memory, k=k).invoke(question)


def asked(memory: KVMemory, question: str = FERRY_QUESTION, **values: Any) -> dict[str, Any]:
    return {"context": documents(memory, question), "input": question, **values}


# -- what enters the prompt --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("way", ["invoke", "stream", "batch", "ainvoke", "astream"])
async def test_no_document_text_is_prefilled(memory: KVMemory, llm: Any, wide: Any, name: str, way: str) -> None:
    chain = create_kv_chain(llm, PROMPTS[name])
    history = [HumanMessage("Hello"), AIMessage("Hello.")]
    values = {"context": documents(memory, f"{FERRY_QUESTION} {LAMP_QUESTION}", k=2), "input": "When?"}
    values |= {"chat_history": history, "language": "English"}
    assert len(values["context"]) == 2
    with recorded_inputs(wide) as inputs:
        if way == "invoke":
            chain.invoke(values)
        elif way == "stream":
            list(chain.stream(values))
        elif way == "batch":
            chain.batch([values, values])
        elif way == "ainvoke":
            await chain.ainvoke(values)
        else:
            _ = [piece async for piece in chain.astream(values)]
    passes = [wide.tokenizer.decode(ids[0]) for ids in inputs]
    assert "".join(passes).count("When?") == (2 if way == "batch" else 1)  # both may be in one pass
    for text in passes:
        for word in {*FERRY.split(), *LAMP.split()}:
            assert len(word) < 4 or word not in text
    for text in (text for text in passes if "When?" in text):
        assert (DOCUMENTS_ABOVE in text) == (name in ("system", "text"))
        assert ("Hello." in text) == (name in ("default", "system"))
        assert "kv_id" not in text and values["context"][0].metadata["kv_id"] not in text


def test_a_document_without_a_cache_is_prefilled_as_text(memory: KVMemory, llm: Any, wide: Any) -> None:
    """So that the test above would see one."""
    plain = Document(page_content=KIOSK)
    with recorded_inputs(wide) as inputs:
        create_kv_chain(llm).invoke({"context": [plain], "input": "When?"})
    assert any("kiosk" in wide.tokenizer.decode(ids[0]) for ids in inputs)


def test_the_answer_equals_the_readers(memory: KVMemory, llm: Any) -> None:
    chain = create_kv_chain(llm)
    for question, text in ((FERRY_QUESTION, FERRY), (LAMP_QUESTION, LAMP)):
        reply = memory.reader.reply([Turn("user", question)], [Reference(key=key_of(text))], settings=SETTINGS).answer
        assert chain.invoke(asked(memory, question)) == reply.text.strip()
    turns = [Turn("user", "Hello"), Turn("assistant", "Hello."), Turn("user", FERRY_QUESTION)]
    reply = memory.reader.reply(turns, [Reference(key=key_of(FERRY))], settings=SETTINGS).answer
    assert chain.invoke(asked(memory, chat_history=[("human", "Hello"), ("ai", "Hello.")])) == reply.text.strip()


def test_changing_a_caches_values_changes_the_logits(
    memory: KVMemory, llm: Any, wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[torch.Tensor] = []
    logits = wide.logits

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = logits(*args, **kwargs)
        first.append(found.clone())
        return found

    values = asked(memory)
    monkeypatch.setattr(wide, "logits", recorded)

    def first_logits() -> torch.Tensor:
        first.clear()
        create_kv_chain(llm).invoke(values)
        return first[0]

    before, again = first_logits(), first_logits()
    assert torch.equal(before, again)
    key, print_ = key_of(FERRY), memory.compressor.fingerprint()
    cache = memory.store.get(key, print_, memory.settings.keep_ratio)
    changed = dataclasses.replace(cache, keys=cache.keys.clone(), values=-cache.values)
    memory.store.delete(key)
    memory.store.put(key, changed)
    after = first_logits()
    assert float((after - before).abs().max()) > 0.1


def test_a_document_retrieved_twice_is_used_once(memory: KVMemory, wide: Any) -> None:
    chain = create_kv_chain(ChatKVMemory(memory, max_tokens=4), output_parser=None)
    once, twice = asked(memory), asked(memory)
    twice["context"] = twice["context"] * 2
    assert chain.invoke(once) == chain.invoke(twice)


def test_the_name_of_the_document_variable_can_be_chosen(memory: KVMemory, llm: Any, wide: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{sources} {input}")])
    chain = create_kv_chain(llm, prompt, document_variable_name="sources")
    with recorded_inputs(wide) as inputs:
        chain.invoke({"sources": documents(memory), "input": "When?"})
    assert inputs[0].tolist() == [wide.encode_question(f"{DOCUMENTS_ABOVE} When?")]


# -- the model, dressed ------------------------------------------------------------------------------------------------


def test_bindings_of_the_model_are_accepted(memory: KVMemory) -> None:
    values = asked(memory)
    llm = ChatKVMemory(memory, max_tokens=24)
    expected = create_kv_chain(llm).invoke(values)
    dressed: list[Runnable[Any, Any]] = [
        llm.bind(seed=1),
        llm.with_config(tags=["a"]).bind(seed=1).bind(top_p=1.0),
        llm.with_retry(),
        llm.configurable_fields(seed=ConfigurableField(id="seed")),
    ]
    for model in dressed:
        assert create_kv_chain(model).invoke(values) == expected
    short = llm.configurable_fields(max_tokens=ConfigurableField(id="n")).with_config(configurable={"n": 2})
    assert expected.startswith(create_kv_chain(short).invoke(values))
    assert create_kv_chain(short).invoke(values) != expected


def test_structured_answers_through_a_chain(memory: KVMemory) -> None:
    llm = ChatKVMemory(memory, max_tokens=80, temperature=1.0, seed=1)
    values = asked(memory)
    pier = create_kv_chain(llm.with_structured_output(Pier)).invoke(values)
    assert isinstance(pier, Pier)
    both = create_kv_chain(llm.with_structured_output(Pier, include_raw=True)).invoke(values)
    assert both["parsed"] == pier and both["raw"].usage_metadata["input_token_details"]["cache_read"] > 11
    bound = next(iter(llm.with_structured_output(Pier).steps))  # type: ignore[attr-defined]
    assert create_kv_chain(bound, output_parser=PydanticOutputParser(pydantic_object=Pier)).invoke(values) == pier


def fake() -> FakeListChatModel:
    return FakeListChatModel(responses=["made up"])


@pytest.mark.parametrize("wrap", ["plain", "bound", "fallback", "chain", "string"])
def test_another_model_is_refused(llm: Any, wrap: str) -> None:
    models: dict[str, Any] = {
        "plain": fake(),
        "bound": fake().bind(stop=["x"]),
        "fallback": llm.with_fallbacks([fake()]),  # would answer without documents where ours fails
        "chain": fake() | StrOutputParser(),
        "string": "gpt",
    }
    for make in (create_kv_chain, lambda model: create_kv_retrieval_chain(KVMemoryRetriever(llm.memory), model)):
        with pytest.raises(ConfigError, match="cannot answer from distilled caches") as caught:
            make(models[wrap])
        assert "ChatKVMemory(memory)" in str(caught.value.next_step)


# -- documents ---------------------------------------------------------------------------------------------------------


def test_a_missing_cache_is_replaced_by_text_and_not_stored(memory: KVMemory, llm: Any, wide: Any) -> None:
    text = KIOSK
    references = [Reference(key=key_of(FERRY)), Reference(key=key_of(text), text=text)]
    reply = memory.reader.reply([Turn("user", "When?")], references, settings=SETTINGS).answer
    context = [*documents(memory), Document(page_content=text)]
    assert create_kv_chain(llm).invoke({"context": context, "input": "When?"}) == reply.text.strip()
    assert not memory.reader.has(text)  # read, not kept


def test_a_document_with_a_cache_needs_no_text(memory: KVMemory, llm: Any) -> None:
    values = asked(memory)
    bare = [Document(page_content="", metadata={"kv_id": document.metadata["kv_id"]}) for document in values["context"]]
    assert create_kv_chain(llm).invoke({**values, "context": bare}) == create_kv_chain(llm).invoke(values)


def test_a_changed_text_is_prefilled_in_its_current_form(memory: KVMemory, llm: Any) -> None:
    values = asked(memory)
    cut = [Document(page_content="pier 4", metadata=values["context"][0].metadata)]
    plain = [Document(page_content="pier 4")]
    chain = create_kv_chain(llm)
    assert chain.invoke({**values, "context": cut}) == chain.invoke({**values, "context": plain})


def test_documents_without_text_are_left_out(
    memory: KVMemory, llm: Any, wide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    values = asked(memory)
    blank = [Document(page_content=" \n", id="blank"), *values["context"]]
    with caplog.at_level(logging.WARNING):
        assert create_kv_chain(llm).invoke({**values, "context": blank}) == create_kv_chain(llm).invoke(values)
    assert "left out of the context: blank" in caplog.text


def test_an_empty_context_answers_without_documents(memory: KVMemory, llm: Any) -> None:
    reply = memory.reader.reply([Turn("user", "When?")], settings=SETTINGS).answer
    assert create_kv_chain(llm).invoke({"context": [], "input": "When?"}) == reply.text.strip()


@pytest.mark.parametrize("values", [{"input": "When?"}, {"context": FERRY, "input": "When?"}, {"context": [FERRY]}])
def test_an_input_without_documents_is_refused(llm: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no list of documents under 'context'"):
        create_kv_chain(llm).invoke(values)


def test_unknown_references_are_refused(memory: KVMemory, llm: Any) -> None:
    for key in ("0" * 64, key_of(KIOSK)):  # with its text, it would be read as text
        unknown = Document(page_content="", metadata={"kv_id": key})
        with pytest.raises(errors.CacheNotFoundError):
            create_kv_chain(llm).invoke({"context": [unknown], "input": "When?"})
    odd = Document(page_content=FERRY, metadata={"kv_id": "ferry"})
    with pytest.raises(ConfigError, match="not a reference"):
        create_kv_chain(llm).invoke({"context": [odd], "input": "When?"})


def test_caches_of_another_model_are_refused(memory: KVMemory, wide: Any) -> None:
    values = asked(memory)
    with open_memory(memory.path, wide, selector="sink_recent") as other:
        chain = create_kv_chain(ChatKVMemory(other))
        with pytest.raises(errors.FingerprintMismatchError, match="method"):
            chain.invoke(values)


def test_collections_do_not_mix(memory: KVMemory) -> None:
    tenants = [memory.in_collection("a"), memory.in_collection("b")]
    for tenant, pier in zip(tenants, (4, 7), strict=True):
        tenant.add([("ferry", f"The ferry leaves from pier {pier}.")])
    found = [documents(tenant)[0] for tenant in tenants]
    assert [document.page_content[-2] for document in found] == ["4", "7"]
    assert found[0].id == found[1].id == "ferry#0"
    for mine, theirs, tenant in ((*found, tenants[0]), (*found[::-1], tenants[1])):
        chain = create_kv_chain(ChatKVMemory(tenant, max_tokens=4))
        reference = Reference.parse(mine.metadata["kv_id"])
        reply = tenant.reader.reply([Turn("user", FERRY_QUESTION)], [reference], settings=SETTINGS).answer
        assert chain.invoke({"context": [mine], "input": FERRY_QUESTION}) == reply.text.strip()
        bare = Document(page_content="", metadata=theirs.metadata)  # with its text, it would be read as text
        with pytest.raises(errors.CacheNotFoundError):
            chain.invoke({"context": [bare], "input": FERRY_QUESTION})


def test_a_damaged_cache_is_compressed_again(memory: KVMemory, llm: Any, wide: Any) -> None:
    values = asked(memory)
    blob = blob_of(memory, "ferry")
    blob.write_bytes(b"\0" * blob.stat().st_size)
    with open_memory(memory.path, wide) as again:  # a blob is verified when a process first reads it
        chain = create_kv_chain(ChatKVMemory(again, max_tokens=4))
        with recorded_inputs(wide) as inputs:
            first = chain.invoke(values)
        assert len(inputs) > 4 and again.check().ok
        with recorded_inputs(wide) as inputs:
            assert chain.invoke(values) == create_kv_chain(llm).invoke(values)
        assert inputs[0].tolist() == [wide.encode_question(FERRY_QUESTION)]
    assert isinstance(first, str)
