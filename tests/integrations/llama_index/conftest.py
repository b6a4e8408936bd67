from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.storage.chat_store import sql
from sqlalchemy.ext.asyncio import AsyncEngine

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import KVMemoryLLM
from kv_memory.model.backbone import Backbone
from tests.conftest import make_tokenizer
from tests.memories import open_memory, wide_backbone

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def llm(memory: KVMemory) -> KVMemoryLLM:
    """Over the two documents of `memory`."""
    return KVMemoryLLM(memory, max_tokens=6)


@pytest.fixture(scope="session")
def chat_backbone() -> Any:
    """A tiny Llama whose tokenizer has a chat template. No test may change it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    plain = wide_backbone()
    return Backbone(plain.model, tokenizer, prompt="chat", name="tiny-chat")


@pytest.fixture
def chat_llm(tmp_path: Path, chat_backbone: Any) -> Iterator[KVMemoryLLM]:
    """Over an empty store; its model has a chat template."""
    with open_memory(tmp_path / "chat-store", chat_backbone) as memory:
        yield KVMemoryLLM(memory, max_tokens=6)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVMemory]:
    """An empty store over smollm2."""
    with KVMemory.open(tmp_path_factory.mktemp("embedded") / "store", model="smollm2", keep_ratio=1.0) as memory:
        yield memory


@pytest.fixture
async def chat_memories(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """For tests with a `Memory` of LlamaIndex, which never closes its SQLite connection."""
    engines: list[AsyncEngine] = []
    create = sql.create_async_engine

    def recorded(*args: Any, **options: Any) -> AsyncEngine:
        engines.append(create(*args, **options))
        return engines[-1]

    monkeypatch.setattr(sql, "create_async_engine", recorded)
    yield
    for engine in engines:
        await engine.dispose()


@pytest.fixture
def empty(tmp_path: Path, wide: Any) -> Iterator[KVMemory]:
    """A KVMemory without documents, which keeps their texts."""
    with open_memory(tmp_path / "empty", wide, keep_text=True) as memory:
        yield memory
