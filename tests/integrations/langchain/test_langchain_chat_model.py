"""ChatKVMemory beyond LangChain's standard suites: references, figures, options, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from kv_memory import ConfigError, KVMemory, Reference, Turn, UnsupportedRequestError, errors
from kv_memory.integrations.langchain import ChatKVMemory
from kv_memory.integrations.llms import Trim
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION, LAMP, SETTINGS, open_memory
from tests.reference import recorded_inputs

FERRY_ID, LAMP_ID = str(Reference(key=key_of(FERRY))), str(Reference(key=key_of(LAMP)))


def usage(message: Any) -> tuple[int, int, int]:
    """Tokens prefilled, tokens read from caches, tokens decoded."""
    counts = message.usage_metadata
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]
    n_cached = counts["input_token_details"]["cache_read"]
    return counts["input_tokens"] - n_cached, n_cached, counts["output_tokens"]


# -- replies -----------------------------------------------------------------------------------------------------------


def test_without_references_it_is_an_ordinary_chat_model(memory: KVMemory, llm: ChatKVMemory) -> None:
    history = [SystemMessage("Be brief."), HumanMessage("Hello"), AIMessage("Hello."), HumanMessage("Who are you?")]
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Hello"),
        Turn("assistant", "Hello."),
        Turn("user", "Who are you?"),
    ]
    message, reply = llm.invoke(history), memory.reader.reply_alone(turns, settings=SETTINGS).answer
    assert message.content == reply.text.strip() != ""
    assert usage(message) == (reply.n_prompt_tokens, reply.n_cached_tokens, reply.n_new_tokens)
    metadata = message.response_metadata
    assert metadata["model_name"] == "tiny-llama" and metadata["model_provider"] == "kv_memory"
    assert metadata["finish_reason"] == "length" and 0 < metadata["ttft_s"] <= metadata["total_s"]


def test_references_are_answered_from_caches(memory: KVMemory, llm: ChatKVMemory, wide: Any) -> None:
    references = [Reference.parse(FERRY_ID), Reference.parse(LAMP_ID)]
    reply = memory.reader.reply([Turn("user", FERRY_QUESTION)], references, settings=SETTINGS).answer
    with recorded_inputs(wide) as inputs:
        message = llm.invoke(FERRY_QUESTION, kv_ids=[FERRY_ID, LAMP_ID])
    assert message.content == reply.text.strip()
    assert usage(message) == (len(wide.encode_question(FERRY_QUESTION)), reply.n_cached_tokens, 4)
    assert inputs[0].tolist() == [wide.encode_question(FERRY_QUESTION)]
    assert llm.bind(kv_ids=references).invoke(FERRY_QUESTION).content == message.content
    assert llm.invoke(FERRY_QUESTION, kv_ids=[LAMP_ID, FERRY_ID]).usage_metadata == message.usage_metadata
    assert llm.invoke(FERRY_QUESTION, kv_ids=FERRY_ID).usage_metadata != message.usage_metadata


def test_an_empty_reference_list_still_uses_the_cached_prefix(memory: KVMemory, llm: ChatKVMemory) -> None:
    reply = memory.reader.reply([Turn("user", "Hello")], settings=SETTINGS).answer
    assert usage(llm.invoke("Hello", kv_ids=[])) == (reply.n_prompt_tokens, reply.n_cached_tokens, 4)


def test_texts_are_prefilled_if_there_is_no_cache(llm: ChatKVMemory, wide: Any) -> None:
    text = "The kiosk on the quay sells waffles."
    key = key_of(text)
    n_question, n_text = len(wide.encode_question("Waffles?")), len(wide.encode_document(text))
    message = llm.invoke("Waffles?", kv_ids=[key, FERRY_ID], kv_texts={key: text, key_of(FERRY): FERRY})
    assert usage(message)[0] == n_question + n_text  # the ferry's text is not read: it has a cache
    assert llm.invoke("Waffles?", kv_ids=[Reference(key=key, text=text)]).usage_metadata["input_tokens"] > n_text  # type: ignore[index]


@pytest.mark.parametrize("options", [{}, {"kv_ids": [FERRY_ID]}, {"stop": ["e"]}])
async def test_all_four_call_forms_give_the_same_answer(memory: KVMemory, options: dict[str, Any]) -> None:
    llm = ChatKVMemory(memory, max_tokens=24, temperature=1.2, seed=5)
    messages: list[Any] = [llm.invoke("Hello", **options), await llm.ainvoke("Hello", **options)]
    pieces = [list(llm.stream("Hello", **options)), [piece async for piece in llm.astream("Hello", **options)]]
    for chunks in pieces:
        assert len(chunks) > 2 and all(chunk.content for chunk in chunks[:-1])
        messages.append(sum(chunks[1:], chunks[0]))
    first = messages[0]
    assert first.content == first.content.strip() != ""
    for message in messages[1:]:
        assert (message.content, message.usage_metadata) == (first.content, first.usage_metadata)
        assert message.response_metadata["finish_reason"] == first.response_metadata["finish_reason"]


@pytest.mark.parametrize("pieces", [[" ", "\n a", " b", " ", " ", "c ", "\n", " "], ["a", "b"], [" ", "\n"], []])
def test_white_space_around_a_streamed_answer_is_stripped(pieces: list[str]) -> None:
    trim = Trim()
    trimmed = [trim(piece) for piece in pieces]
    assert "".join(trimmed) == "".join(pieces).strip()
    assert all(text == text.rstrip() for text in trimmed)


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_can_be_set_on_model_binding_and_call(memory: KVMemory) -> None:
    llm = ChatKVMemory(memory, max_tokens=6)
    assert usage(llm.invoke("Hello"))[2] == 6
    assert usage(llm.bind(max_tokens=5).invoke("Hello"))[2] == 5
    assert usage(llm.invoke("Hello", max_tokens=4))[2] == 4
    sampled = [llm.invoke("Hello", temperature=3.0, seed=seed).content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    again = ChatKVMemory(memory, max_tokens=6, temperature=3.0, seed=1)
    assert again.invoke("Hello").content == sampled[0]
    assert again.invoke("Hello", temperature=0.0).content == llm.invoke("Hello").content


def test_stop_ends_an_answer(memory: KVMemory) -> None:
    whole = ChatKVMemory(memory, max_tokens=30, temperature=1.0, seed=2).invoke("Hello").text
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter not in whole[:2])
    before = whole.partition(stop)[0].strip()
    for llm, options in (
        (ChatKVMemory(memory, max_tokens=30, temperature=1.0, seed=2, stop=[stop]), {}),
        (ChatKVMemory(memory, max_tokens=30, temperature=1.0, seed=2, stop=["\x7f\x7f"]), {"stop": [stop]}),
    ):
        message = llm.invoke("Hello", **options)  # type: ignore[arg-type]
        assert message.content == before and message.response_metadata["finish_reason"] == "stop"
        assert "".join(chunk.text for chunk in llm.stream("Hello", **options)) == before  # type: ignore[arg-type]


def test_an_empty_answer_comes_with_a_next_step(memory: KVMemory) -> None:
    llm = ChatKVMemory(memory, max_tokens=30, temperature=1.0, seed=2)
    whole = llm.invoke("Hello")
    assert "next_step" not in whole.response_metadata
    message = llm.invoke("Hello", stop=[whole.text[0]])
    assert message.content == "" and "the stop string" in message.response_metadata["next_step"]
    *_, last = llm.stream("Hello", stop=[whole.text[0]])
    assert "the stop string" in last.response_metadata["next_step"]


def test_options_of_hosted_models_are_ignored(memory: KVMemory, llm: ChatKVMemory) -> None:
    hosted = ChatKVMemory(memory, max_tokens=4, api_key="secret", max_retries=3, base_url="http://none.invalid")
    assert hosted.invoke("Hello").content == llm.invoke("Hello").content
    assert "secret" not in repr(hosted)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"timeout": 0.0}, "timeout_s"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_options_out_of_range_are_refused(
    memory: KVMemory, llm: ChatKVMemory, options: dict[str, Any], where: str
) -> None:
    for attempt in (lambda: ChatKVMemory(memory, **options), lambda: llm.invoke("Hello", **options)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.where == where


def test_open_uses_the_settings_of_the_store(memory: KVMemory, wide: Any) -> None:
    memory.close()
    llm = ChatKVMemory.open(memory.path, model=wide, max_tokens=3)
    try:
        assert usage(llm.invoke("Hello", kv_ids=[FERRY_ID])) == (len(wide.encode_question("Hello")), 11 + 17, 3)
        other = ChatKVMemory.open(memory.path, model=wide, collection="default", keep_ratio=0.5)
        assert other.memory.settings.keep_ratio == 0.5
        few = ChatKVMemory.open(memory.path, model=wide, keep_tokens=9)
        assert few.memory.settings.keep_tokens == 9 and few._identifying_params["keep_tokens"] == 9
        few.memory.close()
        other.memory.close()
    finally:
        llm.memory.close()


def test_unknown_options_are_refused(tmp_path: Path, memory: KVMemory) -> None:
    attempts: list[tuple[str, str, Callable[[], Any]]] = [
        ("temprature", "temperature", lambda: ChatKVMemory.open(tmp_path / "none", temprature=1)),
        ("keep_txt", "keep_text", lambda: ChatKVMemory.open(tmp_path / "none", keep_txt=True)),
        ("temprature", "temperature", lambda: ChatKVMemory(memory, temprature=1)),
        ("stops", "stop", lambda: ChatKVMemory(memory).invoke("Hello", stops=["x"])),
    ]
    for name, nearest, attempt in attempts:
        with pytest.raises(ConfigError, match=f"unknown option '{name}'") as caught:
            attempt()
        assert repr(nearest) in str(caught.value.next_step)
    assert not (tmp_path / "none").exists()


def test_the_memory_must_be_a_kv_memory() -> None:
    with pytest.raises(ConfigError, match="KVMemory") as caught:
        ChatKVMemory("my-store")  # type: ignore[arg-type]
    assert "KVMemory.open" in str(caught.value.next_step)


# -- what surrounds the model ------------------------------------------------------------------------------------------


def test_llm_caches_do_not_mix_answers(memory: KVMemory, wide: Any) -> None:
    cache = InMemoryCache()

    def passes(ask: Callable[[], Any]) -> int:
        with recorded_inputs(wide) as inputs:
            ask()
        return len(inputs)

    llm = ChatKVMemory(memory, max_tokens=4, cache=cache)
    asks: list[Callable[[], Any]] = [
        lambda: llm.invoke("Hello"),
        lambda: llm.invoke("Hello", kv_ids=[]),
        lambda: llm.invoke("Hello", kv_ids=[FERRY_ID]),
        lambda: llm.invoke("Hello", kv_ids=[LAMP_ID]),
        lambda: llm.invoke("Hello", max_tokens=3),
        lambda: ChatKVMemory(memory, max_tokens=4, temperature=0.5, seed=1, cache=cache).invoke("Hello"),
        lambda: ChatKVMemory(memory, max_tokens=4, stop=["x"], cache=cache).invoke("Hello"),
        lambda: ChatKVMemory(memory.in_collection("other"), max_tokens=4, cache=cache).invoke("Hello"),
        lambda: ChatKVMemory(memory.in_collection("default", keep_ratio=0.5), max_tokens=4, cache=cache).invoke(
            "Hello"
        ),
    ]
    for ask in asks:
        assert passes(ask) >= 3
    for ask in asks:
        assert passes(ask) == 0
    memory.add([("note", "A note.")])
    assert passes(asks[2]) == 4  # the store is another one now
    assert passes(asks[2]) == 0


def test_another_model_uses_other_entries_of_an_llm_cache(tmp_path: Path, memory: KVMemory, wide: Any) -> None:
    mine = ChatKVMemory(memory)._identifying_params
    with open_memory(tmp_path / "other", wide, selector="sink_recent") as other:
        theirs = ChatKVMemory(other)._identifying_params
    assert mine["fingerprint"] != theirs["fingerprint"] and mine["store"] != theirs["store"]
    assert mine["model_name"] == theirs["model_name"] and mine["keep_ratio"] == theirs["keep_ratio"] == 0.25


def test_tracing_names_the_model(memory: KVMemory) -> None:
    llm = ChatKVMemory(memory, max_tokens=7, temperature=0.5, stop=["x"])
    params = llm._get_ls_params()
    assert params == {
        "ls_provider": "kv_memory",
        "ls_model_name": "tiny-llama",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["x"],
    }
    assert llm._get_ls_params(stop=["y"])["ls_stop"] == ["y"]
    assert llm.get_num_tokens("Hello") == 5  # by its own tokenizer, none from a hub


@pytest.mark.parametrize("streaming", [False, True])
def test_callbacks_receive_every_token(memory: KVMemory, streaming: bool) -> None:
    class Heard(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens.append(token)

    heard = Heard()
    llm = ChatKVMemory(memory, max_tokens=12, streaming=streaming, callbacks=[heard])
    message = llm.invoke("Hello")
    assert "".join(heard.tokens) == (message.content if streaming else "")


# -- what it refuses ---------------------------------------------------------------------------------------------------

CALL = {"name": "look_up", "args": {}, "id": "1"}
REFUSED: dict[str, tuple[BaseMessage, str]] = {
    "tool": (ToolMessage("7", tool_call_id="1"), "tools"),
    "function": (FunctionMessage(name="look_up", content="7"), "tools"),
    "tool call": (AIMessage("", tool_calls=[CALL]), "tools"),
    "role": (ChatMessage(role="critic", content="Well."), "unknown role"),
    "image": (HumanMessage([{"type": "text", "text": "What?"}, {"type": "image", "url": "a.png"}]), "text only"),
    "image_url": (HumanMessage([{"type": "image_url", "image_url": {"url": "a.png"}}]), "text only"),
    "audio": (HumanMessage([{"type": "audio", "base64": "", "mime_type": "audio/wav"}]), "text only"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_messages_are_refused(llm: ChatKVMemory, wide: Any, kind: str) -> None:
    message, what = REFUSED[kind]
    with recorded_inputs(wide) as inputs, pytest.raises(UnsupportedRequestError, match=what) as caught:
        llm.invoke([HumanMessage("Hello"), message, HumanMessage("And?")])
    assert inputs == [] and caught.value.where and caught.value.next_step


def test_text_blocks_are_joined(llm: ChatKVMemory) -> None:
    blocks: list[Any] = ["Hello", {"type": "text", "text": "there"}]
    expected = llm.invoke("Hello\nthere").content
    assert llm.invoke([HumanMessage(blocks)]).content == expected
    assert llm.invoke([ChatMessage(role="user", content="Hello\nthere")]).content == expected


def test_tools_are_refused(llm: ChatKVMemory) -> None:
    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    with pytest.raises(UnsupportedRequestError, match="cannot call tools") as caught:
        llm.bind_tools([look_up])
    assert "agent" in str(caught.value.next_step)
    with pytest.raises(UnsupportedRequestError, match="cannot call tools"):
        llm.invoke("Hello", tools=[{"name": "look_up"}])


def test_unknown_references_are_refused(memory: KVMemory, llm: ChatKVMemory) -> None:
    with pytest.raises(errors.CacheNotFoundError):
        llm.invoke("Hello", kv_ids=["0" * 64])
    with pytest.raises(errors.CacheNotFoundError, match=r"0\.25"):
        llm.invoke("Hello", kv_ids=[str(replace(Reference.parse(FERRY_ID), keep_ratio=0.5))])
    with pytest.raises(ConfigError, match="not a reference"):
        llm.invoke("Hello", kv_ids=["ferry"])
    other = ChatKVMemory(memory.in_collection("other"))
    with pytest.raises(errors.CacheNotFoundError):
        other.invoke("Hello", kv_ids=[FERRY_ID])


def test_caches_of_another_method_are_refused(memory: KVMemory, wide: Any) -> None:
    with open_memory(memory.path, wide, selector="sink_recent") as other:
        llm = ChatKVMemory(other)
        with pytest.raises(errors.FingerprintMismatchError, match="method"):
            llm.invoke("Hello", kv_ids=[FERRY_ID])


def test_inputs_that_do_not_fit_the_model_are_refused(llm: ChatKVMemory) -> None:
    with pytest.raises(errors.ContextWindowError):
        llm.invoke("a" * 5000)
    with pytest.raises(ConfigError, match="no turn"):
        llm.invoke([])
    with pytest.raises(ConfigError, match="end with a user turn"):
        llm.invoke([HumanMessage("Hello"), AIMessage("Hello.")])
