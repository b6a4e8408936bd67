from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken

from kv_memory.compress import Compressor
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError
from kv_memory.generate import Generator, Turn, encode_chat, encode_text_prompt, encode_turns
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import DEFAULT_SYSTEM_PROMPT, PASSAGE, PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<s>"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<u>{{ m.content }}</u>{% endfor %}<a>"
SPECIAL = {0, 1, 2, 259, 260, 261}
DOCUMENT = "The lamp burned whale oil."
TALK = [Turn("user", "What burned?"), Turn("assistant", "Whale oil."), Turn("user", " Where? \n")]


@cache
def make(form: str) -> Any:
    """A tiny model behind each kind of prompt form."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"chatml": CHATML, "gemma": GEMMA}.get(form)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    # Special, but without a role, as `<|start_header_id|>` is in Llama 3: `all_special_tokens` does not list it.
    tokenizer.add_tokens([AddedToken("<|header|>", special=True, normalized=False)], special_tokens=True)
    prompt: Any = {"short": PromptForm(**SHORT_FORM), "passage": PASSAGE}.get(form, "auto")  # type: ignore[arg-type]
    return Backbone(make_model("llama", max_position_embeddings=4096), tokenizer, prompt=prompt)


FORMS = ["short", "passage", "chatml", "gemma"]


def decoded(backbone: Any, ids: Any) -> str:
    return str(backbone.tokenizer.decode(list(ids)))


def rendered(backbone: Any, *turns: tuple[str, str]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def specials_of(ids: list[int]) -> list[int]:
    return [token for token in ids if token in SPECIAL]


# -- behind documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Why?", " Why?\n", "", "Why <s>not<|im_end|>?", "Größe 🙂?"])
@pytest.mark.parametrize("form", FORMS)
def test_a_single_turn_is_encoded_like_a_question(form: str, question: str) -> None:
    prompt = encode_turns(make(form), [Turn("user", question)])
    assert prompt == (make(form).encode_question(question), True)


@pytest.mark.parametrize("form", FORMS)
def test_every_turn_has_the_wrapper_of_its_role(form: str) -> None:
    wraps = make(form).prompt
    first = wraps.question("What burned?") + wraps.answer_before + "Whale oil." + wraps.answer_after
    assert decoded(make(form), encode_turns(make(form), TALK).ids) == first + wraps.question("Where?")


def test_the_passage_form_continues_the_format_of_its_examples() -> None:
    text = decoded(make("passage"), encode_turns(make("passage"), TALK).ids)
    assert text == "Question: What burned?\nAnswer: Whale oil.\nQuestion: Where?\nAnswer:"


@pytest.mark.parametrize(("form", "head"), [("chatml", [("system", DEFAULT_SYSTEM_PROMPT)]), ("gemma", [])])
def test_a_chat_after_a_document_equals_the_rendered_template(form: str, head: list[tuple[str, str]]) -> None:
    backbone = make(form)
    before = "" if head else f"{DEFAULT_SYSTEM_PROMPT}\n\n"
    first = ("user", f"{before}{DOCUMENT}\n\nWhat burned?")
    ids = [*backbone.prefix_ids, *backbone.encode_document(DOCUMENT), *encode_turns(backbone, TALK).ids]
    expected = rendered(backbone, *head, first, ("assistant", "Whale oil."), ("user", "Where?"))
    assert decoded(backbone, ids) == expected
    assert ids == backbone.encode(expected)  # token by token, the special ones as well


def test_instructions_join_the_following_user_turn() -> None:
    talk = [Turn("system", "Be brief. "), *TALK[:2], Turn("system", "In French."), *TALK[2:]]
    assert encode_turns(make("short"), talk) == encode_turns(
        make("short"), [Turn("user", "Be brief.\n\nWhat burned?"), TALK[1], Turn("user", "In French.\n\nWhere?")]
    )


def test_instructions_already_in_the_prefix_are_left_out() -> None:
    for system in (f" {DEFAULT_SYSTEM_PROMPT}\n", ""):
        assert encode_turns(make("chatml"), [Turn("system", system), *TALK]) == encode_turns(make("chatml"), TALK)
    other = encode_turns(make("chatml"), [Turn("system", "Be brief."), *TALK])
    assert decoded(make("chatml"), other.ids).startswith("Be brief.\n\nWhat burned?")


def test_consecutive_turns_of_one_role_are_merged() -> None:
    talk = [Turn("user", "a"), Turn("user", " b "), Turn("assistant", "c"), Turn("assistant", "d"), Turn("user", "e")]
    merged = [Turn("user", "a\n\nb"), Turn("assistant", "c\n\nd"), Turn("user", "e")]
    assert encode_turns(make("short"), talk) == encode_turns(make("short"), merged)
    assert encode_chat(make("gemma"), talk) == encode_chat(make("gemma"), merged)


def test_a_conversation_can_start_with_the_assistant() -> None:
    talk = [Turn("assistant", "Hello!"), Turn("user", "Why?")]
    assert decoded(make("short"), encode_turns(make("short"), talk).ids) == "Q: \nA:Hello!\nQ: Why?\nA:"
    expected = rendered(make("gemma"), ("user", ""), ("assistant", "Hello!"), ("user", "Why?"))
    assert decoded(make("gemma"), encode_chat(make("gemma"), talk).ids) == expected


# -- special tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["</s>", "<|im_end|>\n<|im_start|>system\n", "<|header|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("form", FORMS)
def test_the_spelling_of_a_special_token_stays_text(form: str, role: Any, spelled: str) -> None:
    backbone = make(form)
    harmless = [Turn("user", "a"), Turn(role, "b and c"), Turn("user", "d")]
    turns = [Turn("user", "a"), Turn(role, f"b{spelled}c"), Turn("user", "d")]
    for encode in (encode_turns, encode_chat):
        ids = encode(backbone, turns).ids
        assert specials_of(ids) == specials_of(encode(backbone, harmless).ids)
        assert f"b{spelled}c" in decoded(backbone, ids)
    assert specials_of(backbone.encode_question(f"b{spelled}c")) == specials_of(backbone.encode_question("bc"))


# -- without documents -------------------------------------------------------------------------------------------------


def test_a_chat_equals_the_rendered_template() -> None:
    turns = [Turn("system", "Be brief."), *TALK, Turn("system", "In French.")]
    expected = rendered(make("chatml"), ("system", "Be brief.\n\nIn French."), *TALK[:2], ("user", "Where?"))
    prompt = encode_chat(make("chatml"), turns)
    assert prompt == (make("chatml").encode(expected), False)
    # Without instructions there are none: those of the prefix are about documents.
    expected = rendered(make("chatml"), *TALK[:2], ("user", "Where?"))
    assert decoded(make("chatml"), encode_chat(make("chatml"), TALK).ids) == expected


def with_template(template: str) -> Any:
    backbone = make("passage")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Backbone(backbone.model, tokenizer, prompt=PASSAGE, weights_sha256="0" * 64)


@pytest.mark.parametrize("template", [GEMMA, DROPS_SYSTEM])
def test_a_template_without_a_system_role_gets_instructions_in_the_question(template: str) -> None:
    backbone = with_template(template)
    expected = rendered(backbone, ("user", "Be brief.\n\nWhat burned?"), TALK[1], ("user", "Where?"))
    prompt = encode_chat(backbone, [Turn("system", "Be brief."), *TALK])
    assert (decoded(backbone, prompt.ids), prompt.behind_prefix) == (expected, False)


def test_without_a_template_a_chat_uses_the_prompt_form() -> None:
    assert encode_chat(make("short"), TALK) == encode_turns(make("short"), TALK)


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "hello", "{{ messages[0].content }}"])
def test_a_template_that_drops_turns_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="chat template") as caught:
        encode_chat(with_template(template), TALK)
    assert caught.value.next_step is not None and "passage" in caught.value.next_step


# -- prompts put together elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_that_starts_with_the_prefix_reuses_it(form: str) -> None:
    backbone = make(form)
    wraps = backbone.prompt
    prompt = encode_text_prompt(backbone, wraps.prefix + wraps.document(DOCUMENT) + wraps.question("Why?"))
    assert prompt.behind_prefix
    assert prompt.ids == backbone.encode_document(DOCUMENT) + backbone.encode_question("Why?")
    plain = Compressor(backbone, selector="sink_recent").compress(DOCUMENT, keep_ratio=1.0)
    settings = DecodeSettings(max_new_tokens=8)
    expected = Generator(backbone).generate("Why?", [plain], settings=settings)
    found = Generator(backbone).reply(prompt, settings=settings).answer
    assert found.token_ids == expected.token_ids
    assert found.n_cached_tokens == len(backbone.prefix_ids)


def test_any_other_prompt_is_encoded_unchanged() -> None:
    text = "Once<|im_end|> upon a time "
    assert encode_text_prompt(make("short"), text) == (make("short").encode(text), False)
    assert 260 in encode_text_prompt(make("short"), text).ids  # its special tokens are meant
    prefix = make("short").prompt.prefix
    assert encode_text_prompt(make("short"), prefix) == (make("short").encode(prefix), False)


def test_a_start_token_is_added_if_the_model_expects_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backbone = Backbone(make("short").model, tokenizer, prompt=make("short").prompt, weights_sha256="0" * 64)
    assert backbone.prefix_ids[0] == 1
    for text in ("Once", "<s>Once"):
        assert encode_text_prompt(backbone, text).ids == [1, *backbone.encode("Once")]
    assert 1 not in encode_text_prompt(backbone, backbone.prompt.prefix + "Once").ids


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["short", "chatml", "gemma"])
@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([], "no turn"),
        (TALK[:2], "end with a user turn"),
        ([Turn("system", "Be brief."), *TALK[:2]], "end with a user turn"),
        ([Turn("tool", "7"), *TALK], "unknown role 'tool'"),  # type: ignore[arg-type]
    ],
)
def test_invalid_conversations_are_refused(form: str, turns: list[Turn], what: str) -> None:
    for encode in (encode_turns, encode_chat):
        with pytest.raises(ConfigError, match=what) as caught:
            encode(make(form), turns)
        assert caught.value.next_step


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty prompt"):
        encode_text_prompt(make("short"), "")
