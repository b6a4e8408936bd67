from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from kv_memory import DecodeSettings, KVMemory
from kv_memory.conversation import Conversation
from kv_memory.errors import ConfigError, UnreadableDocumentError
from kv_memory.generate import Turn
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN
from kv_memory.query import Reference, key_of
from tests.memories import FERRY_QUESTION, LAMP_QUESTION, SETTINGS, answerable, cache_blobs, open_memory
from tests.reference import letters, recorded_inputs

BISCUIT = Turn("user", "My dog is called Biscuit.")
NICE = Turn("assistant", "A fine name!")
TEA = Turn("user", "I drink green tea.")
COFFEE = Turn("user", "My sister drinks coffee.")


def passages(conversation: Conversation) -> list[str]:
    return [passage.text for passage in conversation._memory.store.passages()]


def texts_of(conversation: Conversation, question: str) -> list[str]:
    """What is recalled, as text."""
    store = conversation._memory.store
    return [store.text(reference.key) or "" for reference in conversation.recall(question)]


# -- adding and recalling ----------------------------------------------------------------------------------------------


def test_recall_finds_the_turns_that_match_a_question(memory: KVMemory) -> None:
    old = Conversation(memory, "alice")
    assert old.turns() == [] and old.recall("What is my dog called?") == []
    old.add([BISCUIT, NICE])
    old.add([TEA])
    assert old.turns() == [BISCUIT, NICE, TEA]
    assert texts_of(old, "What is my dog called?") == [f"User: {BISCUIT.text}\nAssistant: {NICE.text}"]
    assert texts_of(old, "Which tea?") == [f"User: {TEA.text}"]
    assert old.recall("Xylophone?") == []


def test_conversations_of_two_collections_are_apart_whatever_their_names(memory: KVMemory) -> None:
    Conversation(memory.in_collection("team"), "red:alice").add([BISCUIT])
    other = Conversation(memory.in_collection("team:red"), "alice")
    assert other.turns() == []
    assert other.recall("What is my dog called?") == []
    other.add([TEA])
    assert Conversation(memory.in_collection("team"), "red:alice").turns() == [BISCUIT]
    assert Conversation(memory.in_collection("team:red"), "alice").turns() == [TEA]


def test_a_reply_uses_the_caches_of_recalled_turns(memory: KVMemory, wide: Any) -> None:
    old = Conversation(memory, "alice")
    old.add([BISCUIT])
    (info,) = old._memory.store.caches()
    references = old.recall("What is my dog called?")
    turns = [Turn("user", "What is my dog called?")]
    with recorded_inputs(wide) as inputs:
        reply = memory.reader.reply(turns, references, settings=SETTINGS).answer
    assert inputs[0].shape[1] == reply.n_prompt_tokens == len(wide.encode_question(turns[0].text))  # no text of old
    assert reply.n_cached_tokens == 11 + info.n_kept


def test_recall_returns_at_most_top_k_turns_in_order(memory: KVMemory) -> None:
    said = [Turn("user", text) for text in ("A cat.", "A cat, a cat, a cat!", "One cat and a dog.", "No pets.")]
    for top_k in (1, 2, 3):
        old = Conversation(memory, f"top {top_k}", top_k=top_k)
        for turn in said:
            old.add([turn])
        found = texts_of(old, "cat")
        assert len(found) == top_k
        assert found == sorted(found, key=lambda text: [f"User: {turn.text}" for turn in said].index(text))
        assert f"User: {said[1].text}" in found  # what fits best is among them
    assert Conversation(memory, "any").top_k == memory.settings.top_k


def test_repeated_turns_are_recalled_once(memory: KVMemory) -> None:
    old = Conversation(memory, "alice")
    for turn in (TEA, COFFEE, TEA):
        old.add([turn])
    assert texts_of(old, "Who drinks tea, who drink coffee?") == [f"User: {TEA.text}", f"User: {COFFEE.text}"]
    assert old.turns() == [TEA, COFFEE, TEA]


def test_more_than_ten_additions_stay_in_order(memory: KVMemory) -> None:
    old = Conversation(memory, "alice", top_k=20)
    said = [Turn("user", f"Number {number}.") for number in range(12)]
    for turn in said:
        old.add([turn])
    assert old.turns() == said
    assert texts_of(old, "number") == [f"User: {turn.text}" for turn in said]


def test_turns_persist_when_the_store_is_reopened(memory: KVMemory, wide: Any) -> None:
    Conversation(memory, "alice").add([BISCUIT, NICE])
    expected = Conversation(memory, "alice").recall("dog")
    memory.close()
    with open_memory(memory.path, wide) as again:
        with recorded_inputs(wide) as inputs:
            old = Conversation(again, "alice")
            assert old.turns() == [BISCUIT, NICE] and old.recall("dog") == expected != []
        assert inputs == []
        reply = again.reader.reply([Turn("user", "dog?")], expected, settings=SETTINGS).answer
        assert reply.n_cached_tokens > 11
        old.add([TEA])
        assert old.turns() == [BISCUIT, NICE, TEA]


def test_a_conversation_follows_a_chat_that_is_stored_elsewhere(memory: KVMemory, wide: Any) -> None:
    n_blobs = cache_blobs(memory)
    old = Conversation(memory, "alice")
    old.follow([BISCUIT, NICE])
    with recorded_inputs(wide) as inputs:
        old.follow([BISCUIT, Turn("user", " "), NICE, TEA])
    assert len(inputs) == 1 and old.turns() == [BISCUIT, NICE, TEA]
    old.follow([BISCUIT, NICE, COFFEE, TEA])  # edited: from the difference on, it is made again
    assert old.turns() == [BISCUIT, NICE, COFFEE, TEA] and old.recall("coffee")
    old.follow([BISCUIT])  # half of what was added at once
    assert old.turns() == [BISCUIT] and old.recall("tea") == [] and cache_blobs(memory) == n_blobs + 1
    old.follow([])
    assert old.turns() == [] and cache_blobs(memory) == n_blobs and memory.check().ok


def test_clear_removes_turns_and_caches(memory: KVMemory) -> None:
    n_blobs = cache_blobs(memory)
    old = Conversation(memory, "alice")
    old.add([BISCUIT, NICE])
    old.add([TEA])
    assert cache_blobs(memory) == n_blobs + 2
    old.clear()
    assert old.turns() == [] and old.recall("dog") == []
    assert cache_blobs(memory) == n_blobs and memory.check().ok
    old.clear()
    old.add([COFFEE])
    assert old.turns() == [COFFEE] and texts_of(old, "coffee") == [f"User: {COFFEE.text}"]


def test_a_conversation_can_have_its_own_keep_ratio(memory: KVMemory) -> None:
    whole, quarter = Conversation(memory, "whole", keep_ratio=1.0), Conversation(memory, "quarter")
    for old, ratio in ((whole, 1.0), (quarter, 0.25)):
        old.add([BISCUIT])
        (info,) = old._memory.store.caches()
        (reference,) = old.recall("dog")
        assert old.keep.keep_ratio == info.keep_ratio == reference.keep_ratio == ratio
        reply = memory.reader.reply([Turn("user", "dog?")], [reference], settings=SETTINGS).answer
        assert reply.n_cached_tokens == 11 + info.n_kept
    assert memory.settings.keep_ratio == 0.25


# -- passages ----------------------------------------------------------------------------------------------------------


def test_an_exchange_is_a_passage(memory: KVMemory) -> None:
    old = Conversation(memory, "alice")
    old.add([Turn("assistant", "Hello."), BISCUIT, Turn("assistant", "I see."), TEA, TEA])
    assert passages(old) == [
        "Assistant: Hello.",
        f"User: {BISCUIT.text}\nAssistant: I see.",
        f"User: {TEA.text}",  # what is said twice is kept once
    ]


def test_a_turn_longer_than_a_passage_is_cut(memory: KVMemory, wide: Any) -> None:
    old = Conversation(memory, "alice")
    text = " ".join(f"Sentence {i} tells of a walrus." for i in range(8))
    old.add([BISCUIT, Turn("assistant", text), TEA])
    found = passages(old)
    assert len(found) > 3 and all(n <= 64 for n in wide.count_tokens(found))
    joined = " ".join(" ".join(found).split())
    assert joined == f"User: {BISCUIT.text} Assistant: {text} User: {TEA.text}"
    assert old.turns()[1].text == text


def test_without_a_limit_turns_stay_whole(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, passage_tokens=None) as memory:
        old = Conversation(memory, "alice")
        said = [Turn("user", letters(600, seed=seed).strip()) for seed in range(3)]
        old.add(said)
        assert passages(old) == [f"User: {turn.text}" for turn in said]


def test_blank_turns_are_left_out(memory: KVMemory, wide: Any) -> None:
    old = Conversation(memory, "alice")
    with recorded_inputs(wide) as inputs:
        old.add([])
        old.add([Turn("user", " \n"), Turn("assistant", "")])
    assert inputs == [] and old.turns() == []
    old.add([Turn("assistant", ""), Turn("user", f"  {TEA.text}\n"), Turn("system", "Be brief.")])
    assert passages(old) == [f"User: {TEA.text}\nInstructions: Be brief."]
    assert old.turns() == [Turn("user", f"  {TEA.text}\n"), Turn("system", "Be brief.")]


# -- apart from the rest -----------------------------------------------------------------------------------------------


def test_conversations_are_isolated_from_each_other(memory: KVMemory) -> None:
    alice, bob = Conversation(memory, "alice"), Conversation(memory, "bob")
    alice.add([BISCUIT])
    bob.add([Turn("user", "My dog is called Rex.")])
    assert texts_of(alice, "dog") == [f"User: {BISCUIT.text}"]
    assert texts_of(bob, "dog") == ["User: My dog is called Rex."]
    bob.clear()
    assert texts_of(alice, "dog") == [f"User: {BISCUIT.text}"]
    assert Conversation(memory, "alice").turns() == [BISCUIT]


def test_conversations_are_isolated_from_the_documents(memory: KVMemory) -> None:
    before = memory.documents()
    old = Conversation(memory, "default")  # as the documents' collection is called
    old.add([BISCUIT, Turn("user", "The ferry leaves at 9.")])
    assert memory.documents() == before
    assert memory.retrieve("Biscuit") == []
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
    assert all("Skarholm" not in text for text in texts_of(old, FERRY_QUESTION))
    assert memory.stats().n_documents == 2
    assert not memory.reader.has(passages(old)[0])
    memory.gc()
    assert texts_of(old, "Biscuit") and memory.check().ok


def test_a_reply_can_use_documents_and_turns_together(memory: KVMemory) -> None:
    old = Conversation(memory, "alice")
    old.add([BISCUIT])
    (ferry,) = memory.store.caches("ferry")
    (said,) = old._memory.store.caches()
    references = [Reference(key=ferry.text_sha256), *old.recall("dog")]
    assert [reference.key for reference in references] == [ferry.text_sha256, key_of(f"User: {BISCUIT.text}")]
    reply = memory.reader.reply([Turn("user", "dog?")], references, settings=SETTINGS).answer
    assert reply.n_cached_tokens == 11 + ferry.n_kept + said.n_kept


def test_concurrent_adds_lose_nothing(memory: KVMemory) -> None:
    said = [Turn("user", f"Number {number}.") for number in range(8)]
    both = threading.Barrier(len(said))

    def add(turn: Turn) -> None:
        old = Conversation(memory, "alice")  # of its own, as a server makes one for every request
        both.wait()
        old.add([turn])

    threads = [threading.Thread(target=add, args=(turn,)) for turn in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Conversation(memory, "alice").turns()) == said


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"keep_ratio": 0}, {"keep_ratio": 1.5}, {"top_k": 0}])
def test_settings_out_of_range_are_refused(memory: KVMemory, options: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Conversation(memory, "alice", **options)
    assert caught.value.where in options


@pytest.mark.parametrize("name", ["", " ", "x" * 300])
def test_invalid_names_are_refused(memory: KVMemory, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        Conversation(memory, name)


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        (Turn("tool", "7"), ConfigError),  # type: ignore[arg-type]
        (Turn("user", "a\0b"), UnreadableDocumentError),
        (Turn("user", "half \ud83d"), UnreadableDocumentError),
    ],
)
def test_invalid_turns_are_refused_and_store_nothing(memory: KVMemory, turn: Turn, error: type[Exception]) -> None:
    old = Conversation(memory, "alice")
    old.add([BISCUIT])
    with pytest.raises(error):
        old.add([TEA, turn])
    assert old.turns() == [BISCUIT]


# -- smollm2 -----------------------------------------------------------------------------------------------------------

FILLER = ["the weather in Bergen", "a recipe for onion soup", "train tickets", "the rules of chess", "oil paint"]


@pytest.mark.slow
@pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)")
def test_a_fact_from_many_turns_ago_is_recalled(tmp_path: Path) -> None:
    said: list[Turn] = []
    for number in range(16):
        topic = FILLER[number % len(FILLER)]
        said += [
            Turn("user", f"Question {number}: tell me something about {topic}."),
            Turn("assistant", f"Here is a short note, number {number}, about {topic}."),
        ]
    said[2:4] = [
        Turn("user", "By the way, my dog is called Biscuit."),
        Turn("assistant", "What a nice name for a dog!"),
    ]
    settings, question = DecodeSettings(max_new_tokens=12), Turn("user", "What is my dog called?")
    with KVMemory.open(tmp_path / "store", model=Backbone.load("smollm2", dtype="float32", device="cpu")) as memory:
        old = Conversation(memory, "alice", keep_ratio=1.0)
        for start in range(0, len(said), 2):  # as exchanges leave the prompt of a long chat
            old.add(said[start : start + 2])
        assert old.turns() == said
        (reference,) = old.recall(question.text)  # smollm2 reads one passage
        assert "Biscuit" in memory.reader.reply([question], [reference], settings=settings).answer.text
        assert "Biscuit" not in memory.reader.reply([question], settings=settings).answer.text
