"""Probes come from the document alone, in several kinds, and those held out are held out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kv_memory.compress.refine.batching import Row
from kv_memory.compress.refine.probes import KINDS, Probe, _Maker, make_probes, probe_room
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer
from tests.reference import letters, shared_backbone

TEXTS = [letters(300, seed=1), letters(120, seed=2)]


def make(backbone: Any, texts: list[str], *, n_probes: int = 12, seed: int = 0, **options: Any) -> list[list[Probe]]:
    ids = [backbone.encode(text) for text in texts]
    teacher = Teacher(backbone, ids, room=probe_room(32), max_entries=10_000)
    chosen = {"n_held_out": 1, "probe_tokens": 32, "temperature": 0.7, **options}
    return make_probes(backbone, teacher, ids, n_probes=n_probes, seed=seed, **chosen)


def counted(probes: list[Probe], *, held_out: bool) -> dict[str, int]:
    return dict(Counter(probe.kind for probe in probes if probe.held_out == held_out))


@pytest.fixture(scope="module")
def probes() -> list[list[Probe]]:
    return make(shared_backbone("llama"), TEXTS, n_held_out=2)


def test_every_kind_is_practised_and_held_out(probes: list[list[Probe]]) -> None:
    for own in probes:
        held_out = counted(own, held_out=True)  # of what is sampled more, as one of it says less
        assert held_out == {"question": 6, "statement": 6, "continuation": 2, "repetition": 2}
        practised = counted(own, held_out=False)
        assert practised["question"] == 6 and practised["statement"] == 2


def test_rows_say_what_is_wanted_of_them(probes: list[list[Probe]]) -> None:
    backbone = shared_backbone("llama")
    decode = backbone.tokenizer.decode
    for index, own in enumerate(probes):
        for probe in own:
            row = probe.row
            assert row.document == index and 1 <= row.n_given < len(row.ids) <= probe_room(32)
            given, wanted = decode(row.ids[: row.n_given]), decode(row.ids[row.n_given :])
            if probe.kind == "question":
                assert given.startswith("Q: ") and given.endswith("\nA:")
            elif probe.kind == "statement":
                assert given.endswith("\nA: The text says that")
            else:  # a span of the document, found by its first words
                assert given[-8:] + wanted in TEXTS[index]
                assert given[:-8].endswith("Doc: " if probe.kind == "continuation" else "\nA:")


def test_practised_spans_cover_the_document_and_held_out_ones_are_cut_elsewhere(probes: list[list[Probe]]) -> None:
    backbone = shared_backbone("llama")
    for text, own in zip(TEXTS, probes, strict=True):
        starts: dict[bool, set[int]] = {True: set(), False: set()}
        covered: dict[str, set[int]] = {"continuation": set(), "repetition": set()}
        for probe in own:
            if probe.kind in covered:
                span = backbone.tokenizer.decode(probe.row.ids[probe.row.n_given - 8 :])
                start = text.index(span)
                starts[probe.held_out].add(start)
                if not probe.held_out:
                    covered[probe.kind] |= set(range(start, start + len(span)))
        assert covered["continuation"] == set(range(len(text)))
        assert covered["repetition"] >= set(range(11, len(text)))  # its cuts begin a third of a span later
        assert starts[True] and not starts[True] & starts[False]


def test_of_a_long_document_no_more_than_n_probes_spans_are_practised() -> None:
    (own,) = make(shared_backbone("llama"), TEXTS[:1], n_probes=6)
    assert counted(own, held_out=False) == {"question": 3, "statement": 1, "continuation": 6, "repetition": 6}


def test_no_question_is_asked_twice(probes: list[list[Probe]]) -> None:
    for own in probes:
        asked = [probe.row.ids[: probe.row.n_given] for probe in own if probe.kind == "question"]
        assert len(set(asked)) == len(asked)


def test_they_depend_on_the_seed_and_the_document_alone(probes: list[list[Probe]]) -> None:
    backbone = shared_backbone("llama")
    assert make(backbone, TEXTS, n_held_out=2) == probes
    other = make(backbone, TEXTS, n_held_out=2, seed=1)
    alone = make(backbone, TEXTS[:1], n_held_out=2)[0]
    assert alone == probes[0]
    assert {probe.row.ids for probe in other[0]} != {probe.row.ids for probe in alone}


def test_a_document_of_a_few_tokens_has_probes_too() -> None:
    (own,) = make(shared_backbone("llama"), ["ab c"])
    assert all(counted(own, held_out=held_out).keys() == set(KINDS) for held_out in (True, False))


def test_of_a_short_document_every_part_is_practised_however_many_spans_are_to_be_held_out() -> None:
    text, backbone = TEXTS[1][:50], shared_backbone("llama")
    (own,) = make(backbone, [text], n_held_out=4)
    covered: set[int] = set()
    for probe in own:
        if probe.kind == "continuation" and not probe.held_out:
            span = backbone.tokenizer.decode(probe.row.ids[probe.row.n_given - 8 :])
            covered |= set(range(text.index(span), text.index(span) + len(span)))
    assert covered == set(range(len(text)))


def test_where_few_questions_come_most_are_practised() -> None:
    maker = _Maker(shared_backbone("llama"), 0, range(40), 12, 2, 32, 0)
    maker._questions = [f"What is {number}?" for number in range(9)]
    for number in range(9):
        maker.add_sampled("question", [1, 2, number], 2)
    assert counted(maker.probes, held_out=True) == {"question": 3}


def test_a_chat_form_is_asked_in_its_own_way() -> None:
    form = {**SHORT_FORM, "question_before": "", "question_after": "</s>model:"}
    backbone = Backbone(make_model("llama"), make_tokenizer(), prompt=PromptForm(**form))
    (own,) = make(backbone, TEXTS[:1])
    assert counted(own, held_out=True) == {"question": 3, "statement": 3, "continuation": 1, "repetition": 1}
    questions = [probe.row for probe in own if probe.kind == "question"]
    for row in questions:
        assert backbone.tokenizer.decode(row.ids[: row.n_given]).endswith("</s>model:")
    begun = [backbone.tokenizer.decode(row.ids).startswith(("What", "Who", "When", "Where")) for row in questions]
    assert sum(begun) >= len(begun) // 3


def test_a_question_of_the_worked_examples_is_left_out() -> None:
    backbone = shared_backbone("llama")
    maker = _Maker(backbone, 0, backbone.encode(TEXTS[0]), 12, 1, 32, 0)
    opening = Row(0, tuple(backbone.encode("Q:")), 2)
    maker.take_question(opening, backbone.encode(" Read this."))
    maker.take_question(opening, backbone.encode(" What is it?"))
    maker.take_question(opening, backbone.encode(" What is it?"))
    assert [backbone.tokenizer.decode(row.ids) for row in maker.question_rows()] == ["Q: What is it?\nA:"]


def test_what_must_not_be_asked_for_is_not_quoted_and_all_else_is_covered() -> None:
    backbone = shared_backbone("llama")
    (own,) = make(backbone, TEXTS[:1], unasked=[[(40, 80), (200, 230)]])
    secret = [TEXTS[0][40:80], TEXTS[0][200:230]]
    covered: set[int] = set()
    for probe in own:
        said = backbone.tokenizer.decode(probe.row.ids)
        assert not any(part[i : i + 6] in said for part in secret for i in range(len(part) - 5))
        if probe.kind == "continuation" and not probe.held_out:
            start = TEXTS[0].index(backbone.tokenizer.decode(probe.row.ids[probe.row.n_given - 8 :]))
            covered |= set(range(start, start + len(probe.row.ids) - probe.row.n_given + 8))
    assert covered == set(range(300)) - set(range(40, 80)) - set(range(200, 230))


def test_an_answer_that_quotes_what_must_not_be_asked_for_is_left_out() -> None:
    backbone = shared_backbone("llama")
    ids = backbone.encode(TEXTS[0])
    maker = _Maker(backbone, 0, ids, 12, 1, 32, 0, [(40, 80)])
    maker.add_sampled("question", [*backbone.encode("Q: x\nA:"), *ids[50:56]], 7)
    maker.add_sampled("question", [*backbone.encode("Q: x\nA:"), *ids[50:55]], 7)
    assert [probe.row.ids[7:] for probe in maker.probes] == [tuple(ids[50:55])]
