from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import Memory

from kv_memory import ConfigError, Conversation, KVMemory, Turn, UnsupportedRequestError
from kv_memory.integrations.llama_index import (
    KVMemoryBlock,
    KVMemoryChatEngine,
    KVMemoryCondensePlusContextChatEngine,
    KVMemoryLLM,
    KVMemoryQueryEngine,
    KVMemoryRetriever,
)
from tests.integrations.llama_index.li_samples import (
    WALRUS,
    WordRetriever,
    keys_of,
    names_of,
    prompt_of,
    recorded_events,
    recorded_texts,
    sent_keys,
    text_node,
    two_nodes,
)
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, open_memory
from tests.reference import recorded_inputs

pytestmark = [
    pytest.mark.usefixtures("chat_memories"),
    pytest.mark.filterwarnings("ignore:<aiosqlite.core.Connection:ResourceWarning"),  # LlamaIndex leaves it open
]
ENGINES = pytest.mark.parametrize("kind", [KVMemoryChatEngine, KVMemoryCondensePlusContextChatEngine])


def chat_over(kind: Any, llm: KVMemoryLLM, **options: Any) -> Any:
    retriever = KVMemoryRetriever(WordRetriever(two_nodes()), llm.memory)
    return kind.from_defaults(retriever=retriever, llm=llm, **options)


async def every_chat(engine: Any, question: str) -> list[str]:
    """Answers of all four ways to chat, each in a conversation of its own."""
    answers = []
    for way in ("chat", "stream_chat", "achat", "astream_chat"):
        await engine._memory.areset()
        if way == "chat":
            answers.append(str(engine.chat(question)))
        elif way == "stream_chat":
            answers.append("".join(engine.stream_chat(question).response_gen))
        elif way == "achat":
            answers.append(str(await engine.achat(question)))
        else:
            stream = await engine.astream_chat(question)
            answers.append("".join([piece async for piece in stream.async_response_gen()]))
    return answers


# -- chat engines ------------------------------------------------------------------------------------------------------


@ENGINES
async def test_all_chat_methods_answer_from_caches(memory: KVMemory, llm: KVMemoryLLM, wide: Any, kind: Any) -> None:
    answer = llm.complete(LAMP_QUESTION, kv_ids=keys_of(LAMP)).text
    engine = chat_over(kind, llm)
    with recorded_texts(wide) as texts, recorded_events() as events:
        assert await every_chat(engine, LAMP_QUESTION) == [answer] * 4
    assert sent_keys(events) == [keys_of(LAMP)] * 4
    assert texts == [prompt_of(wide, LAMP_QUESTION)] * 4


def test_the_history_is_prefilled_behind_the_caches(llm: KVMemoryLLM, wide: Any) -> None:
    engine = chat_over(KVMemoryChatEngine, llm, system_prompt="Be {brief}.")
    first = engine.chat(FERRY_QUESTION)
    with recorded_texts(wide) as texts, recorded_events() as events:
        second = engine.chat(LAMP_QUESTION)
    assert texts == [prompt_of(wide, f"Be {{brief}}.\n\n{FERRY_QUESTION}", str(first), LAMP_QUESTION)]
    assert sent_keys(events) == [keys_of(LAMP)]
    assert [item.node.node_id for item in second.source_nodes] == ["lamp-node"]
    assert [message.content for message in engine.chat_history] == [
        FERRY_QUESTION,
        str(first),
        LAMP_QUESTION,
        str(second),
    ]


def test_the_question_is_condensed_before_retrieval(llm: KVMemoryLLM, wide: Any) -> None:
    index = VectorStoreIndex(two_nodes(), embed_model=MockEmbedding(embed_dim=4))  # finds something for any question
    engine = KVMemoryCondensePlusContextChatEngine.from_defaults(
        index.as_retriever(), llm=llm, system_prompt="Be brief."
    )
    engine.chat(FERRY_QUESTION)
    with recorded_texts(wide) as texts:
        engine.chat("And {why}?")
    condensing, asking = texts
    assert "Standalone question" in condensing and FERRY_QUESTION in condensing
    assert asking.startswith("Q: Be brief.") and asking.endswith("Q: And {why}?\nA:")
    assert FERRY not in "".join(texts)


@ENGINES
def test_a_custom_context_template_becomes_an_instruction(llm: KVMemoryLLM, wide: Any, kind: Any) -> None:
    name = "context_template" if kind is KVMemoryChatEngine else "context_prompt"
    engine = chat_over(kind, llm, **{name: "Use these: {context_str} Speak Norse."})
    with recorded_texts(wide) as texts:
        engine.chat(FERRY_QUESTION)
    assert texts == [prompt_of(wide, f"Use these: (see the documents above) Speak Norse.\n\n{FERRY_QUESTION}")]


def test_chats_send_the_events_of_a_stock_engine(llm: KVMemoryLLM) -> None:
    names = []
    for kind in (ContextChatEngine, KVMemoryChatEngine):
        with recorded_events() as events:
            assert str(chat_over(kind, llm).chat(FERRY_QUESTION))
        # Two that its refining synthesizer sends, and LlamaIndex's `simple_summarize` does not.
        names.append([name for name in names_of(events) if not name.startswith("GetResponse")])
    assert names[0] == names[1] != []


@ENGINES
def test_a_chat_engine_with_another_llm_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="MockLLM cannot answer from distilled caches") as caught:
        kind.from_defaults(retriever=WordRetriever(two_nodes()), llm=MockLLM())
    assert "KVMemoryLLM(memory)" in str(caught.value.next_step)


async def test_condense_question_chat_engine_answers_from_caches(llm: KVMemoryLLM, wide: Any) -> None:
    query_engine = KVMemoryQueryEngine.from_defaults(WordRetriever(two_nodes()), llm=llm)
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=llm)
    with recorded_texts(wide) as texts, recorded_events() as events:
        first = await every_chat(chat, LAMP_QUESTION)
        await chat.achat("And then?")  # condensed to whatever a random model makes of it
    assert first == [llm.complete(LAMP_QUESTION, kv_ids=keys_of(LAMP)).text] * 4
    assert sent_keys(events)[:4] == [keys_of(LAMP)] * 4
    assert not any(FERRY in text or LAMP in text for text in texts)


# -- long conversations ------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """LlamaIndex's tokenizer, for tests: what is ejected must not depend on it."""
    return text.split()


def memory_with(block: KVMemoryBlock, **options: Any) -> Memory:
    return Memory.from_defaults(
        token_limit=60, token_flush_size=10, tokenizer_fn=words, memory_blocks=[block], **options
    )


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


async def say(chat: Memory, n: int, *, start: int = 0) -> None:
    for i in range(start, start + n):
        await chat.aput_messages(
            [user(f"My pet number p{i} is a beast."), ChatMessage(role="assistant", content=f"Nice beast p{i}.")]
        )


async def test_ejected_turns_are_compressed_and_recalled(memory: KVMemory, wide: Any) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    chat = memory_with(block)
    await say(chat, 20)
    spoken = block.conversation.turns()
    window = [message.content for message in await chat.aget() if message.content]
    assert [turn.text for turn in spoken] + window == [
        text for i in range(20) for text in (f"My pet number p{i} is a beast.", f"Nice beast p{i}.")
    ]
    assert 10 < len(spoken) < 40
    messages = await chat.aget(input="What is p3?")
    bringing = messages[0]
    assert (bringing.content or "", bringing.role) == ("", MessageRole.SYSTEM)
    found = [block.conversation._memory.store.text(key[:64]) for key in bringing.additional_kwargs["kv_ids"]]
    assert "User: My pet number p3 is a beast." in "\n".join(str(text) for text in found)
    question = user("What is p3?")
    with recorded_texts(wide) as texts:
        response = KVMemoryLLM(memory, max_tokens=4).chat([*messages, question])
    assert len(texts) == 1 and "p3 is a beast" not in texts[0]
    cached = response.raw["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > len(wide.prefix_ids) + len(found)


async def test_the_prompt_stays_short_in_a_long_conversation(memory: KVMemory) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    chat = memory_with(block)
    llm = KVMemoryLLM(memory, max_tokens=2)
    prefilled, cached = [], []
    for i in range(10):
        await say(chat, 10, start=10 * i)  # 20 turns
        usage = llm.chat([*await chat.aget(input=f"What is p{i}?"), user(f"What is p{i}?")]).raw["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        prefilled.append(usage["prompt_tokens"] - cached[-1])
    assert len(block.conversation.turns()) > 180
    assert max(prefilled) < 500 and max(prefilled[5:]) <= max(prefilled[:5]) + 20
    assert max(cached[5:]) <= max(cached[:5]) + 20


async def test_an_unrelated_question_recalls_nothing(memory: KVMemory) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    assert await block.aget([user("What?")]) == [] == await block.aget([])
    await block.aput([user("My dog is called Biscuit.")])
    assert await block.aget([user("Xylophone?")]) == []
    assert len(await block.aget([user("What is my dog called?")])) == 1


async def test_a_conversation_continues_after_reopening_the_store(memory: KVMemory, wide: Any) -> None:
    await KVMemoryBlock(memory, conversation_id="alice").aput([user("My dog is called Biscuit.")])
    question = [user("What is my dog called?")]
    expected = await KVMemoryBlock(memory, conversation_id="alice").aget(question)
    memory.close()
    with open_memory(memory.path, wide) as reopened:
        again = KVMemoryBlock(reopened, conversation_id="alice")
        assert await again.aget(question) == expected != []
        await again.aput([user("My cat is called Crumb.")])
        assert [turn.text for turn in again.conversation.turns()] == [
            "My dog is called Biscuit.",
            "My cat is called Crumb.",
        ]
        assert await KVMemoryBlock(reopened, conversation_id="bob").aget(question) == []
        assert [document.id for document in reopened.documents()] == ["ferry", "lamp"]


async def test_a_block_has_its_own_keep_ratio_and_top_k(memory: KVMemory) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice", keep_ratio=1.0, top_k=1)
    for name in ("Biscuit", "Crumb"):
        await block.aput([user(f"My dog is called {name}.")])
    (message,) = await block.aget([user("dog")])
    (key,) = message.additional_kwargs["kv_ids"]
    assert key[64:] == "@1.0/conversation:default:alice"
    few = KVMemoryBlock(memory, conversation_id="bob", keep_tokens=8)
    await few.aput([user("My dog is called Biscuit.")])
    (message,) = await few.aget([user("dog")])
    (info,) = few.conversation._memory.store.caches()
    assert info.n_kept == 8
    assert message.additional_kwargs["kv_ids"][0][64:] == f"@{info.keep_ratio}/conversation:default:bob"


async def test_messages_with_references_are_not_compressed(memory: KVMemory) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    await block.aput([ChatMessage(role="system", content="", additional_kwargs={"kv_ids": keys_of(FERRY)})])
    assert block.conversation.turns() == []
    await block.aput([ChatMessage(role="system", content="Be brief."), user("Hello."), user("  ")])
    assert Conversation(memory, "alice").turns() == [Turn("system", "Be brief."), Turn("user", "Hello.")]


async def test_tool_messages_are_refused(memory: KVMemory) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    with pytest.raises(UnsupportedRequestError, match="tool"):
        await block.aput([ChatMessage(role=MessageRole.TOOL, content="42")])


def test_a_chat_engine_combines_old_turns_and_documents(memory: KVMemory, wide: Any) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    chat = memory_with(block)
    llm = KVMemoryLLM(memory, max_tokens=4)
    engine = chat_over(KVMemoryChatEngine, llm, memory=chat)
    for i in range(6):
        engine.chat(f"My pet number p{i} is a beast with a long tail and a loud voice, as you know.")
    assert block.conversation.turns()
    question = "Does p0 like the ferry?"
    with recorded_texts(wide) as texts, recorded_events() as events:
        engine.chat(question)
    (keys,) = sent_keys(events)
    assert keys[0] == keys_of(FERRY)[0] and len(keys) > 1
    assert all(key.endswith("/conversation:default:alice") for key in keys[1:])
    assert FERRY not in texts[0] and "p0 is a beast" not in texts[0] and texts[0].endswith(f"Q: {question}\nA:")


@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat"])
async def test_old_turns_answer_if_no_document_is_found(memory: KVMemory, wide: Any, way: str) -> None:
    conversation = Conversation(memory, "alice")
    conversation.add([Turn("user", "My pet is a walrus.")])
    block = KVMemoryBlock(memory, conversation_id="alice")
    retriever = WordRetriever([])
    llm = KVMemoryLLM(memory, max_tokens=4)
    engine = KVMemoryChatEngine.from_defaults(retriever=retriever, llm=llm, memory=memory_with(block))
    question = "What is my pet?"
    expected = memory.reader.reply([Turn("user", question)], conversation.recall(question)).answer.text
    with recorded_events() as events:
        if way == "stream_chat":
            answer = "".join(engine.stream_chat(question).response_gen)
        else:
            response = engine.chat(question) if way == "chat" else await engine.achat(question)
            answer = str(response)
            assert response.source_nodes == []
    (keys,) = sent_keys(events)
    assert keys == [str(reference) for reference in conversation.recall(question)] != []
    assert answer and expected.startswith(answer[:1])
    assert str(engine.chat("Xyzzy?")) == "Empty Response"  # nor was that said before


async def test_old_turns_are_not_found_as_documents(memory: KVMemory, wide: Any) -> None:
    block = KVMemoryBlock(memory, conversation_id="alice")
    await block.aput([user(WALRUS)])
    assert WALRUS not in {hit.text for hit in memory.retrieve("walrus")}
    with recorded_inputs(wide) as inputs:
        await block.aget([user("walrus")])
    assert inputs == []
    node = text_node("walrus", WALRUS)
    engine = KVMemoryQueryEngine.from_defaults(WordRetriever([node]), llm=KVMemoryLLM(memory), on_missing="skip")
    assert str(engine.query("walrus")) == "Empty Response"
