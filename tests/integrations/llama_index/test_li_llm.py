from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import LLM
from llama_index.core.query_engine import RetrieverQueryEngine
from pydantic import BaseModel

from kv_memory import (
    CacheNotFoundError,
    ConfigError,
    DecodeSettings,
    DecodeTimeoutError,
    KVMemory,
    Reference,
    Turn,
    UnsupportedRequestError,
)
from kv_memory.integrations.llama_index import KVMemoryLLM
from kv_memory.query import key_of
from tests.conftest import make_model, make_tokenizer
from tests.integrations.llama_index.li_samples import WALRUS, WordRetriever, keys_of, recorded_texts, two_nodes
from tests.memories import FERRY, FERRY_QUESTION, LAMP
from tests.reference import recorded_inputs

SAMPLED: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 7}
ASKED = [ChatMessage(role="user", content=FERRY_QUESTION)]
BRACES = "What is {this}, {{that}} and {?"


def settings_of(options: dict[str, Any]) -> DecodeSettings:
    return DecodeSettings(
        max_new_tokens=options["max_tokens"], temperature=options["temperature"], seed=options["seed"]
    )


async def every_form(llm: Any, question: str, **options: Any) -> dict[str, Any]:
    """The last response of every way to ask."""
    messages = [ChatMessage(role="user", content=question)]
    streamed = {
        "stream_complete": list(llm.stream_complete(question, **options)),
        "stream_chat": list(llm.stream_chat(messages, **options)),
        "astream_complete": [part async for part in await llm.astream_complete(question, **options)],
        "astream_chat": [part async for part in await llm.astream_chat(messages, **options)],
    }
    for parts in streamed.values():
        assert "".join(part.delta for part in parts) == text_of(parts[-1])
        texts = [text_of(part) for part in parts]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert all(part.raw is None for part in parts[:-1])
    return {
        "complete": llm.complete(question, **options),
        "chat": llm.chat(messages, **options),
        "acomplete": await llm.acomplete(question, **options),
        "achat": await llm.achat(messages, **options),
        **{form: parts[-1] for form, parts in streamed.items()},
    }


def text_of(response: Any) -> str:
    return response.message.content or "" if hasattr(response, "message") else response.text


# -- the same answer, however it is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, 8, 9])
async def test_all_call_forms_answer_from_caches_like_the_reader(memory: KVMemory, llm: KVMemoryLLM, seed: int) -> None:
    options = {**SAMPLED, "seed": seed}
    references = [Reference(key=key_of(text)) for text in (FERRY, LAMP)]
    turns = [Turn("user", FERRY_QUESTION)]
    expected = memory.reader.reply(turns, references, settings=settings_of(options)).answer
    found = await every_form(llm, FERRY_QUESTION, kv_ids=keys_of(FERRY, LAMP), **options)
    assert {form: text_of(response) for form, response in found.items()} == dict.fromkeys(found, expected.text.strip())
    for response in found.values():
        usage = response.raw["usage"]
        assert usage["prompt_tokens"] == expected.n_prompt_tokens + expected.n_cached_tokens
        assert usage["prompt_tokens_details"]["cached_tokens"] == expected.n_cached_tokens
        assert usage["completion_tokens"] == expected.n_new_tokens
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert response.raw["finish_reason"] == expected.finish_reason and "next_step" not in response.raw
        assert 0 < response.raw["ttft_s"] <= response.raw["total_s"]


async def test_all_call_forms_answer_without_references_like_the_reader(memory: KVMemory, llm: KVMemoryLLM) -> None:
    expected = memory.reader.reply_alone([Turn("user", FERRY_QUESTION)], settings=settings_of(SAMPLED)).answer
    found = await every_form(llm, FERRY_QUESTION, **SAMPLED)
    assert {form: text_of(response) for form, response in found.items()} == dict.fromkeys(found, expected.text.strip())


def test_references_can_be_attached_to_a_message(memory: KVMemory, llm: KVMemoryLLM, wide: Any) -> None:
    bringing = ChatMessage(role="system", content="", additional_kwargs={"kv_ids": keys_of(FERRY)})
    with recorded_texts(wide) as texts:
        response = llm.chat([bringing, *ASKED], **SAMPLED)
    assert texts == [wide.prompt.question(FERRY_QUESTION)]
    assert text_of(response) == text_of(llm.chat(ASKED, kv_ids=keys_of(FERRY), **SAMPLED))
    # What both name is read once; what only the option names comes behind.
    both = llm.chat([bringing, *ASKED], kv_ids=keys_of(LAMP, FERRY), **SAMPLED)
    assert text_of(both) == text_of(llm.chat(ASKED, kv_ids=keys_of(FERRY, LAMP), **SAMPLED))


def test_an_empty_reference_list_still_uses_the_cached_prefix(chat_llm: KVMemoryLLM, chat_backbone: Any) -> None:
    with recorded_texts(chat_backbone) as texts:
        response = chat_llm.chat(ASKED, kv_ids=[])
    assert texts == [chat_backbone.prompt.question(FERRY_QUESTION)]  # behind the prefix
    assert response.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == len(chat_backbone.prefix_ids)


# -- an ordinary LLM ---------------------------------------------------------------------------------------------------


def test_chats_use_the_models_own_template(chat_llm: KVMemoryLLM, chat_backbone: Any) -> None:
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hello."),
        ChatMessage(role="assistant", content="Hello!"),
        ChatMessage(role="user", content=BRACES),
    ]
    with recorded_texts(chat_backbone) as texts:
        chat_llm.chat(messages)
        chat_llm.complete("Why?")
    assert texts == [
        f"<system>Be brief.\n<user>Hello.\n<assistant>Hello!\n<user>{BRACES}\n<assistant>",
        "<user>Why?\n<assistant>",
    ]


def test_a_formatted_completion_is_prefilled_unchanged(chat_llm: KVMemoryLLM, chat_backbone: Any) -> None:
    with recorded_texts(chat_backbone) as texts:
        chat_llm.complete("Once upon a time", formatted=True)
        list(chat_llm.stream_complete("Twice upon a time", formatted=True))
    assert texts == ["Once upon a time", "Twice upon a time"]


def test_custom_prompt_functions_are_used(memory: KVMemory, wide: Any) -> None:
    def to_prompt(messages: Sequence[ChatMessage]) -> str:
        return "|".join(f"{message.role.value}={message.content}" for message in messages)

    llm = KVMemoryLLM(memory, max_tokens=2, messages_to_prompt=to_prompt, completion_to_prompt=lambda text: f"<{text}>")
    with recorded_texts(wide) as texts:
        llm.chat([ChatMessage(role="system", content="Be brief."), *ASKED])
        llm.complete("Why?")
        llm.complete("Why?", formatted=True)
    assert texts == [f"system=Be brief.|user={FERRY_QUESTION}", "<Why?>", "Why?"]
    with recorded_texts(wide) as texts:
        llm.chat(ASKED, kv_ids=keys_of(FERRY))
    assert texts == [wide.prompt.question(FERRY_QUESTION)]  # caches stand behind the prompt they were made behind


def test_metadata_describe_the_model(llm: KVMemoryLLM) -> None:
    found = llm.metadata
    assert (found.context_window, found.num_output, found.model_name) == (4096, 6, "tiny-llama")
    assert found.is_chat_model and not found.is_function_calling_model
    assert isinstance(llm, LLM) and llm.class_name() == "KVMemoryLLM"
    assert "memory" not in llm.to_dict()


def test_open_creates_the_store_of_an_llm(tmp_path: Path) -> None:
    make_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    llm = KVMemoryLLM.open(
        tmp_path / "store",
        model=tmp_path / "model",
        device="cpu",
        keep_ratio=0.5,
        keep_text=True,
        collection="tenant",
        max_tokens=2,
    )
    with llm.memory as memory:
        assert memory.settings.keep_text
        assert (memory.settings.keep_ratio, memory.collection) == (0.5, "tenant")
        with KVMemoryLLM.open(memory.path, model=tmp_path / "model", max_bytes=10**6).memory as other:
            assert (other.settings.keep_ratio, other.settings.max_bytes) == (None, 10**6)
        assert llm.complete("Why?").raw["usage"]["completion_tokens"] <= 2


async def test_predict_and_stream_give_the_same_answer(
    memory: KVMemory, chat_llm: KVMemoryLLM, chat_backbone: Any
) -> None:
    prompt = PromptTemplate("Say {what}.")
    with recorded_texts(chat_backbone) as texts:
        said = chat_llm.predict(prompt, what=BRACES)
        assert await chat_llm.apredict(prompt, what=BRACES) == said
        assert "".join(chat_llm.stream(prompt, what=BRACES)) == said
        assert "".join([piece async for piece in await chat_llm.astream(prompt, what=BRACES)]) == said
    assert texts == [f"<user>Say {BRACES}.\n<assistant>"] * 4
    assert said == text_of(chat_llm.complete(f"Say {BRACES}."))


def test_a_stock_synthesizer_prefills_the_text(llm: KVMemoryLLM, wide: Any) -> None:
    engine = RetrieverQueryEngine.from_args(WordRetriever(two_nodes()), llm=llm)
    with recorded_texts(wide) as texts:
        response = engine.query(FERRY_QUESTION)
    (prompt,) = texts
    assert FERRY in prompt and FERRY_QUESTION in prompt and LAMP not in prompt
    assert str(response)


class Departure(BaseModel):
    """Which ferry leaves when."""

    pier: Literal[4, 5]
    daily: bool


async def test_structured_answers_fit_their_schema(memory: KVMemory) -> None:
    llm = KVMemoryLLM(memory, max_tokens=100, temperature=1.0, seed=3)
    prompt = PromptTemplate("Which ferry is {it}?")
    answer = llm.structured_predict(Departure, prompt, it="this")
    assert isinstance(answer, Departure)
    assert await llm.astructured_predict(Departure, prompt, it="this") == answer


def test_a_truncated_structured_answer_is_an_error(memory: KVMemory) -> None:
    with pytest.raises(ConfigError, match="cut off") as caught:
        KVMemoryLLM(memory, max_tokens=3).structured_predict(Departure, PromptTemplate("Which?"))
    assert "max_tokens" in str(caught.value.next_step)


# -- options -----------------------------------------------------------------------------------------------------------


async def test_options_of_a_call_override_those_of_the_llm(memory: KVMemory) -> None:
    llm = KVMemoryLLM(memory, max_tokens=5, temperature=1.0, seed=1)
    own = llm.complete(FERRY_QUESTION)
    assert own.raw["usage"]["completion_tokens"] == 5 and own.raw["finish_reason"] == "length"
    longer = await every_form(llm, FERRY_QUESTION, **SAMPLED)
    assert {response.raw["usage"]["completion_tokens"] for response in longer.values()} == {24}
    assert text_of(longer["chat"]) == text_of(KVMemoryLLM(memory, **SAMPLED).chat(ASKED))
    assert llm.complete(FERRY_QUESTION).text == own.text


def test_sampling_depends_on_the_seed(llm: KVMemoryLLM) -> None:
    texts = [llm.complete("Why?", **{**SAMPLED, "seed": seed}).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


async def test_a_stop_string_ends_the_answer(llm: KVMemoryLLM) -> None:
    whole = llm.complete("Why?", **SAMPLED).text
    stop = whole[5]
    for response in (await every_form(llm, "Why?", stop=stop, **SAMPLED)).values():
        assert text_of(response) == whole.partition(stop)[0].strip()
        assert response.raw["finish_reason"] == "stop"


async def test_an_empty_answer_comes_with_a_next_step(llm: KVMemoryLLM) -> None:
    first = llm.complete("Why?", **SAMPLED).text[0]
    for response in (await every_form(llm, "Why?", stop=first, **SAMPLED)).values():
        assert text_of(response) == "" and "the stop string" in response.raw["next_step"]


async def test_white_space_around_an_answer_is_stripped(llm: KVMemoryLLM) -> None:
    for seed in range(10):  # a random model breaks the line in most answers, and which is another torch's to say
        options = {**SAMPLED, "max_tokens": 200, "seed": seed}
        whole = llm.complete("Why?", **options).text
        if gap := re.search(r"\S\s+(\S+)", whole):
            break
    assert gap is not None
    for response in (await every_form(llm, "Why?", stop=[gap[1]], **options)).values():
        assert text_of(response) == whole[: gap.start() + 1]


async def test_a_call_over_its_time_limit_raises(llm: KVMemoryLLM) -> None:
    with pytest.raises(DecodeTimeoutError, match="s; 1 token"):
        llm.complete("Why?", timeout=1e-6)
    with pytest.raises(DecodeTimeoutError):
        await llm.achat(ASKED, timeout=1e-6)
    with pytest.raises(DecodeTimeoutError):
        list(llm.stream_chat(ASKED, timeout=1e-6))
    with pytest.raises(DecodeTimeoutError):
        [part async for part in await llm.astream_complete("Why?", timeout=1e-6)]


def test_options_out_of_range_are_refused(memory: KVMemory, llm: KVMemoryLLM) -> None:
    with pytest.raises(ConfigError):
        llm.complete("Why?", temperature=-1)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        KVMemoryLLM(memory, max_tokens=0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("temprature", "temperature"), ("keep_txt", "keep_text"), ("max_token", "max_tokens"), ("memory", None)],
)
def test_unknown_options_are_refused_before_anything_is_made(
    tmp_path: Path, memory: KVMemory, llm: KVMemoryLLM, name: str, nearest: str | None
) -> None:
    attempts = [lambda: KVMemoryLLM.open(tmp_path / "none", **{name: 1})]
    if nearest in KVMemoryLLM.model_fields:
        attempts += [lambda: KVMemoryLLM(memory, **{name: 1}), lambda: llm.complete("Why?", **{name: 1})]
    for attempt in attempts:
        with pytest.raises(ConfigError, match=f"unknown option '{name}'") as caught:
            attempt()
        assert nearest is None or repr(nearest) in str(caught.value.next_step)
    assert not (tmp_path / "none").exists()


def test_tokens_are_counted_by_llama_index(memory: KVMemory) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [])
    llm = KVMemoryLLM(memory, max_tokens=4, callback_manager=CallbackManager([counter]))
    usage = [llm.chat(ASKED, kv_ids=keys_of(FERRY)).raw["usage"], list(llm.stream_complete("Why?"))[-1].raw["usage"]]
    assert counter.prompt_llm_token_count == sum(use["prompt_tokens"] for use in usage)
    assert counter.completion_llm_token_count == sum(use["completion_tokens"] for use in usage) == 8


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_tools_are_refused(llm: KVMemoryLLM, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        for options in ({"tools": [{"name": "search"}]}, {"tool_choice": "auto"}, {"functions": [{}]}):
            with pytest.raises(UnsupportedRequestError, match="cannot call tools") as caught:
                llm.chat(ASKED, **options)
            assert caught.value.next_step is not None and "as a tool" in caught.value.next_step
        with pytest.raises(UnsupportedRequestError):
            llm.predict_and_call([], "Why?")
        with pytest.raises(UnsupportedRequestError):
            await llm.apredict_and_call([], "Why?")
        with pytest.raises(UnsupportedRequestError, match="tools"):
            llm.chat([ChatMessage(role=MessageRole.TOOL, content="42"), *ASKED])
        calling = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [{"id": "1"}]})
        with pytest.raises(UnsupportedRequestError, match="assistant"):
            llm.chat([calling, *ASKED])
    assert inputs == []
    assert llm.chat(ASKED, tools=[]).message.content  # none are none


def test_images_are_refused(llm: KVMemoryLLM) -> None:
    picture = ChatMessage(role="user", blocks=[ImageBlock(image=b"")])
    with pytest.raises(UnsupportedRequestError, match="text only") as caught:
        llm.chat([picture])
    assert "ImageBlock" in str(caught.value)


async def test_unknown_references_are_refused(llm: KVMemoryLLM, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        for ids, kind in ((keys_of(WALRUS), CacheNotFoundError), (["node-17"], ConfigError)):
            with pytest.raises(kind):
                llm.chat(ASKED, kv_ids=ids)
            with pytest.raises(kind):
                llm.stream_complete("Why?", kv_ids=ids)
            with pytest.raises(kind):
                await llm.acomplete("Why?", kv_ids=ids)
            with pytest.raises(kind):
                await llm.astream_chat(ASKED, kv_ids=ids)
    assert inputs == []


def test_a_conversation_must_end_with_a_user_turn(llm: KVMemoryLLM) -> None:
    with pytest.raises(ConfigError, match="end with a user turn"):
        llm.chat([*ASKED, ChatMessage(role="assistant", content="At 7.40.")])
    with pytest.raises(ConfigError):
        llm.chat([])
