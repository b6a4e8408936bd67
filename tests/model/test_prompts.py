from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import DEFAULT_SYSTEM_PROMPT, PASSAGE, PromptForm, chat_form, choose_form
from tests.conftest import SHORT_FORM, make_backbone, make_model, make_tokenizer

WITH_SYSTEM = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<bos>"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}[/]{% endfor %}[model] "
)
DROPS_SYSTEM = "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}</u>{% endfor %}<a>"
WITH_DATE = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}Today {{ today }}. "
    + (WITH_SYSTEM)
)
LOSES_TEXT = "<|system|>{{ messages[0].content }}<|user|>hello<|assistant|>"
DROPS_ALL = "hello"
ALWAYS_RAISES = "{{ raise_exception('never') }}"


def tokenizer_with(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def pieces(form: PromptForm) -> str:
    return form.prefix + form.document("THE DOCUMENT") + form.question("  WHY?\n")


def test_a_template_with_a_system_turn_gives_the_prefix() -> None:
    form = chat_form(tokenizer_with(WITH_SYSTEM))
    assert form.prefix == f"<|system|>{DEFAULT_SYSTEM_PROMPT}<|end|><|user|>"
    assert pieces(form) == form.prefix + "THE DOCUMENT\n\nWHY?<|end|><|assistant|>"
    assert not form.add_bos and form.name == "chat"


def test_brief_form_asks_for_a_few_words() -> None:
    form, chat = (choose_form(name, tokenizer_with(WITH_SYSTEM)) for name in ("brief", "chat"))
    assert form.name == "brief" and "a few words" in form.system_prompt and form.system_prompt in form.prefix
    assert replace(form, name="chat", prefix=chat.prefix, system_prompt=chat.system_prompt) == chat
    with pytest.raises(ConfigError, match="chat template"):
        choose_form("brief", tokenizer_with(None))


def test_a_rejected_system_turn_moves_into_the_user_turn() -> None:
    form = chat_form(tokenizer_with(WITHOUT_SYSTEM), system_prompt="Be brief.")
    assert pieces(form) == "<bos>[user] Be brief.\n\nTHE DOCUMENT\n\nWHY?[/][model] "


def test_a_dropped_system_turn_moves_into_the_user_turn() -> None:
    form = chat_form(tokenizer_with(DROPS_SYSTEM), system_prompt="Be brief.")
    assert pieces(form) == "<u>Be brief.\n\nTHE DOCUMENT\n\nWHY?</u><a>"


def test_the_prefix_does_not_change_with_the_date() -> None:
    form = chat_form(tokenizer_with("\n" + WITH_DATE))
    assert form.prefix.startswith("\nToday 26 Jul 2024. <|system|>")
    assert chat_form(tokenizer_with("\n" + WITH_SYSTEM)).prefix.startswith("\n<|system|>")


@pytest.mark.parametrize("template", [LOSES_TEXT, DROPS_ALL, ALWAYS_RAISES, None])
def test_unusable_templates_are_rejected(template: str | None) -> None:
    with pytest.raises(ConfigError, match="chat template") as caught:
        chat_form(tokenizer_with(template))
    assert caught.value.where == "prompt"
    assert caught.value.next_step is not None and "passage" in caught.value.next_step


def test_auto_uses_the_chat_template_if_there_is_one() -> None:
    model = make_model("llama")
    assert Backbone(model, tokenizer_with(None)).prompt is PASSAGE
    assert Backbone(model, tokenizer_with(WITH_SYSTEM)).prompt == chat_form(tokenizer_with(WITH_SYSTEM))
    assert Backbone(model, tokenizer_with(WITH_SYSTEM), prompt="passage").prompt is PASSAGE
    with pytest.raises(ConfigError):
        Backbone(model, tokenizer_with(None), prompt="chat")


def test_digest_covers_every_field_that_reaches_the_model() -> None:
    form = PromptForm(**SHORT_FORM)
    assert replace(form, name="other").digest == replace(form, stop=("x",)).digest == form.digest
    for field in ("prefix", "document_before", "document_after", "question_before", "question_after"):
        assert replace(form, **{field: "changed"}).digest != form.digest, field
    assert replace(form, add_bos=False).digest != form.digest


# -- special tokens around the prefix ----------------------------------------------------------------------------------


def with_specials(*, bos: bool, eos: bool) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_only_a_start_token_joins_the_prefix(bos: bool, add_bos: bool, eos: bool) -> None:
    form = PromptForm(**SHORT_FORM, add_bos=add_bos)  # type: ignore[arg-type]
    backbone = Backbone(make_model("llama"), with_specials(bos=bos, eos=eos), prompt=form)
    text = backbone.encode("Read this. ")
    assert len(text) == 11 and not set(text) & {1, 2}
    assert list(backbone.prefix_ids) == ([1] if bos and add_bos else []) + text
    assert not set(backbone.encode_document("a")) & {1, 2}
    assert not set(backbone.encode_question("b")) & {1, 2}


def test_an_end_token_in_the_form_is_kept() -> None:
    form = PromptForm(**{**SHORT_FORM, "prefix": "Hello</s>"}, add_bos=False)  # type: ignore[arg-type]
    assert Backbone(make_model("llama"), make_tokenizer(), prompt=form).prefix_ids[-1] == 2


def test_document_and_question_are_tokenised_separately() -> None:
    backbone = make_backbone()
    form = backbone.prompt
    text = "a document"
    assert backbone.tokenizer.decode(backbone.encode_document(text)) == form.document(text)
    assert backbone.tokenizer.decode(backbone.encode_question(" why? ")) == form.question("why?")
    assert json.loads(json.dumps(SHORT_FORM))["question_before"] + "why?\nA:" == form.question("why?")


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)
THINKS_UNLESS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '</think>' if not thinking else '<think>' }}"
)
EFFORT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}[{{ reasoning_effort | default('medium') }}]"


@pytest.mark.parametrize(
    ("template", "switch", "default", "switched"),
    [
        (THINKS, {"enable_thinking": True}, "<assistant><think></think>", "<assistant>"),
        (THINKS_UNLESS, {"thinking": True}, "</think>", "<think>"),
        (EFFORT, {"reasoning_effort": "high"}, "[low]", "[high]"),
    ],
)
def test_thinking_is_off_unless_it_is_switched_on(
    template: str, switch: dict[str, object], default: str, switched: str
) -> None:
    tokenizer = tokenizer_with(template)
    assert chat_form(tokenizer).question_after == default
    assert chat_form(tokenizer, switches=switch).question_after == switched
    assert chat_form(tokenizer, switches=switch).digest != chat_form(tokenizer).digest
