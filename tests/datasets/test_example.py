from __future__ import annotations

from typing import Any

import pytest

from kv_memory.datasets import Example, Question, corpus_split, sample, split_by_hash
from kv_memory.errors import ConfigError


def example(id: str, context: str = "C") -> Example:
    return Example(id=id, context=context, questions=(), source="s")


MANY = [example(f"s/{i}") for i in range(2000)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"text": " "},
        {"text": 3},
        {"answers": ()},
        {"answers": ["a"]},
        {"answers": ("a", "")},
        {"choices": ("a", "b")},
        {"correct": 0},
        {"choices": ("a", "b"), "correct": 2},
        {"choices": ("a", "b"), "correct": -1},
        {"choices": ("a", "b"), "correct": True},
        {"choices": ("a",), "correct": 0},
        {"choices": ("a", ""), "correct": 0},
    ],
)
def test_invalid_question_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"text": "Q?", "answers": ("A",)}
    assert Question(**right).choices == ()
    with pytest.raises(ConfigError):
        Question(**right | wrong)


@pytest.mark.parametrize(
    "wrong", [{"id": ""}, {"source": " "}, {"context": "\n"}, {"context": "a\0"}, {"context": None}]
)
def test_invalid_example_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"id": "s/1", "context": "C", "questions": (), "source": "s"}
    assert Example(**right).title == ""
    with pytest.raises(ConfigError):
        Example(**right | wrong)


def test_split_by_hash_is_the_same_on_every_machine() -> None:
    # The hashes begin with 3f04, 55b8, d070…: 0.25, 0.34, 0.81 of the way.
    places = [split_by_hash(f"squad/{i}", 0.5) for i in range(8)]
    assert places == [True, True, False, False, False, True, True, True]


def test_split_by_hash_holds_out_its_share_and_larger_shares_contain_it() -> None:
    small = {e.id for e in MANY if split_by_hash(e.id, 0.1)}
    large = {e.id for e in MANY if split_by_hash(e.id, 0.3)}
    assert 150 < len(small) < 250
    assert small < large
    assert not any(split_by_hash(e.id, 0) for e in MANY)
    assert all(split_by_hash(e.id, 1) for e in MANY)


def test_corpus_split_keeps_order_and_sides() -> None:
    training, held_out = corpus_split(iter(MANY), 0.2)
    assert [e for e in MANY if e not in held_out] == training
    assert 320 < len(held_out) < 480
    fewer = corpus_split(MANY[::-1][:1000], 0.2)[1]
    assert set(e.id for e in fewer) <= set(e.id for e in held_out)
    twice = [example("s/1", "C"), example("s/2"), example("s/1", "C")]
    assert any(len(side) == 2 and side[0].id == side[1].id == "s/1" for side in corpus_split(twice, 0.5))


def test_corpus_split_leaves_no_side_empty() -> None:
    for start in range(0, 60, 3):
        for share in (0.01, 0.5, 0.99):
            training, held_out = corpus_split(MANY[start : start + 3], share)
            assert training
            assert held_out
            assert len(training) + len(held_out) == 3
    assert sum(map(len, corpus_split(MANY[:1]))) == 1
    assert corpus_split([]) == ([], [])


def test_sample_depends_on_the_seed_and_not_on_the_order() -> None:
    drawn = sample(MANY, 20, 7)
    assert len({e.id for e in drawn}) == 20
    assert sample(iter(MANY[::-1]), 20, 7) == drawn
    assert sample(MANY, 5, 7) == drawn[:5]
    assert sample(MANY, 20, 8) != drawn
    assert {e.id for e in sample(MANY[:3], 10)} == {e.id for e in MANY[:3]}
    assert sample(MANY, 0) == []


def test_sample_accepts_examples_with_the_same_id() -> None:
    same = [example("s/1", "A"), example("s/1", "B"), example("s/2")]
    assert len(sample(same, 3)) == 3


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_invalid_share_or_number_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError):
        split_by_hash("s/1", share)
    with pytest.raises(ConfigError):
        corpus_split(MANY, share)
    with pytest.raises(ConfigError):
        corpus_split(MANY, 0)
    with pytest.raises(ConfigError):
        sample(MANY, -1)
