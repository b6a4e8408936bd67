"""Answers in a fixed form, beyond LangChain's standard suite."""

from __future__ import annotations

from typing import Any, TypedDict

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel, Field

from kv_memory import ConfigError, KVMemory, Reference
from kv_memory.integrations.langchain import ChatKVMemory
from kv_memory.integrations.langchain.structured import json_schema_of
from kv_memory.query import key_of
from tests.memories import FERRY


class Pier(BaseModel):
    """A pier."""

    number: int = Field(ge=1, le=9)
    open: bool


class Quay(BaseModel):
    """Piers."""

    first: Pier
    others: list[Pier] = Field(max_length=2)


class PierDict(TypedDict):
    """A pier."""

    number: int
    open: bool


PIER = {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]}
FUNCTION = {"name": "pier", "description": "A pier.", "parameters": PIER}


@pytest.mark.parametrize(
    ("method", "options"),
    [("json_schema", {"kv_ids": [str(Reference(key=key_of(FERRY)))]}), ("json_mode", {}), ("function_calling", {})],
)
def test_an_answer_is_an_object_of_the_schema(memory: KVMemory, method: str, options: dict[str, Any]) -> None:
    llm = ChatKVMemory(memory, max_tokens=160, temperature=1.0)
    for seed in range(2):
        pier = llm.with_structured_output(Pier, method=method).invoke("Which pier?", seed=seed, **options)
        assert isinstance(pier, Pier)
        quay = llm.with_structured_output(Quay, method=method).invoke("Which piers?", seed=seed, **options)
        assert isinstance(quay, Quay) and len(quay.others) <= 2
    assert set(llm.with_structured_output(PIER, method=method).invoke("Open?", **options)) == {"open"}
    assert set(llm.with_structured_output(FUNCTION, method=method).invoke("Open?", **options)) == {"open"}


def test_references_reach_the_model_in_every_output_form(memory: KVMemory) -> None:
    asked = ChatKVMemory(memory, max_tokens=80, temperature=1.0).with_structured_output(Pier, include_raw=True)
    raw = [asked.invoke("Which pier?", kv_ids=ids)["raw"] for ids in ([], [str(Reference(key=key_of(FERRY)))])]
    n_cached = [message.usage_metadata["input_token_details"]["cache_read"] for message in raw]
    assert n_cached[0] < n_cached[1]


@pytest.mark.parametrize("schema", [Pier, PierDict, PIER])
def test_a_truncated_answer_is_an_error(memory: KVMemory, schema: Any) -> None:
    llm = ChatKVMemory(memory, max_tokens=7)
    with pytest.raises(OutputParserException, match="max_tokens"):
        llm.with_structured_output(schema).invoke("Which pier?")
    result = llm.with_structured_output(schema, include_raw=True).invoke("Which pier?")
    assert result["parsed"] is None and isinstance(result["parsing_error"], OutputParserException)
    assert result["raw"].content.startswith("{") and result["raw"].response_metadata["finish_reason"] == "length"


def test_include_raw_returns_the_message_too(memory: KVMemory) -> None:
    result = (
        ChatKVMemory(memory).with_structured_output(PierDict, include_raw=True).invoke("Which pier?", max_tokens=99)
    )
    if result["parsing_error"] is None:  # a number may have any number of digits
        assert set(result["parsed"]) == {"number", "open"}
    result = ChatKVMemory(memory).with_structured_output(PIER, include_raw=True).invoke("Open?")
    assert result["parsing_error"] is None and result["raw"].response_metadata["finish_reason"] == "stop"
    assert result["parsed"] in ({"open": True}, {"open": False})


async def test_structured_answers_stream_objects(memory: KVMemory) -> None:
    asked = ChatKVMemory(memory, max_tokens=80).with_structured_output(PIER)
    whole = await asked.ainvoke("Open?")
    assert [part async for part in asked.astream("Open?")][-1] == whole == list(asked.stream("Open?"))[-1]


def test_schemas_forbid_additional_properties_by_default() -> None:
    schema = json_schema_of(Quay)
    assert schema["additionalProperties"] is False and schema["$defs"]["Pier"]["additionalProperties"] is False
    assert schema["$defs"]["Pier"]["properties"]["number"]["maximum"] == 9  # nothing else is lost
    assert json_schema_of(PIER) == {**PIER, "additionalProperties": False}
    assert "additionalProperties" not in PIER  # the caller's own is left alone
    free = {**PIER, "additionalProperties": {"type": "string"}}
    assert json_schema_of(free) == free
    named = {"type": "object", "properties": {"properties": {"type": "string"}, "default": {"type": "string"}}}
    assert json_schema_of(named)["properties"] == named["properties"]
    several = {"type": "object", "allOf": [PIER, {"properties": {"number": {"type": "integer"}}}]}
    assert json_schema_of(several)["allOf"] == several["allOf"]
    assert json_schema_of({"enum": [{"properties": 1}]}) == {"enum": [{"properties": 1}]}


@pytest.mark.parametrize(
    ("schema", "options", "where"),
    [
        (Pier, {"method": "grammar"}, "method"),
        (Pier, {"colour": "red"}, "with_structured_output"),
        (7, {}, "with_structured_output(7)"),
        ({"colour": "red"}, {}, "with_structured_output({'colour': 'red'})"),
    ],
)
def test_invalid_schemas_and_methods_are_refused(llm: ChatKVMemory, schema: Any, options: Any, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.with_structured_output(schema, **options)
    assert caught.value.where == where
