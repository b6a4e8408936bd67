"""Structured answers: converts LangChain's kinds of schema to JSON schema, and parses the JSON answers."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from kv_memory import ConfigError
from kv_memory.config import check_choice

from ..llms import closed

Method = Literal["json_schema", "json_mode", "function_calling"]
_JSON_SCHEMA = {"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}


class _Whole:
    """Parses complete JSON only; LangChain's own parsers would close the brackets of JSON that was cut off."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if not partial:
            try:
                json.loads(result[0].text)
            except ValueError as error:
                raise OutputParserException(
                    f"the answer is not complete JSON: {error}. Raise max_tokens of the model, or ask for less.",
                    llm_output=result[0].text,
                ) from error
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _WholeJson(_Whole, JsonOutputParser):
    pass


class _WholeObject(_Whole, PydanticOutputParser[Any]):
    pass


def json_schema_of(schema: dict[str, Any] | type) -> dict[str, Any]:
    """A pydantic class, a TypedDict, an OpenAI function or a JSON schema, as a JSON schema.

    Objects may have no additional properties unless the schema allows them explicitly, see `closed`.

    Raises:
        ConfigError: `schema` is something else.
    """
    if isinstance(schema, dict) and _JSON_SCHEMA & schema.keys() and schema.get("type") != "function":
        return dict(closed(schema))  # LangChain's conversion requires a title, and drops keywords that tools lack
    try:
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            model: Any = schema
            found = model.model_json_schema() if hasattr(model, "model_json_schema") else model.schema()
        else:
            found = convert_to_json_schema(schema)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"not a valid schema: {error}",
            where=f"with_structured_output({schema!r:.80})",
            next_step="Pass a pydantic class, a TypedDict, or a JSON schema as a dict.",
        ) from error
    return dict(closed(found))


def structured(
    model: Runnable[LanguageModelInput, AIMessage], schema: dict[str, Any] | type, *, method: str, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """The runnable that `ChatKVMemory.with_structured_output` returns."""
    check_choice(method, Method, where="method")
    parser: JsonOutputParser = _WholeJson()
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = _WholeObject(pydantic_object=schema)
    bound: Runnable[LanguageModelInput, AIMessage] = model.bind(
        json_schema=json.dumps(json_schema_of(schema)),
        ls_structured_output_format={"kwargs": {"method": method}, "schema": schema},  # for tracers
    )
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    # The model comes first, not inside the map: options that are bound or passed with a call reach only the first step.
    return (
        bound | RunnableMap(raw=RunnablePassthrough()) | parsed.with_fallbacks([failed], exception_key="parsing_error")
    )
