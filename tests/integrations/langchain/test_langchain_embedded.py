"""LangChain with smollm2: the quick start of the package, and a chat that outgrows its window."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables.history import RunnableWithMessageHistory

from kv_memory import KVMemory
from kv_memory.integrations import langchain
from kv_memory.integrations.langchain import ChatKVMemory, KVMemoryChatMessageHistory
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)"),
    # LangChain recommends LangGraph's checkpoints, and keeps this class until its version 2.
    pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated"),
]
FILLER = {
    "the weather in Bergen": "It rains there on most days of the year.",
    "a recipe for onion soup": "Fry the onions slowly and add broth.",
    "train tickets": "They are cheaper if you book early.",
    "the rules of chess": "The king may never stay in check.",
    "oil paint": "It dries slowly and smells of linseed.",
}


@pytest.mark.usefixtures("only_smollm2")
def test_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", langchain.__doc__ or "", re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    names["memory"].close()
    assert "7.40" in capsys.readouterr().out
    assert (tmp_path / "my-store").is_dir()


def test_a_fact_of_turn_3_is_recalled_in_a_long_chat(tmp_path: Path) -> None:
    with KVMemory.open(tmp_path / "store", model=Backbone.load("smollm2", dtype="float32", device="cpu")) as memory:
        options: Any = {
            "keep_ratio": 1.0,
            "window_tokens": 80,
        }  # a longer window of chatter is what so small a model goes on with
        kept = KVMemoryChatMessageHistory(memory, "alice", **options)
        for number in range(12):
            topic, answer = list(FILLER.items())[number % len(FILLER)]
            question = f"Tell me something about {topic}, please ({number})."
            if number == 1:  # turns 3 and 4
                question, answer = "By the way, my dog is called Biscuit.", "What a nice name for a dog!"
            kept.add_messages([HumanMessage(question), AIMessage(answer)])
        talk = RunnableWithMessageHistory(
            ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{input}")])
            | ChatKVMemory(memory, max_tokens=12),
            lambda session_id: KVMemoryChatMessageHistory(memory, session_id, **options),
            input_messages_key="input",
            history_messages_key="history",
        )
        session: Any = {"configurable": {"session_id": "alice"}}
        message = talk.invoke({"input": "What is my dog called?"}, session)
        assert "Biscuit" in message.text
        usage = message.usage_metadata
        assert usage["input_tokens"] - usage["input_token_details"]["cache_read"] < 150
        assert len(kept.conversation.turns()) > 14
