from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from kv_memory.datasets import read_examples, split_by_hash
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.cases import Query, encode_query
from kv_memory.evaluate.tasks import find_task
from kv_memory.evaluate.tasks.needle import with_needle
from kv_memory.evaluate.tasks.spans import draw_spans
from kv_memory.evaluate.tasks.task import TaskSettings, cut
from tests.conftest import make_backbone
from tests.evaluate.conftest import prose


def cases(task: str, backbone: Any, data: Path, **settings: Any) -> Any:
    return find_task(task).cases(backbone, TaskSettings(data=data, **settings))


def test_paragraphs_are_chosen_by_the_hash_of_their_ids(roomy: Any, data: Path) -> None:
    ids = [example.id for example in read_examples("squad", split="dev", data=data)]
    order = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    assert [case.id for case in cases("squad", roomy, data)] == order
    assert [case.id for case in cases("squad", roomy, data, n_documents=2, seed=5)] == order[:2]


def test_a_document_keeps_its_first_five_questions(roomy: Any, data: Path) -> None:
    found = {len(case.queries): case for case in cases("squad", roomy, data)}
    assert set(found) == {1, 2, 5}
    assert [query.text for query in found[5].queries] == [f"What came {i} times?" for i in range(5)]


def test_paragraphs_outside_the_length_limits_are_left_out(roomy: Any, data: Path) -> None:
    lengths = sorted(len(case.text) for case in cases("squad", roomy, data))
    kept = cases("squad", roomy, data, min_tokens=lengths[1], max_tokens=lengths[2])
    assert sorted(len(case.text) for case in kept) == lengths[1:3]
    with pytest.raises(DatasetError, match="no document of 2,000 to 2,500 tokens"):
        cases("squad", roomy, data, min_tokens=2000, max_tokens=2500)


def test_long_stories_are_cut(roomy: Any, data: Path) -> None:
    for case in cases("quality", roomy, data, max_tokens=100):
        assert 90 <= len(roomy.encode_text(case.text)) <= 100
        assert case.queries[0].choices[case.queries[0].correct] == case.queries[0].references[0]
    assert cases("squality", roomy, data)[0].queries[0].references == ("A pier.",)


def test_a_text_is_cut_between_tokens(roomy: Any) -> None:
    assert cut(roomy, "abc def", 4) == "abc"
    assert cut(roomy, "abc", 3) == "abc"


def test_a_window_too_small_for_a_document_is_an_error(data: Path) -> None:
    with pytest.raises(ConfigError, match="leave no room"):
        cases("squad", make_backbone(), data)
    with pytest.raises(ConfigError, match="a haystack of 512 tokens leaves no room"):
        cases("needle", make_backbone(), data, lengths=(512,))


def test_needles_are_at_their_length_and_depth(roomy: Any, data: Path) -> None:
    found = cases("needle", roomy, data, lengths=(300, 600), depths=(0.0, 0.5, 1.0), n_needles=2)
    assert len({case.id for case in found}) == len(found) == 12
    for case in found:
        length, depth = case.cell
        assert length - 80 <= len(roomy.encode_text(case.text)) <= length
        (number,) = case.queries[0].references
        assert case.text.count(number) == 1
        assert abs(case.text.index(number) / len(case.text) - depth) < 0.3
    other = cases("needle", roomy, data, lengths=(300,), depths=(0.5,), n_needles=2, seed=1)
    assert {case.text for case in other}.isdisjoint(case.text for case in found)


def test_a_needle_is_inserted_between_sentences() -> None:
    hay = "One is here. Two is there. Three is gone."
    assert with_needle(hay, "X.", depth=0.0) == f"X. {hay}"
    assert with_needle(hay, "X.", depth=0.4) == "One is here. X. Two is there. Three is gone."
    assert with_needle(hay, "X.", depth=1.0) == f"{hay} X."


def test_a_haystack_too_short_or_missing_is_an_error(roomy: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = data / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    with pytest.raises(DatasetError, match="shorter than 256 tokens"):
        find_task("needle").cases(roomy, TaskSettings(haystack=short, lengths=(256,)))
    monkeypatch.delenv("KV_MEMORY_DATA", raising=False)
    with pytest.raises(DatasetError, match="no haystack is given"):
        find_task("needle").cases(roomy, TaskSettings(lengths=(256,)))


def test_spans_are_copied_from_the_document(roomy: Any) -> None:
    text = prose(2, 30)
    spans = draw_spans(roomy, text, seed="a")
    assert len(spans) == 4
    for quarter, span in enumerate(spans):
        begin, end = span.span or (0, 0)
        assert text[begin:end] == span.given + span.references[0]
        assert len(span.given.split()) == 8
        assert len(roomy.encode_text(span.references[0])) == 32
        assert quarter / 4 <= begin / len(text) + 0.05 <= (quarter + 1) / 4 + 0.1
    assert draw_spans(roomy, text, seed="a") == spans
    assert draw_spans(roomy, text, seed="b") != spans
    assert draw_spans(roomy, "Five words are too few.", seed="a") == ()


def test_given_words_and_reference_are_tokenised_as_in_the_document(roomy: Any) -> None:
    query = Query(text="Go on.", given="the ferry", references=(" leaves\n now",))
    encoded = encode_query(roomy, query)
    assert list(encoded.prompt) == [*roomy.encode_question("Go on."), *roomy.encode_text(" the ferry")]
    assert list(encoded.reference) == roomy.encode_text(" leaves\n now")


def test_an_answer_is_encoded_with_a_leading_space(roomy: Any) -> None:
    query = Query(text="Which?", references=(" pier 4 ",), choices=("pier 4", "none"), correct=0)
    encoded = encode_query(roomy, query)
    assert list(encoded.reference) == list(encoded.choices[0]) == roomy.encode_text(" pier 4")


def test_spans_of_a_corpus(roomy: Any, data: Path) -> None:
    (case,) = cases("spans", roomy, data, corpus=(str(data / "needle"),), max_tokens=3000) or [None]
    assert len(case.queries) == 4
    with pytest.raises(ConfigError, match="spans needs a corpus"):
        cases("spans", roomy, data)
    ids = {example.id for example in read_examples("squad", split="dev", data=data)}
    kept = cases("spans", roomy, data, corpus=("squad",), min_tokens=1, held_out=0.5)
    long_enough = {case.id for case in cases("spans", roomy, data, corpus=("squad",), min_tokens=1)}
    assert {case.id for case in kept} == {i for i in ids if split_by_hash(i, 0.5)} & long_enough


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"n_documents": 0}, "n_documents"),
        ({"min_tokens": 9, "max_tokens": 8}, "max_tokens"),
        ({"held_out": 1.0}, "held_out"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": (8,)}, "lengths"),
        ({"depths": (1.5,)}, "depths"),
        ({"n_needles": 0}, "n_needles"),
        ({"k": ()}, "k"),
        ({"k": (3, 0)}, "k"),
        ({"n_places": 0}, "n_places"),
        ({"kinds": ()}, "kinds"),
        ({"distractors": "none"}, "distractors"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TaskSettings(**settings)
    assert caught.value.where == name
