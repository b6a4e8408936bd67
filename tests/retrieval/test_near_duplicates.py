from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.retrieval.hashed_terms import terms_of
from kv_memory.retrieval.near_duplicates import Distinct
from kv_memory.store import StoredPassage
from tests.retrieval.test_bm25 import Shelf, ids, passage

FERRY = (
    "The ferry across the sound was ordered on 3 May 2019 and built in Turku. It carries 140 cars and 600 passengers, "
    "and makes the crossing in 35 minutes.\n\nIn winter it leaves every two hours from the old pier, because the new "
    "harbour freezes over. Tickets are sold on board, and dogs travel free of charge."
)
PIER = (
    "The old pier was built of oak in 1911, and rebuilt in concrete after a fire. Its crane is a monument today; a "
    "kiosk beside it lets bicycles and canoes between May and September, and a small exhibition tells of the whalers."
)
SENTENCES = re.split(r"(?<=\.)\s+", FERRY)


def repeats(earlier: str, later: str, *, question: str = "") -> bool:
    distinct = Distinct(terms_of(question))
    assert distinct.take(terms_of(earlier))
    return not distinct.take(terms_of(later))


COPIES: dict[str, Callable[[str], str]] = {
    "the same": str,
    "upper case": str.upper,
    "no punctuation": lambda text: re.sub(r"[.,]", "", text),
    "other line breaks": lambda text: "\n".join(text.split()),
    "another date": lambda text: text.replace("3 May 2019", "4 June 2020"),
    "a heading in front": lambda text: f"# Timetable\n\n{text}",
    "paragraphs swapped": lambda text: "\n\n".join(text.split("\n\n")[::-1]),
    "sentences shuffled": lambda text: " ".join(random.Random(0).sample(SENTENCES, len(SENTENCES))),
    "a word replaced": lambda text: text.replace("dogs", "bicycles"),
    "full-width digits": lambda text: text.replace("600", "\uff16\uff10\uff10"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_repeats_the_passage_and_the_passage_its_copy(name: str) -> None:
    copy = COPIES[name](FERRY)
    assert repeats(FERRY, copy)
    assert repeats(copy, FERRY)


def test_a_part_repeats_the_whole_and_the_whole_is_more_than_its_part() -> None:
    whole = f"{FERRY} {PIER}"
    assert repeats(whole, FERRY)
    assert not repeats(FERRY, whole)
    assert not repeats(FERRY, SENTENCES[-1])  # a short text may share all its words by chance


@pytest.mark.parametrize(
    "other",
    [
        "The ferry across the strait was ordered in 1987 and built in Gdansk. It carries 80 lorries; dogs pay half.",
        " ".join(
            [*SENTENCES[:2], "Between May and September a second ship helps, which takes bicycles and canoes only."]
        ),
        "",
    ],
)
def test_another_passage_on_the_subject_repeats_nothing(other: str) -> None:
    assert not repeats(FERRY, other)
    assert not repeats(other, FERRY)


def test_versions_are_both_taken_if_the_question_names_their_difference() -> None:
    newer = FERRY.replace("3 May 2019", "4 June 2020")
    assert repeats(FERRY, newer, question="When was the ferry ordered?")
    assert repeats(FERRY, newer, question="What was ordered in 2019?")
    assert not repeats(FERRY, newer, question="What was ordered in 2019, and what in 2020?")
    assert not repeats(FERRY, newer, question="Which ferry was ordered in June?")


def test_every_word_of_a_short_passage_counts() -> None:
    assert repeats("Room 12 is free.", "ROOM 12: is free")
    assert not repeats("Room 12 is free.", "Room 14 is free.")
    assert not repeats("word word word end", "word word end")


def test_two_empty_passages_are_not_compared() -> None:
    assert not repeats("", "")


@pytest.mark.parametrize("kept", [True, False])
def test_the_next_passage_takes_the_place_of_a_near_duplicate(tmp_path: Path, kept: bool) -> None:
    """Whether or not the store keeps texts."""
    texts = {
        "a": FERRY,
        "b": FERRY.upper(),
        "c": f"Draft.\n\n{FERRY}",
        "d": "A second ferry runs from the mainland to the islands in summer.",
        "e": "The harbour master sells tickets for the museum.",
    }
    found = [passage(name, text) for name, text in texts.items()]
    shelf = Shelf([one if kept else _without_text(one) for one in found])
    index = shelf.open(tmp_path)
    question = "When does the ferry leave the pier, and where are tickets sold?"
    assert ids(index.retrieve(question, top_k=2)) == ["a", "e"]
    assert ids(index.retrieve(question, top_k=9)) == ["a", "e", "d"]


def _without_text(one: StoredPassage) -> StoredPassage:
    assert one.text is not None
    return StoredPassage(**{**vars(one), "text": None, "terms": terms_of(one.text)})
