from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError
from kv_memory.generate import Generator
from kv_memory.generate.constrain import JsonConstraint
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer
from tests.reference import shared_backbone

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": {"enum": ["walrus", "kettle"]}, "minItems": 5, "maxItems": 5}
SAMPLED: dict[str, Any] = {"temperature": 1.5, "seed": 3}


def is_person(value: Any) -> bool:
    return set(value) == {"name", "age"} and value["name"] in ("Ada", "Bo") and 0 <= value["age"] <= 99


SCHEMAS: dict[str, tuple[Any, Any]] = {
    "object": (PERSON, is_person),
    "enum": ({"enum": ["yes", "no"]}, lambda value: value in ("yes", "no")),
    "boolean": ({"type": "boolean"}, lambda value: isinstance(value, bool)),
    "string": ({"type": "string", "maxLength": 5}, lambda value: isinstance(value, str) and len(value) <= 5),
    "pattern": (
        {"type": "string", "pattern": "^[a-c]{3}$"},
        lambda value: len(value) == 3 and set(value) <= set("abc"),
    ),
    "integer": ({"type": "integer", "minimum": 7, "maximum": 12}, lambda value: 7 <= value <= 12),
    "list": (LONG, lambda value: len(value) == 5 and set(value) <= {"walrus", "kettle"}),
    "nested": (
        {
            "type": "object",
            "properties": {"who": PERSON, "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
            "required": ["who", "tags"],
            "additionalProperties": False,
        },
        lambda value: is_person(value["who"]) and len(value["tags"]) <= 2,
    ),
}


def following(schema: Any, **options: Any) -> DecodeSettings:
    return DecodeSettings(**{"max_new_tokens": 150, **options}, json_schema=json.dumps(schema))


@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_follow_the_schema(backbone: Any, name: str, options: dict[str, Any]) -> None:
    schema, holds = SCHEMAS[name]
    answer = Generator(backbone).generate("why?", settings=following(schema, **options))
    assert holds(json.loads(answer.text))
    assert answer.finish_reason == "stop"
    assert not answer.text[0].isspace()
    assert backbone.tokenizer.eos_token_id not in answer.token_ids  # no step is spent on what is complete


def test_different_seeds_give_different_answers_under_one_schema(backbone: Any) -> None:
    found = {
        Generator(backbone).generate("why?", settings=following(LONG, temperature=2.0, seed=seed)).text
        for seed in (1, 2, 3, 1)
    }
    assert len(found) == 3


def test_a_batch_equals_each_question_alone(backbone: Any) -> None:
    generator, questions = Generator(backbone), ["why?", "where is the lamp?", "who?"]
    settings = following(PERSON, **SAMPLED)
    together = generator.generate_batch(questions, settings=settings)
    assert all(is_person(json.loads(answer.text)) and answer.finish_reason == "stop" for answer in together)
    alone = [generator.generate(question, settings=settings) for question in questions]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_joined_pieces_equal_the_json(backbone: Any) -> None:
    settings = following(PERSON)
    expected = Generator(backbone).generate("why?", settings=settings)
    assert "".join(Generator(backbone).stream("why?", settings=settings)) == expected.text


def test_truncated_json_has_finish_reason_length(backbone: Any) -> None:
    answer = Generator(backbone).generate("why?", settings=following(LONG, max_new_tokens=10))
    assert answer.finish_reason == "length" and len(answer.token_ids) == 10
    assert answer.text.startswith('["')


def test_the_stop_strings_of_the_prompt_form_do_not_end_json(backbone: Any) -> None:
    form = PromptForm(**SHORT_FORM, stop=('"',))  # type: ignore[arg-type]
    other = Backbone(backbone.model, backbone.tokenizer, prompt=form, weights_sha256=backbone.weights_sha256)
    settings = following(PERSON)
    assert is_person(json.loads(Generator(other).generate("why?", settings=settings).text))
    one_of_ones_own = replace(settings, stop=(":",))
    assert Generator(other).generate("why?", settings=one_of_ones_own).text == '{"name"'


@pytest.mark.parametrize("name", ["gemma3", "phi3_longrope"])
def test_other_architectures_follow_the_schema(name: str) -> None:
    answer = Generator(shared_backbone(name)).generate("why?", settings=following(PERSON))
    assert is_person(json.loads(answer.text))


@pytest.mark.parametrize("vocab_size", [259, 300, 1000])
def test_ids_without_a_token_are_never_chosen(vocab_size: int) -> None:
    model = make_model("llama", vocab_size=vocab_size)
    backbone = Backbone(model, make_tokenizer(), prompt=PromptForm(**SHORT_FORM))  # type: ignore[arg-type]
    constraint = JsonConstraint(backbone, json.dumps({"enum": ["yes", "no"]}))
    allowed = constraint.mask(torch.zeros(vocab_size)).isfinite().nonzero().flatten().tolist()
    assert allowed == backbone.encode('"')
    assert not constraint.push(allowed[0])
    settings = following({"type": "string", "maxLength": 20}, temperature=5.0, seed=1)
    answer = Generator(backbone).generate("why?", settings=settings)
    assert isinstance(json.loads(answer.text), str) and max(answer.token_ids) < 259


# -- what cannot be followed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    ["", "{", "no JSON", "7", "[]", '{"type": "nothing"}', '{"$ref": "#/nowhere"}', '{"type":"string","pattern":"("}'],
)
def test_unsupported_schemas_are_refused(backbone: Any, schema: str) -> None:
    settings = DecodeSettings(json_schema=schema)
    for call in (Generator(backbone).generate, Generator(backbone).stream):
        with pytest.raises(ConfigError, match="cannot be followed") as caught:
            call("why?", settings=settings)
        assert caught.value.where == "json_schema" and caught.value.next_step


def test_a_schema_must_be_a_json_string() -> None:
    with pytest.raises(ConfigError, match="JSON, as a str") as caught:
        DecodeSettings(json_schema=PERSON)  # type: ignore[arg-type]
    assert caught.value.where == "json_schema"


def test_without_llguidance_the_error_names_the_extra(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        Generator(backbone).generate("why?", settings=following(PERSON))
    assert caught.value.next_step is not None and "kv-memory[structured]" in caught.value.next_step
    assert Generator(backbone).generate("why?", settings=DecodeSettings(max_new_tokens=2)).token_ids
