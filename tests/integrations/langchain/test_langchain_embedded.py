"""LangChain with smollm2: the quick start of the package, and a chat that outgrows its window."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from kv_memory import Conversation, KVMemory
from kv_memory.integrations import langchain
from kv_memory.integrations.langchain import ChatKVMemory, create_kv_history
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)"),
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
        # A longer window of chatter is what so small a model goes on with.
        chat = create_kv_history(memory, keep_ratio=1.0, window_tokens=80) | ChatKVMemory(memory, max_tokens=12)

        def answer(state: MessagesState) -> Any:
            return {"messages": [chat.invoke(state["messages"])]}

        graph = StateGraph(MessagesState).add_node(answer).add_edge(START, "answer")
        app: Any = graph.compile(InMemorySaver())
        said: list[BaseMessage] = []
        for number in range(12):
            topic, reply = list(FILLER.items())[number % len(FILLER)]
            question = f"Tell me something about {topic}, please ({number})."
            if number == 1:  # turns 3 and 4
                question, reply = "By the way, my dog is called Biscuit.", "What a nice name for a dog!"
            said += [HumanMessage(question), AIMessage(reply)]
        thread: Any = {"configurable": {"thread_id": "alice"}}
        app.update_state(thread, {"messages": said})
        message = app.invoke({"messages": [HumanMessage("What is my dog called?")]}, thread)["messages"][-1]
        assert "Biscuit" in message.text
        usage = message.usage_metadata
        assert usage["input_tokens"] - usage["input_token_details"]["cache_read"] < 150
        assert len(Conversation(memory, "alice").turns()) > 14
