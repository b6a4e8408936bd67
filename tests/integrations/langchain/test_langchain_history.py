"""create_kv_history: a short window, recall of what left it, and nothing lost. The chats are graphs of LangGraph."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from kv_memory import ConfigError, Conversation, KVMemory, Turn, UnsupportedRequestError, errors
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryRetriever, create_kv_chain, create_kv_history
from kv_memory.integrations.langchain.messages import KV_RECALL
from kv_memory.query import key_of
from tests.memories import FERRY_QUESTION, cache_blobs, open_memory
from tests.reference import recorded_inputs

BISCUIT = [HumanMessage("My dog is called Biscuit."), AIMessage("A fine name!")]
TEA = [HumanMessage("I drink green tea."), AIMessage("With milk?")]
RAIN = [HumanMessage("It rains a lot."), AIMessage("It does.")]
QUESTION = HumanMessage("What is my dog called?")
ALICE: Any = {"configurable": {"thread_id": "alice"}}


def shortened(memory: KVMemory, *messages: BaseMessage, thread: Any = ALICE, **options: Any) -> list[BaseMessage]:
    """What reaches the model of a chat with these messages before a last question, which is left out."""
    history = create_kv_history(memory, **{"window_turns": 2, **options})
    passed: list[BaseMessage] = history.invoke([*messages, QUESTION], thread)
    assert passed[-1] == QUESTION
    return passed[:-1]


def window(messages: list[BaseMessage]) -> list[str]:
    """What is in the window; a mark is checked and left out."""
    if messages and KV_RECALL in messages[0].additional_kwargs:
        assert isinstance(messages[0], SystemMessage) and messages[0].content == ""
        messages = messages[1:]
    return [message.text for message in messages]


def said_before(memory: KVMemory, name: str = "alice") -> list[Turn]:
    return Conversation(memory, name).turns()


def spoken(*messages: BaseMessage) -> list[Turn]:
    return [Turn("user" if isinstance(m, HumanMessage) else "assistant", m.text) for m in messages]


def graph(memory: KVMemory, llm: ChatKVMemory | None = None, saver: Any = None, **options: Any) -> Any:
    """The chat of docs/integrations.md, with a checkpointer."""
    chat = create_kv_history(memory, **options) | (llm or ChatKVMemory(memory, max_tokens=4))

    def answer(state: MessagesState) -> Any:
        return {"messages": [chat.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node(answer).add_edge(START, "answer").compile(saver or InMemorySaver())


def ask(app: Any, text: str, thread: Any = ALICE) -> AIMessage:
    message: AIMessage = app.invoke({"messages": [HumanMessage(text)]}, thread)["messages"][-1]
    return message


# -- the window --------------------------------------------------------------------------------------------------------


def test_messages_inside_the_window_stay_unchanged(memory: KVMemory, wide: Any) -> None:
    assert shortened(memory) == []
    with recorded_inputs(wide) as inputs:
        assert shortened(memory, *BISCUIT, *TEA, window_turns=4) == [*BISCUIT, *TEA]
    assert inputs == [] and said_before(memory) == []


def test_messages_outside_the_window_are_compressed_once(memory: KVMemory, wide: Any) -> None:
    mark, *rest = shortened(memory, *BISCUIT, *TEA)
    assert rest == TEA and said_before(memory) == spoken(*BISCUIT)
    assert mark.additional_kwargs[KV_RECALL] == {
        "conversation_id": "alice", "keep_ratio": 0.25, "top_k": 3, "n_turns": 2, "keep_tokens": None, "max_bytes": None
    }  # fmt: skip
    with recorded_inputs(wide) as inputs:
        assert shortened(memory, *BISCUIT, *TEA) == [mark, *TEA]
    assert inputs == []
    with recorded_inputs(wide) as inputs:
        assert window(shortened(memory, *BISCUIT, *TEA, *RAIN)) == [message.text for message in RAIN]
    assert len(inputs) == 1 and said_before(memory) == spoken(*BISCUIT, *TEA)


def test_an_exchange_leaves_the_window_as_a_whole(memory: KVMemory) -> None:
    assert window(shortened(memory, *BISCUIT, *TEA, window_turns=3)) == [message.text for message in TEA]


@pytest.mark.parametrize(("tokens", "n_left"), [(28, 2), (27, 0), (53, 4), (1000, 6), (None, 6), (0, 0)])
def test_the_window_can_be_limited_in_tokens(memory: KVMemory, tokens: int | None, n_left: int) -> None:
    said = [HumanMessage("a" * 10), AIMessage("b" * 18)]  # a token a letter
    middle = [HumanMessage("c" * 15), AIMessage("d" * 10)]
    messages = [*TEA, *middle, *said]
    left = window(shortened(memory, *messages, window_turns=None, window_tokens=tokens))
    assert left == [message.text for message in messages[6 - n_left :]]
    assert said_before(memory) == spoken(*messages[: 6 - n_left])


def test_instructions_at_the_beginning_and_the_last_question_always_stay(memory: KVMemory) -> None:
    brief, kind = SystemMessage("Be brief."), SystemMessage("Be kind.")
    assert shortened(memory, brief, kind, *BISCUIT, window_turns=0)[:2] == [brief, kind]
    history = create_kv_history(memory, window_turns=0, window_tokens=0)
    passed = history.invoke([brief, *BISCUIT, HumanMessage("x" * 500), AIMessage("Yes?")], ALICE)
    assert passed[0] == brief and KV_RECALL in passed[1].additional_kwargs
    assert [message.text for message in passed[2:]] == ["x" * 500, "Yes?"]
    assert said_before(memory) == spoken(*BISCUIT)


def test_prompts_and_pairs_are_messages_too(memory: KVMemory) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), MessagesPlaceholder("h"), ("human", "{input}")])
    chain = prompt | create_kv_history(memory, window_turns=0)
    passed = chain.invoke({"h": BISCUIT, "input": "Why?"}, ALICE)
    assert [message.text for message in passed] == ["Be brief.", "", "Why?"]
    assert len(create_kv_history(memory).invoke([("user", "Hello"), ("ai", "Hello")], ALICE)) == 2


def test_another_process_compresses_nothing_again(memory: KVMemory, wide: Any) -> None:
    before = shortened(memory, *BISCUIT, *TEA)
    memory.close()
    with open_memory(memory.path, wide) as again:
        with recorded_inputs(wide) as inputs:
            assert shortened(again, *BISCUIT, *TEA) == before
        assert inputs == []
        shortened(again, *BISCUIT, *TEA, *RAIN)
        assert said_before(again) == spoken(*BISCUIT, *TEA)


def test_turns_that_cannot_be_compressed_are_compressed_later(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise errors.StoreFullError("no space left")

    monkeypatch.setattr(KVMemory, "add_passages", full)
    with pytest.raises(errors.StoreFullError):
        shortened(memory, *BISCUIT, *TEA)
    monkeypatch.undo()
    shortened(memory, *BISCUIT, *TEA, *RAIN)
    assert said_before(memory) == spoken(*BISCUIT, *TEA)


def test_a_chat_that_was_edited_or_resumed_earlier_is_followed(memory: KVMemory) -> None:
    n_blobs = cache_blobs(memory)
    for n in (2, 4, 6):  # one exchange leaves at a time
        shortened(memory, *[*BISCUIT, *TEA, *RAIN][:n], window_turns=0)
    assert said_before(memory) == spoken(*BISCUIT, *TEA, *RAIN)
    coffee = HumanMessage("I drink coffee.")
    shortened(memory, *BISCUIT, coffee, TEA[1], *RAIN, window_turns=0)
    assert said_before(memory) == spoken(*BISCUIT, coffee, TEA[1], *RAIN)
    assert Conversation(memory, "alice").recall("green tea?") == []
    shortened(memory, *BISCUIT, window_turns=0)
    assert said_before(memory) == spoken(*BISCUIT) and cache_blobs(memory) == n_blobs + 1
    shortened(memory, window_turns=0)
    assert said_before(memory) == [] and cache_blobs(memory) == n_blobs and memory.check().ok


def test_blank_messages_and_marks_are_not_compressed(memory: KVMemory) -> None:
    assert shortened(memory, HumanMessage(" "), AIMessage(""), window_turns=0) == []  # nothing to recall
    passed = shortened(memory, *BISCUIT, window_turns=0)
    again = shortened(memory, *passed, *BISCUIT, window_turns=0)  # a mark that comes back is no message
    assert again == passed and said_before(memory) == spoken(*BISCUIT)
    assert passed[0].additional_kwargs[KV_RECALL]["n_turns"] == 2


def test_conversations_are_separate_and_can_be_cleared(memory: KVMemory) -> None:
    bob: Any = {"configurable": {"thread_id": "bob"}}
    shortened(memory, *BISCUIT, window_turns=0)
    shortened(memory, *TEA, window_turns=0, thread=bob)
    Conversation(memory, "alice").clear()
    assert said_before(memory) == [] and said_before(memory, "bob") == spoken(*TEA)
    assert [summary.id for summary in memory.documents()] == ["ferry", "lamp"]


async def test_concurrent_calls_compress_a_turn_once(memory: KVMemory, wide: Any) -> None:
    history, start, passed = create_kv_history(memory, window_turns=0), threading.Barrier(3), []

    def call() -> None:
        start.wait()
        passed.append(history.invoke([*BISCUIT, *TEA, QUESTION], ALICE))

    with recorded_inputs(wide) as inputs:
        await asyncio.gather(*(asyncio.to_thread(call) for _ in range(3)))
    assert passed[0] == passed[1] == passed[2] == await history.ainvoke([*BISCUIT, *TEA, QUESTION], ALICE)
    assert len(inputs) == 2 and said_before(memory) == spoken(*BISCUIT, *TEA)


# -- recall ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"keep_tokens": 9}, {"max_bytes": 12_000}])
def test_old_turns_have_their_own_keep_tokens_and_max_bytes(
    memory: KVMemory, llm: ChatKVMemory, budget: dict[str, int]
) -> None:
    passed = shortened(memory, *BISCUIT, *RAIN, *TEA, top_k=1, **budget)
    old: Any = Conversation(memory, "alice", top_k=1, **budget)
    (reference,) = old.recall(QUESTION.text)
    info = {info.text_sha256: info for info in old._memory.store.caches()}[reference.key]
    assert reference.keep_ratio == info.keep_ratio != 0.25
    assert info.n_kept == 9 if "keep_tokens" in budget else 9_000 < info.size_bytes <= 12_000
    message = llm.invoke([*passed, QUESTION])
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_token_details"]["cache_read"] == 11 + info.n_kept


def test_a_mark_is_resolved_by_the_last_question_and_dropped(memory: KVMemory, llm: ChatKVMemory, wide: Any) -> None:
    passed = shortened(memory, *BISCUIT, *RAIN, *TEA, keep_ratio=1.0, top_k=1)
    references = Conversation(memory, "alice", top_k=1, keep_ratio=1.0).recall(QUESTION.text)
    assert len(references) == 1 and references[0].keep_ratio == 1.0
    with recorded_inputs(wide) as inputs:
        turns = spoken(*TEA, QUESTION)
        expected = memory.reader.reply(turns, references, settings=llm._decode_settings({})).answer
        message = llm.invoke([*passed, QUESTION])
    prefills = [ids.tolist() for ids in inputs if ids.shape[1] > 1]
    assert len(prefills) == 2 and prefills[0] == prefills[1]
    assert message.content == expected.text.strip()
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_token_details"]["cache_read"] == expected.n_cached_tokens > 11 + 30
    about_rain = llm.invoke([*passed, HumanMessage("What rains?")])
    assert about_rain.usage_metadata["input_token_details"]["cache_read"] != expected.n_cached_tokens  # type: ignore[index]


def test_an_unrelated_question_recalls_nothing(memory: KVMemory, llm: ChatKVMemory) -> None:
    passed = shortened(memory, *BISCUIT, *TEA)
    assert llm.invoke([*passed, HumanMessage("Xylophone?")]).content == (
        llm.invoke([*TEA, HumanMessage("Xylophone?")]).content
    )


def test_a_reply_combines_documents_and_old_turns(memory: KVMemory, llm: ChatKVMemory) -> None:
    passed = shortened(memory, *BISCUIT, *TEA)
    context = KVMemoryRetriever(memory, k=1).invoke(FERRY_QUESTION)
    question = "Does the ferry take my dog?"
    references = [context[0].metadata["kv_id"], *map(str, Conversation(memory, "alice").recall(question))]
    assert len(references) == 2
    turns = [*TEA, HumanMessage(question)]
    answer = create_kv_chain(llm).invoke({"context": context, "input": question, "chat_history": passed})
    assert answer == llm.invoke(turns, kv_ids=references).content
    assert answer != llm.invoke(turns, kv_ids=references[:1]).content or (
        llm.invoke(turns, kv_ids=references[:1]).usage_metadata != llm.invoke(turns, kv_ids=references).usage_metadata
    )


# -- a graph with a checkpointer ---------------------------------------------------------------------------------------


def test_a_long_chat_keeps_the_prompt_short(memory: KVMemory) -> None:
    app = graph(memory, window_tokens=200)
    asked = [f"Question {number} is about the {word}." for number in range(5) for word in ("cat", "dog", "sea", "sky")]
    n_prefilled, n_cached = [], []
    for question in asked:
        usage: Any = ask(app, question).usage_metadata
        n_cached.append(usage["input_token_details"]["cache_read"])
        n_prefilled.append(usage["input_tokens"] - n_cached[-1])
    assert max(n_prefilled) < 400
    assert max(n_cached) < 11 + 3 * 64 + 10  # the prefix, and three passages of at most 64 tokens
    messages = app.get_state(ALICE).values["messages"]  # the checkpoint holds them all
    assert [message.text for message in messages[::2]] == asked
    n_old = len(said_before(memory))
    assert n_old > 20 and said_before(memory) == [turn for turn in spoken(*messages) if turn.text.strip()][:n_old]


async def test_all_call_forms_follow_the_chat(memory: KVMemory) -> None:
    chat = create_kv_history(memory, window_turns=2) | ChatKVMemory(memory, max_tokens=4)

    async def answer(state: MessagesState) -> Any:
        return {"messages": [await chat.ainvoke(state["messages"], ALICE)]}

    saver = InMemorySaver()
    waits = StateGraph(MessagesState).add_node(answer).add_edge(START, "answer").compile(saver)
    app = graph(memory, saver=saver, window_turns=2)

    def asked(text: str) -> Any:
        return {"messages": [HumanMessage(text)]}

    app.invoke(asked("One?"), ALICE)
    pieces = [piece async for piece, _ in waits.astream(asked("Two?"), ALICE, stream_mode="messages")]
    assert len(pieces) > 1
    assert list(app.stream(asked("Three?"), ALICE, stream_mode="messages"))
    await waits.ainvoke(asked("Four?"), ALICE)
    assert [turn.text for turn in said_before(memory) if turn.role == "user"] == ["One?", "Two?"]
    fresh = graph(memory, saver=saver, window_turns=2)  # as after a restart with a checkpointer on disk
    ask(fresh, "Five?")
    assert [turn.text for turn in said_before(memory) if turn.role == "user"] == ["One?", "Two?", "Three?"]


def test_a_chat_that_is_resumed_from_a_checkpoint_forgets_what_came_after(memory: KVMemory) -> None:
    app = graph(memory, window_turns=0)
    for question in ("My dog is Biscuit.", "My cat is Crumb.", "And now?"):
        ask(app, question)
    assert Conversation(memory, "alice").recall("cat")
    earlier = next(s for s in app.get_state_history(ALICE) if len(s.values["messages"]) == 2)
    ask(app, "What else?", earlier.config)
    assert [turn.text for turn in said_before(memory) if turn.role == "user"] == ["My dog is Biscuit."]
    assert Conversation(memory, "alice").recall("cat") == []


# -- what is replaced, left out and refused ----------------------------------------------------------------------------

HALVES = ["half \ud83d", "\ude00 half", "a\0b", "\udcff\ud800"]


@pytest.mark.parametrize("text", HALVES)
def test_half_an_emoji_breaks_no_later_call(memory: KVMemory, text: str) -> None:
    app = graph(memory, window_turns=2)
    for question in (text, "Pardon?", "Why half?", f"What {text}?"):
        assert ask(app, question).usage_metadata
    assert said_before(memory)[0] == Turn("user", text.replace("\0", "\ufffd").encode(errors="replace").decode())
    assert len(said_before(memory)) >= 2 and memory.check().ok


@pytest.mark.parametrize("text", HALVES)
async def test_a_model_takes_half_an_emoji(memory: KVMemory, llm: ChatKVMemory, text: str) -> None:
    messages = [HumanMessage("Hello"), AIMessage([{"type": "text", "text": text}]), HumanMessage(text)]
    expected = llm.invoke([HumanMessage("Hello")] + [
        type(message)(text.replace("\0", "\ufffd").encode(errors="replace").decode()) for message in messages[1:]
    ])  # fmt: skip
    assert (await llm.ainvoke(messages)).content == expected.content
    assert "".join(chunk.text for chunk in llm.stream(messages)) == expected.content
    assert llm.get_num_tokens_from_messages(messages) > 0 < llm.get_num_tokens(text)
    document = KVMemoryRetriever(memory, k=1).invoke(FERRY_QUESTION)[0].model_copy(update={"page_content": text})
    assert create_kv_chain(llm).invoke({"context": [document], "input": text}) is not None
    assert llm.invoke(text, kv_ids=[key_of(text)], kv_texts={key_of(text): "Text."}).usage_metadata


@pytest.mark.parametrize(
    "message",
    [
        ToolMessage("7", tool_call_id="1"),
        AIMessage("", tool_calls=[{"name": "look_up", "args": {}, "id": "1"}]),
        HumanMessage([{"type": "image_url", "image_url": {"url": "a.png"}}]),
    ],
)
def test_unsupported_messages_are_refused_before_anything_is_compressed(memory: KVMemory, message: BaseMessage) -> None:
    for messages in ([*BISCUIT, message], [message, *BISCUIT, *TEA], [*BISCUIT, *TEA, message]):
        with pytest.raises(UnsupportedRequestError):
            shortened(memory, *messages, window_turns=1)
    assert said_before(memory) == []


@pytest.mark.parametrize("config", [None, {}, {"configurable": {"session_id": "alice"}}])
def test_a_call_without_a_thread_id_is_refused(memory: KVMemory, config: Any) -> None:
    with pytest.raises(ConfigError, match="thread_id") as caught:
        create_kv_history(memory).invoke(BISCUIT, config)
    assert caught.value.where == "configurable.thread_id"


@pytest.mark.parametrize(
    "options", [{"window_turns": -1}, {"window_tokens": -1}, {"keep_ratio": 0.0}, {"top_k": 0}, {"selector": "matched"}]
)
def test_options_out_of_range_are_refused(memory: KVMemory, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_kv_history(memory, **options)
    assert caught.value.where in options or "selector" in str(caught.value)
