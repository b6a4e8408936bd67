"""Copies of a model, also in another process, open the same store with the same settings."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import KVMemoryLLM


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_copies_open_the_same_store(memory: KVMemory, way: Any) -> None:
    llm = way(KVMemoryLLM(memory, max_tokens=5))
    assert llm.memory.path == memory.path
    assert llm.memory.settings == memory.settings
    assert [summary.id for summary in llm.memory.documents()] == [summary.id for summary in memory.documents()]
