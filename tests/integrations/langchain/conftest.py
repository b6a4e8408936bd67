"""What the tests under LangChain share."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from tests.memories import open_memory

_RAN = pytest.StashKey[dict[str, bool]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.path.name == "test_langchain_suites.py":
        ran = item.config.stash.setdefault(_RAN, {})
        name: str = item.originalname  # type: ignore[attr-defined]
        ran[name] = ran.get(name, False) or report.skipped
    return report


@pytest.fixture
def ran(request: pytest.FixtureRequest) -> dict[str, bool]:
    """The standard suites' tests that this process has run so far, by name, and whether they were skipped."""
    return request.config.stash.setdefault(_RAN, {})


@pytest.fixture
def llm(memory: KVMemory) -> Any:
    """A chat model over a store of two documents; answers are four tokens long."""
    from kv_memory.integrations.langchain import ChatKVMemory

    return ChatKVMemory(memory, max_tokens=4)


@pytest.fixture
def empty(tmp_path: Path, wide: Any) -> Iterator[KVMemory]:
    """A KVMemory without documents."""
    with open_memory(tmp_path / "empty", wide) as memory:
        yield memory
