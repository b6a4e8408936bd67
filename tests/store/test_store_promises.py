"""docs/reliability.md names the test that holds each promise; so these have to be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", DOCUMENT.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda value: value.removesuffix(".py"))
def test_every_test_named_in_the_docs_exists(file: str, test: str) -> None:
    (path,) = (folder / file for folder in (TESTS / "store", TESTS / "jobs", TESTS) if (folder / file).is_file())
    assert re.search(rf"^(async )?def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_promise_has_a_test() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## What is not promised")[0]
    promises = re.findall(r"^- .*?(?=^- |^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(promises) > 20
    assert [promise for promise in promises if "::" not in promise] == []
