"""KVMemoryChatMessageHistory: a short window, recall of what has left it, and nothing lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable
from langchain_core.runnables.history import RunnableWithMessageHistory

from kv_memory import ConfigError, Conversation, KVMemory, Turn, UnsupportedRequestError, errors
from kv_memory.integrations.langchain import (
    ChatKVMemory,
    KVMemoryChatMessageHistory,
    KVMemoryRetriever,
    create_kv_chain,
)
from kv_memory.integrations.langchain.messages import KV_RECALL
from tests.memories import FERRY_QUESTION, open_memory
from tests.reference import recorded_inputs

# LangChain recommends LangGraph's checkpoints, and keeps this class until its version 2.
pytestmark = pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated")

BISCUIT = [HumanMessage("My dog is called Biscuit."), AIMessage("A fine name!")]
TEA = [HumanMessage("I drink green tea."), AIMessage("With milk?")]
RAIN = [HumanMessage("It rains a lot."), AIMessage("It does.")]


def history(memory: KVMemory, **options: Any) -> KVMemoryChatMessageHistory:
    return KVMemoryChatMessageHistory(memory, "alice", **{"window_turns": 2, **options})


def window(messages: list[BaseMessage]) -> list[str]:
    """What is in the window; a mark is checked and left out."""
    if messages and KV_RECALL in messages[0].additional_kwargs:
        assert isinstance(messages[0], SystemMessage) and messages[0].content == ""
        messages = messages[1:]
    return [message.text for message in messages]


def chat(memory: KVMemory, llm: ChatKVMemory | None = None, **options: Any) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), MessagesPlaceholder("history"), ("human", "{input}")]
    )
    return RunnableWithMessageHistory(
        prompt | (llm or ChatKVMemory(memory, max_tokens=4)),
        lambda session_id: KVMemoryChatMessageHistory(memory, session_id, **options),
        input_messages_key="input",
        history_messages_key="history",
    )


ALICE: Any = {"configurable": {"session_id": "alice"}}


# -- the window --------------------------------------------------------------------------------------------------------


def test_messages_inside_the_window_stay_unchanged(memory: KVMemory, wide: Any) -> None:
    kept = history(memory, window_turns=4)
    assert kept.messages == []
    with recorded_inputs(wide) as inputs:
        kept.add_messages([*BISCUIT, *TEA])
    assert kept.messages == [*BISCUIT, *TEA] and inputs == []
    assert kept.conversation.turns() == []


def test_messages_outside_the_window_are_compressed(memory: KVMemory) -> None:
    kept = history(memory)
    kept.add_messages(BISCUIT)
    kept.add_messages(TEA)
    assert kept.conversation.turns() == [Turn("user", BISCUIT[0].text), Turn("assistant", "A fine name!")]
    mark, *rest = kept.messages
    assert rest == TEA
    assert mark.additional_kwargs[KV_RECALL] == {
        "conversation_id": "alice", "keep_ratio": 0.25, "top_k": 3, "n_turns": 2, "keep_tokens": None, "max_bytes": None
    }  # fmt: skip
    kept.add_messages(RAIN)
    assert len(kept.conversation.turns()) == 4 and window(kept.messages) == [message.text for message in RAIN]


def test_an_exchange_leaves_the_window_as_a_whole(memory: KVMemory) -> None:
    kept = history(memory, window_turns=3)
    kept.add_messages([*BISCUIT, *TEA])
    assert window(kept.messages) == [message.text for message in TEA]


@pytest.mark.parametrize(("tokens", "n_left"), [(28, 2), (27, 0), (53, 4), (1000, 6), (None, 6), (0, 0)])
def test_the_window_can_be_limited_in_tokens(memory: KVMemory, tokens: int | None, n_left: int) -> None:
    said = [HumanMessage("a" * 10), AIMessage("b" * 18)]  # a token a letter
    middle = [HumanMessage("c" * 15), AIMessage("d" * 10)]
    kept = history(memory, window_turns=None, window_tokens=tokens)
    kept.add_messages([*TEA, *middle, *said])
    expected = [*TEA, *middle, *said][6 - n_left :]
    assert window(kept.messages) == [message.text for message in expected]
    assert len(kept.conversation.turns()) == 6 - n_left


def test_messages_survive_reopening_the_store(memory: KVMemory, wide: Any) -> None:
    kept = history(memory)
    answer = AIMessage("A fine name!", response_metadata={"model_name": "other"}, id="7", name="bot")
    kept.add_messages([*TEA, HumanMessage("My dog is called Biscuit.", additional_kwargs={"mood": ["glad"]}), answer])
    before = kept.messages
    memory.close()
    with open_memory(memory.path, wide) as again:
        kept = history(again)
        assert kept.messages == before and kept.messages[-1] == answer
        assert kept.messages[-2].additional_kwargs == {"mood": ["glad"]}
        kept.add_messages(RAIN)
        assert [turn.text for turn in kept.conversation.turns()] == [m.text for m in [*TEA, BISCUIT[0], answer]]


def test_a_crash_between_compressing_and_saving_duplicates_nothing(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = history(memory)
    kept.add_messages(BISCUIT)
    save, saved = KVMemoryChatMessageHistory._save, []

    def dies_at_the_second(self: Any, window: Any) -> None:
        saved.append(window)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(self, window)

    monkeypatch.setattr(KVMemoryChatMessageHistory, "_save", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        kept.add_messages(TEA)
    monkeypatch.undo()
    kept = history(memory)
    assert window(kept.messages) == [message.text for message in [*BISCUIT, *TEA]]
    kept.add_messages(RAIN)
    assert [turn.text for turn in kept.conversation.turns()] == [message.text for message in [*BISCUIT, *TEA]]
    assert window(kept.messages) == [message.text for message in RAIN]


def test_messages_that_cannot_be_compressed_stay_in_the_window(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = history(memory)
    kept.add_messages(BISCUIT)

    def full(*_: Any, **__: Any) -> None:
        raise errors.StoreFullError("no space left")

    monkeypatch.setattr(Conversation, "add", full)
    with pytest.raises(errors.StoreFullError):
        kept.add_messages(TEA)
    monkeypatch.undo()
    assert history(memory).messages == [*BISCUIT, *TEA]


def test_blank_messages_and_marks_are_not_compressed(memory: KVMemory) -> None:
    kept = history(memory, window_turns=0)
    kept.add_messages([HumanMessage(" "), AIMessage("")])
    assert kept.messages == []  # nothing to recall
    kept.add_messages(BISCUIT)
    kept.add_messages(kept.messages)  # a mark that comes back is no message
    assert [turn.text for turn in kept.conversation.turns()] == [message.text for message in BISCUIT]
    assert kept.messages[0].additional_kwargs[KV_RECALL]["n_turns"] == 2


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_texts_with_invalid_characters_leave_the_window_too(memory: KVMemory, text: str) -> None:
    kept = history(memory)
    kept.add_messages([HumanMessage(text), AIMessage("Pardon?")])
    assert kept.messages[0].content == text
    kept.add_messages(TEA)
    assert len(kept.conversation.turns()) == 2 and window(kept.messages) == [message.text for message in TEA]


def test_clear_removes_all_messages(memory: KVMemory) -> None:
    kept = history(memory)
    kept.clear()
    kept.add_messages([*BISCUIT, *TEA])
    kept.clear()
    assert kept.messages == [] and kept.conversation.turns() == [] and kept.conversation.recall("Biscuit") == []
    kept.add_messages(RAIN)
    assert kept.messages == RAIN


def test_conversations_are_separate(memory: KVMemory) -> None:
    alice, bob = (KVMemoryChatMessageHistory(memory, name, window_turns=0) for name in ("alice", "bob"))
    alice.add_messages(BISCUIT)
    assert bob.messages == []
    bob.add_messages(TEA)
    alice.clear()
    assert len(bob.conversation.turns()) == 2 and len(bob.messages) == 1
    assert [summary.id for summary in memory.documents()] == ["ferry", "lamp"]


async def test_asynchronous_methods(memory: KVMemory) -> None:
    kept = history(memory)
    await kept.aadd_messages([*BISCUIT, *TEA])
    assert window(await kept.aget_messages()) == [message.text for message in TEA]
    await kept.aclear()
    assert await kept.aget_messages() == []


def test_concurrent_adds_lose_nothing(memory: KVMemory) -> None:
    start = threading.Barrier(6)

    def add(number: int) -> None:
        kept = history(memory, window_turns=4)  # of its own, as RunnableWithMessageHistory makes one for every call
        start.wait()
        kept.add_messages([HumanMessage(f"Question {number}"), AIMessage(f"Answer {number}")])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = history(memory, window_turns=4)
    said = [turn.text for turn in kept.conversation.turns()] + window(kept.messages)
    assert sorted(said) == sorted(f"{kind} {number}" for kind in ("Question", "Answer") for number in range(6))
    assert [said[i + 1] for i in range(0, 12, 2)] == [said[i].replace("Question", "Answer") for i in range(0, 12, 2)]


# -- recall ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"keep_tokens": 9}, {"max_bytes": 12_000}])
def test_old_turns_have_their_own_keep_tokens_and_max_bytes(
    memory: KVMemory, llm: ChatKVMemory, budget: dict[str, int]
) -> None:
    kept = history(memory, top_k=1, **budget)
    kept.add_messages([*BISCUIT, *RAIN, *TEA])
    question = "What is my dog called?"
    (reference,) = kept.conversation.recall(question)
    infos = {info.text_sha256: info for info in kept.conversation._memory.store.caches()}
    info = infos[reference.key]
    assert reference.keep_ratio == info.keep_ratio != 0.25
    assert info.n_kept == 9 if "keep_tokens" in budget else 9_000 < info.size_bytes <= 12_000
    message = llm.invoke([*kept.messages, HumanMessage(question)])
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_token_details"]["cache_read"] == 11 + info.n_kept


def test_a_mark_is_resolved_by_the_last_question_and_dropped(memory: KVMemory, llm: ChatKVMemory, wide: Any) -> None:
    kept = history(memory, keep_ratio=1.0, top_k=1)
    kept.add_messages([*BISCUIT, *RAIN, *TEA])
    question = "What is my dog called?"
    references = kept.conversation.recall(question)
    assert len(references) == 1 and references[0].keep_ratio == 1.0
    turns = [Turn("user", TEA[0].text), Turn("assistant", "With milk?"), Turn("user", question)]
    with recorded_inputs(wide) as inputs:
        expected = memory.reader.reply(turns, references, settings=llm._decode_settings({})).answer
        message = llm.invoke([*kept.messages, HumanMessage(question)])
    prefills = [ids.tolist() for ids in inputs if ids.shape[1] > 1]
    assert len(prefills) == 2 and prefills[0] == prefills[1]
    assert message.content == expected.text.strip()
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_token_details"]["cache_read"] == expected.n_cached_tokens > 11 + 30
    about_tea = llm.invoke([*kept.messages, HumanMessage("What rains?")])
    assert about_tea.usage_metadata["input_token_details"]["cache_read"] != expected.n_cached_tokens  # type: ignore[index]


def test_an_unrelated_question_recalls_nothing(memory: KVMemory, llm: ChatKVMemory) -> None:
    kept = history(memory)
    kept.add_messages([*BISCUIT, *TEA])
    assert llm.invoke([*kept.messages, HumanMessage("Xylophone?")]).content == (
        llm.invoke([*TEA, HumanMessage("Xylophone?")]).content
    )


def test_a_reply_combines_documents_and_old_turns(memory: KVMemory, llm: ChatKVMemory) -> None:
    kept = history(memory)
    kept.add_messages([*BISCUIT, *TEA])
    context = KVMemoryRetriever(memory, k=1).invoke(FERRY_QUESTION)
    question = "Does the ferry take my dog?"
    references = [context[0].metadata["kv_id"], *map(str, kept.conversation.recall(question))]
    assert len(references) == 2
    turns = [*TEA, HumanMessage(question)]
    chain = create_kv_chain(llm)
    answer = chain.invoke({"context": context, "input": question, "chat_history": kept.messages})
    assert answer == llm.invoke(turns, kv_ids=references).content
    assert answer != llm.invoke(turns, kv_ids=references[:1]).content or (
        llm.invoke(turns, kv_ids=references[:1]).usage_metadata != llm.invoke(turns, kv_ids=references).usage_metadata
    )


# -- RunnableWithMessageHistory ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chat_of_200_turns_keeps_the_prompt_short(memory: KVMemory, wide: Any) -> None:
    talk = chat(memory, window_tokens=200)
    asked = [f"Question {number} is about the {word}." for number in range(25) for word in ("cat", "dog", "sea", "sky")]
    n_prefilled, n_cached = [], []
    for question in asked:
        message = talk.invoke({"input": question}, ALICE)
        details = message.usage_metadata["input_token_details"]["cache_read"]
        n_prefilled.append(message.usage_metadata["input_tokens"] - details)
        n_cached.append(details)
    assert max(n_prefilled) < 400
    assert max(n_cached) < 11 + 3 * 64 + 10  # the prefix, and three passages of at most 64 tokens
    kept = KVMemoryChatMessageHistory(memory, "alice", window_tokens=200)
    said = [turn.text for turn in kept.conversation.turns()] + window(kept.messages)
    assert [text for text in said if text.startswith("Question")] == asked
    assert len(kept.conversation.turns()) > 150


@pytest.mark.parametrize("whole", [False, True])
async def test_all_call_forms_update_the_history(memory: KVMemory, whole: bool) -> None:
    """`whole`: the model itself is wrapped, and its input is a list of messages."""
    llm = ChatKVMemory(memory, max_tokens=4)
    options = {"window_turns": 2}
    talk: Any = chat(memory, llm, **options)
    if whole:
        talk = RunnableWithMessageHistory(llm, lambda session_id: history(memory))

    def said(question: str) -> Any:
        return [HumanMessage(question)] if whole else {"input": question}

    talk.invoke(said("One?"), ALICE)
    assert "".join([chunk.text for chunk in talk.stream(said("Two?"), ALICE)])
    await talk.ainvoke(said("Three?"), ALICE)
    assert [chunk async for chunk in talk.astream(said("Four?"), ALICE)]
    kept = history(memory)
    questions = [turn.text for turn in kept.conversation.turns() if turn.role == "user"]
    assert [*questions, window(kept.messages)[0]] == ["One?", "Two?", "Three?", "Four?"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        ToolMessage("7", tool_call_id="1"),
        AIMessage("", tool_calls=[{"name": "look_up", "args": {}, "id": "1"}]),
        HumanMessage([{"type": "image_url", "image_url": {"url": "a.png"}}]),
    ],
)
def test_unsupported_messages_are_refused(memory: KVMemory, message: BaseMessage) -> None:
    kept = history(memory)
    with pytest.raises(UnsupportedRequestError):
        kept.add_messages([*BISCUIT, message])
    assert kept.messages == []


def test_messages_that_are_not_json_serialisable_are_refused(memory: KVMemory) -> None:
    kept = history(memory)
    with pytest.raises(ConfigError, match="JSON"):
        kept.add_messages([HumanMessage("Hello", additional_kwargs={"raw": object()})])
    assert kept.messages == []


@pytest.mark.parametrize("options", [{"window_turns": -1}, {"window_tokens": -1}, {"keep_ratio": 0.0}, {"top_k": 0}])
def test_options_out_of_range_are_refused(memory: KVMemory, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        history(memory, **options)
    assert caught.value.where in options
