"""What the tests under LangChain share."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from kv_memory import KVMemory

_SKIPPED = pytest.StashKey[set[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.path.name == "test_langchain_suites.py":
        item.config.stash.setdefault(_SKIPPED, set()).add(item.originalname)  # type: ignore[attr-defined]
    return report


@pytest.fixture
def skipped(request: pytest.FixtureRequest) -> set[str]:
    """Names of the standard suites' tests that have been skipped so far."""
    return request.config.stash.setdefault(_SKIPPED, set())


@pytest.fixture
def llm(memory: KVMemory) -> Any:
    """A chat model over a store of two documents; answers are four tokens long."""
    from kv_memory.integrations.langchain import ChatKVMemory

    return ChatKVMemory(memory, max_tokens=4)
