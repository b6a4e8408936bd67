"""The published sets as they are; run where KV_MEMORY_DATA names a folder with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kv_memory.datasets import Example, read_examples

DATA = os.environ.get("KV_MEMORY_DATA", "")

pytestmark = pytest.mark.skipif(not DATA, reason="KV_MEMORY_DATA is not set")


def read(name: str, split: Any) -> list[Example]:
    found = list(read_examples(name, split=split))
    assert all(example.questions and example.source == name for example in found)
    return found


def n_questions(examples: list[Example]) -> int:
    return sum(len(example.questions) for example in examples)


def test_squad() -> None:
    examples = read("squad", "dev")
    assert len({e.id for e in examples}) == len(examples) > 1000
    assert n_questions(examples) > 5000
    questions = [(e, q) for e in examples for q in e.questions]
    # The set's answers are spans of the paragraph.
    assert all(answer in e.context for e, q in questions for answer in q.answers)
    assert max(len(q.answers) for _, q in questions) > 1


def test_dolly() -> None:
    examples = read("dolly", "train")
    assert n_questions(examples) == 4463
    assert len({e.id for e in examples}) == 4120


@pytest.mark.parametrize(("split", "n"), [("train", 8548), ("dev", 1025)])
def test_fairytaleqa(split: str, n: int) -> None:
    examples = read("fairytaleqa", split)
    assert n_questions(examples) == n  # what the authors count: none is lost
    assert len({e.id for e in examples}) == len(examples)
    assert any("+" in e.id for e in examples)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_squality(split: str) -> None:
    examples = read("squality", split)
    assert len({e.id for e in examples}) == len(examples)
    assert {len(e.questions) for e in examples} == {5}
    assert {len(q.answers) for e in examples for q in e.questions} == {4}
    assert all(len(e.context) > 10_000 and "\n\n\n" not in e.context for e in examples)


def test_quality() -> None:
    examples = read("quality", "dev")
    assert {len(q.choices) for e in examples for q in e.questions} == {4}
    assert not any("&amp;" in e.context or "<p>" in e.context for e in examples)
    assert {q.correct for e in examples for q in e.questions} == {0, 1, 2, 3}


def test_archives_of_plain_text() -> None:
    docs = list(read_examples(Path(DATA) / "nats_docs" / "nats_docs.tar.gz"))
    assert len({e.id for e in docs}) == len(docs) == 198
    essays = list(read_examples(Path(DATA) / "needle" / "paul_graham_essays.tar.gz"))
    assert len(essays) == 49
    assert {e.questions for e in docs + essays} == {()}
