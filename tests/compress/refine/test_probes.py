"""Probes come from the document alone, in several kinds, and those held out are held out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kv_memory.compress.refine.batching import Row
from kv_memory.compress.refine.probes import KINDS, Probe, ProbeSettings, _Maker, make_probes
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import PromptForm
from tests.conftest import SHORT_FORM, make_model, make_tokenizer
from tests.reference import letters, shared_backbone

TEXTS = [letters(300, seed=1), letters(120, seed=2)]


SETTINGS = ProbeSettings(n_probes=12, n_held_out=1, probe_tokens=32, temperature=0.7, seed=0)


def make(backbone: Any, texts: list[str], *, unasked: Any = None, **changes: Any) -> list[list[Probe]]:
    ids = [backbone.encode(text) for text in texts]
    teacher = Teacher(backbone, ids, room=SETTINGS.room, max_entries=10_000)
    return make_probes(backbone, teacher, ids, SETTINGS._replace(**changes), unasked=unasked)


def counted(probes: list[Probe], *, held_out: bool) -> dict[str, int]:
    return dict(Counter(probe.kind for probe in probes if probe.held_out == held_out))


@pytest.fixture(scope="module")
def probes() -> list[list[Probe]]:
    return make(shared_backbone("llama"), TEXTS, n_held_out=2)


def test_every_kind_has_training_and_held_out_probes(probes: list[list[Probe]]) -> None:
    for own in probes:
        held_out = counted(own, held_out=True)  # of what is sampled more, as one of it says less
        assert held_out == {"question": 6, "statement": 6, "continuation": 2, "repetition": 2}
        practised = counted(own, held_out=False)
        assert practised["question"] == 6 and practised["statement"] == 2


def test_rows_have_the_form_of_their_probe_kind(probes: list[list[Probe]]) -> None:
    backbone = shared_backbone("llama")
    decode = backbone.tokenizer.decode
    for index, own in enumerate(probes):
        for probe in own:
            row = probe.row
            assert row.document == index and 1 <= row.n_given < len(row.ids) <= SETTINGS.room
            given, wanted = decode(row.ids[: row.n_given]), decode(row.ids[row.n_given :])
            if probe.kind == "question":
                assert given.startswith("Q: ") and given.endswith("\nA:")
            elif probe.kind == "statement":
                assert given.endswith("\nA: The text says that")
            else:  # a span of the document, found by its first words
                assert given[-8:] + wanted in TEXTS[index]
                assert given[:-8].endswith("Doc: " if probe.kind == "continuation" else "\nA:")


def test_training_spans_cover_the_document_and_held_out_ones_differ(probes: list[list[Probe]]) -> None:
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


def test_a_long_document_has_at_most_n_probes_training_spans() -> None:
    (own,) = make(shared_backbone("llama"), TEXTS[:1], n_probes=6)
    assert counted(own, held_out=False) == {"question": 3, "statement": 1, "continuation": 6, "repetition": 6}


def test_no_question_is_asked_twice(probes: list[list[Probe]]) -> None:
    for own in probes:
        asked = [probe.row.ids[: probe.row.n_given] for probe in own if probe.kind == "question"]
        assert len(set(asked)) == len(asked)


def test_probes_depend_only_on_seed_and_document(probes: list[list[Probe]]) -> None:
    backbone = shared_backbone("llama")
    assert make(backbone, TEXTS, n_held_out=2) == probes
    other = make(backbone, TEXTS, n_held_out=2, seed=1)
    alone = make(backbone, TEXTS[:1], n_held_out=2)[0]
    assert alone == probes[0]
    assert {probe.row.ids for probe in other[0]} != {probe.row.ids for probe in alone}


def test_a_very_short_document_has_probes_of_every_kind() -> None:
    (own,) = make(shared_backbone("llama"), ["ab c"])
    assert all(counted(own, held_out=held_out).keys() == set(KINDS) for held_out in (True, False))


def test_held_out_spans_leave_a_short_document_fully_covered() -> None:
    text, backbone = TEXTS[1][:50], shared_backbone("llama")
    (own,) = make(backbone, [text], n_held_out=4)
    covered: set[int] = set()
    for probe in own:
        if probe.kind == "continuation" and not probe.held_out:
            span = backbone.tokenizer.decode(probe.row.ids[probe.row.n_given - 8 :])
            covered |= set(range(text.index(span), text.index(span) + len(span)))
    assert covered == set(range(len(text)))


def test_few_questions_mostly_become_training_probes() -> None:
    maker = _Maker(shared_backbone("llama"), 0, range(40), SETTINGS._replace(n_held_out=2))
    maker._questions = [f"What is {number}?" for number in range(9)]
    for number in range(9):
        maker.add_sampled("question", [1, 2, number], 2)
    assert counted(maker.probes, held_out=True) == {"question": 3}


def test_probes_follow_the_chat_form() -> None:
    form = {**SHORT_FORM, "question_before": "", "question_after": "</s>model:"}
    backbone = Backbone(make_model("llama"), make_tokenizer(), prompt=PromptForm(**form))
    (own,) = make(backbone, TEXTS[:1])
    assert counted(own, held_out=True) == {"question": 3, "statement": 3, "continuation": 1, "repetition": 1}
    questions = [probe.row for probe in own if probe.kind == "question"]
    for row in questions:
        assert backbone.tokenizer.decode(row.ids[: row.n_given]).endswith("</s>model:")
    begun = [backbone.tokenizer.decode(row.ids).startswith(("What", "Who", "When", "Where")) for row in questions]
    assert sum(begun) >= len(begun) // 3


def test_questions_from_the_worked_examples_are_skipped() -> None:
    backbone = shared_backbone("llama")
    maker = _Maker(backbone, 0, backbone.encode(TEXTS[0]), SETTINGS)
    opening = Row(0, tuple(backbone.encode("Q:")), 2)
    maker.take_question(opening, backbone.encode(" Read this."))
    maker.take_question(opening, backbone.encode(" What is it?"))
    maker.take_question(opening, backbone.encode(" What is it?"))
    assert [backbone.tokenizer.decode(row.ids) for row in maker.question_rows()] == ["Q: What is it?\nA:"]


def test_unasked_spans_are_not_quoted_and_the_rest_is_covered() -> None:
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


def test_answers_that_quote_unasked_spans_are_skipped() -> None:
    backbone = shared_backbone("llama")
    ids = backbone.encode(TEXTS[0])
    maker = _Maker(backbone, 0, ids, SETTINGS, [(40, 80)])
    maker.add_sampled("question", [*backbone.encode("Q: x\nA:"), *ids[50:56]], 7)
    maker.add_sampled("question", [*backbone.encode("Q: x\nA:"), *ids[50:55]], 7)
    assert [probe.row.ids[7:] for probe in maker.probes] == [tuple(ids[50:55])]
