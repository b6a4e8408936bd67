"""Messages of other models and of broken clients: what is left out of prompts, and that it is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock
from llama_index.core.memory import Memory

from kv_memory import KVMemory, Turn, UnsupportedRequestError
from kv_memory.conversation import Conversation
from kv_memory.integrations.langchain import ChatKVMemory, create_kv_history
from kv_memory.integrations.langchain.messages import turns_of
from kv_memory.integrations.llama_index import KVMemoryBlock, KVMemoryLLM
from kv_memory.integrations.llama_index.messages import turns_of as li_turns_of
from kv_memory.integrations.llms import log_left_out
from tests.integrations.llama_index.conftest import chat_memories as chat_memories  # a fixture

SAID = [Turn("user", "Hello"), Turn("assistant", "Good day"), Turn("user", "Why?")]
CONTENTS: list[Any] = [
    [{"type": "reasoning", "reasoning": "SECRET"}, {"type": "text", "text": "Good day"}],
    [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "SECRET"}]}, "Good day"],
    [{"type": "thinking", "thinking": "SECRET", "signature": "x"}, {"type": "text", "text": "Good day"}],
    [{"type": "redacted_thinking", "data": "SECRET"}, {"type": "text", "text": "Good day"}],
    [{"type": "text", "text": "Good day"}, {"type": "reasoning_content", "reasoning_content": {"text": "SECRET"}}],
    [{"type": "non_standard", "value": {"type": "redacted_thinking", "data": "SECRET"}}, "Good day"],
]


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    log_left_out.cache_clear()  # said once in a process
    with caplog.at_level(logging.WARNING, logger="kv_memory"):
        yield caplog


def chat_of(content: Any, **options: Any) -> list[Any]:
    return [HumanMessage("Hello"), AIMessage(content, **options), HumanMessage("Why?")]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: str(content)[:30])
async def test_reasoning_blocks_are_left_out_and_said_once(
    memory: KVMemory, logged: pytest.LogCaptureFixture, content: Any
) -> None:
    llm = ChatKVMemory(memory, max_tokens=4)
    expected = llm.invoke(chat_of("Good day"))
    assert logged.text == ""
    message = await llm.ainvoke(chat_of(content))
    assert (message.content, message.usage_metadata) == (expected.content, expected.usage_metadata)
    assert list(llm.stream(chat_of(content))) and turns_of(chat_of(content)) == SAID
    assert logged.text.count("reasoning of another model") == 1 and "SECRET" not in logged.text
    history = create_kv_history(memory, window_turns=0)
    history.invoke(chat_of(content), {"configurable": {"thread_id": "alice"}})
    assert Conversation(memory, "alice").turns() == SAID[:2]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_mentioned(logged: pytest.LogCaptureFixture, name: str) -> None:
    assert turns_of(chat_of("Good day", additional_kwargs={name: "SECRET"})) == SAID
    assert logged.text.count(f"({name})") == 1
    assert turns_of(chat_of("Good day", additional_kwargs={name: ""})) == SAID
    messages = [
        ChatMessage("Hello"),
        ChatMessage("Good day", role="assistant", additional_kwargs={name: "SECRET"}),
        ChatMessage("Why?"),
    ]
    log_left_out.cache_clear()
    assert li_turns_of(messages) == SAID and logged.text.count(f"({name})") == 2


def test_a_message_of_nothing_but_reasoning_is_no_turn(memory: KVMemory) -> None:
    content = [{"type": "thinking", "thinking": "Hm."}]
    assert turns_of(chat_of(content)) == [SAID[0], SAID[2]]
    thinking = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="Hm.")])
    assert li_turns_of([ChatMessage("Hello"), thinking, ChatMessage("Why?")]) == [SAID[0], SAID[2]]
    assert ChatKVMemory(memory, max_tokens=2).invoke(chat_of(content)).usage_metadata


@pytest.mark.parametrize("block", [{"type": "image_url"}, {"type": "non_standard", "value": {"type": "video"}}, {}])
def test_other_blocks_are_refused_still(block: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedRequestError, match="text only"):
        turns_of(chat_of([block, "Good day"]))


# -- LlamaIndex --------------------------------------------------------------------------------------------------------


def li_chat(*blocks: Any) -> list[ChatMessage]:
    return [ChatMessage("Hello"), ChatMessage(role="assistant", blocks=list(blocks)), ChatMessage("Why?")]


@pytest.mark.usefixtures("chat_memories")
async def test_thinking_blocks_of_llama_index_are_left_out_and_said_once(
    memory: KVMemory, logged: pytest.LogCaptureFixture
) -> None:
    llm = KVMemoryLLM(memory, max_tokens=4)
    expected = llm.chat(li_chat(TextBlock(text="Good day")))
    messages = li_chat(ThinkingBlock(content="SECRET"), TextBlock(text="Good day"))
    assert (await llm.achat(messages)).message.content == expected.message.content
    assert [*llm.stream_chat(messages)][-1].message.content == expected.message.content
    assert li_turns_of(messages) == SAID and logged.text.count("reasoning of another model") == 1
    block = KVMemoryBlock(memory, conversation_id="alice")
    chat = Memory.from_defaults(token_limit=30, token_flush_size=10, tokenizer_fn=str.split, memory_blocks=[block])
    for _ in range(12):
        await chat.aput_messages(messages)
    assert SAID[1] in block.conversation.turns() and "SECRET" not in str(block.conversation.turns())


@pytest.mark.usefixtures("chat_memories")
@pytest.mark.parametrize("text", ["half \ud83d", "\ude00 half", "a\0b", "\udcff\ud800"])
async def test_half_an_emoji_breaks_no_chat_of_llama_index(memory: KVMemory, text: str) -> None:
    readable = text.replace("\0", "\ufffd").encode(errors="replace").decode()
    llm = KVMemoryLLM(memory, max_tokens=4)
    messages = [ChatMessage(text), ChatMessage(text, role="assistant"), ChatMessage(f"Why {text}?")]
    expected = llm.chat([ChatMessage(m.content.replace(text, readable), role=m.role) for m in messages])
    assert (await llm.achat(messages)).message.content == expected.message.content
    assert llm.complete(text).text == llm.complete(readable).text
    assert llm.complete(text, formatted=True).text == llm.complete(readable, formatted=True).text
    block = KVMemoryBlock(memory, conversation_id="alice")
    chat = Memory.from_defaults(token_limit=30, token_flush_size=10, tokenizer_fn=str.split, memory_blocks=[block])
    for _ in range(12):
        await chat.aput_messages(messages)
        assert llm.chat([*await chat.aget(input=f"What {text}?"), ChatMessage(f"What {text}?")]).message.content != "?!"
    assert block.conversation.turns()[:2] == [Turn("user", readable), Turn("assistant", readable)]


def test_a_question_with_half_an_emoji_recalls(memory: KVMemory) -> None:
    old = Conversation(memory, "alice")
    old.add([Turn("user", "My dog is called Biscuit.")])
    assert len(old.recall("my dog \ud83d")) == 1
