from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from kv_memory.compress import Compressor, SinkRecent
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate import TaskSettings, evaluate
from kv_memory.evaluate.cases import Case, encode_query
from kv_memory.evaluate.metrics import contains_all, exact_match_all
from kv_memory.evaluate.scoring import greedy_answers
from kv_memory.evaluate.tasks import find_task
from kv_memory.evaluate.tasks.task import RulerKind
from tests.conftest import make_backbone
from tests.evaluate.conftest import write

KINDS: tuple[RulerKind, ...] = get_args(RulerKind)


@pytest.fixture(scope="module")
def essays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of 900 different words."""
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"]
    words = [a + b + c for a in syllables for b in syllables for c in syllables if a != c]
    text = " ".join(f"The {words[i]} met {words[i + 1]} and {words[i + 2]}." for i in range(0, len(words), 3))
    path = tmp_path_factory.mktemp("essays") / "essay.txt"
    write(path, text)
    return path


def cases(backbone: Any, essays: Path, *kinds: RulerKind, **settings: Any) -> list[Case]:
    chosen = {"haystack": essays, "n_documents": 2, "lengths": (1100,), "kinds": kinds or None, **settings}
    return find_task("ruler").cases(backbone, TaskSettings(**chosen))


def test_every_kind_at_every_length(roomy: Any, essays: Path) -> None:
    found = cases(roomy, essays, lengths=(1100, 1600))
    assert [tuple(case.group.values()) for case in found] == [(n, kind) for n in (1100, 1600) for kind in KINDS] * 2
    assert len({case.id for case in found}) == len({case.text for case in found}) == len(found)
    for case in found:
        length = int(case.group["length"])
        assert 0.85 * length <= len(roomy.encode_text(case.text)) <= length, case.group
        assert contains_all(" ".join(case.queries[0].references), case.queries[0].references) == 1
        assert all(reference in case.text for reference in case.queries[0].references)


def test_the_same_seed_makes_the_same_documents(roomy: Any, essays: Path) -> None:
    found = cases(roomy, essays)
    assert cases(roomy, essays) == found
    assert cases(roomy, essays, "single", n_documents=1) == found[:1]  # whatever else is made
    assert {case.text for case in cases(roomy, essays, seed=1)}.isdisjoint(case.text for case in found)


def test_needle_tasks_have_the_right_keys_values_and_answers(roomy: Any, essays: Path) -> None:
    numbers = {"single": (1, 1, 1), "multi_key": (4, 4, 1), "multi_value": (1, 4, 4), "multi_query": (4, 4, 4)}
    for case in cases(roomy, essays, "single", "multi_key", "multi_value", "multi_query", n_documents=5):
        (query,) = case.queries
        needles = re.findall(r"One of the special magic numbers for (\w+-\w+) is: (\d{7})\.", case.text)
        n_keys, n_values, n_wanted = numbers[str(case.group["kind"])]
        assert (len({key for key, _ in needles}), len({n for _, n in needles})) == (n_keys, n_values)
        wanted = [number for key, number in needles if f" {key}" in query.text]
        assert sorted(wanted) == sorted(query.references)
        assert len(wanted) == n_wanted
        assert all(f" {key}" in query.given for key, number in needles if number in wanted)


def test_needles_are_placed_at_all_depths(roomy: Any, essays: Path) -> None:
    found = cases(roomy, essays, "single", n_documents=30)
    depths = [case.text.index(case.queries[0].references[0]) / len(case.text) for case in found]
    assert min(depths) < 0.35
    assert max(depths) > 0.75


def test_variable_chains_lead_to_the_references(roomy: Any, essays: Path) -> None:
    for case in cases(roomy, essays, "variable_tracking", n_documents=5):
        (query,) = case.queries
        values: dict[str, str] = {}
        for name, value in re.findall(r"^VAR (\w{5}) = (?:VAR )?(\w{5})$", case.text, re.MULTILINE):
            values[name] = values.get(value, value)  # each stands behind what it is made of
        (value,) = set(values.values())
        assert value in query.text
        assert tuple(values) == query.references
        assert len(values) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1100, 6, 1), (4096, 30, 3)])
def test_common_words_are_more_frequent_than_the_others(essays: Path, length: int, often: int, seldom: int) -> None:
    backbone = make_backbone("llama", max_position_embeddings=8192)
    (case,) = cases(backbone, essays, "common_words", n_documents=1, lengths=(length,))
    words = re.findall(r"\d+\. (\w+)", case.text)
    counts = Counter(words)
    assert {word for word, n in counts.items() if n == often} == set(case.queries[0].references)
    assert {n for word, n in counts.items() if word not in case.queries[0].references} == {seldom}
    assert len(case.queries[0].references) == 10
    assert [int(n) for n in re.findall(r"(\d+)\. ", case.text)] == list(range(1, len(words) + 1))


def test_reference_words_are_the_most_frequent_after_the_dots(roomy: Any, essays: Path) -> None:
    for case in cases(roomy, essays, "frequent_words", n_documents=3, lengths=(900, 2000)):
        counts = Counter(case.text.partition("\n")[2].split()).most_common()
        assert counts[0][0] == "...."
        assert tuple(word for word, _ in counts[1:4]) == case.queries[0].references
        ranks = [n for _, n in counts[:5]]
        assert ranks == sorted(set(ranks), reverse=True)  # no two are level


def test_lengths_and_haystacks_that_do_not_fit_are_errors(roomy: Any, essays: Path, tmp_path: Path) -> None:
    for kind in ("common_words", "frequent_words", "variable_tracking"):
        with pytest.raises(ConfigError, match=f"150 tokens are too few for {kind}"):
            cases(roomy, essays, kind, lengths=(150,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leaves no room"):
        cases(roomy, essays, lengths=(4000,))
    short = tmp_path / "short.txt"
    write(short, "The ferry met lamps and piers. " * 100)
    with pytest.raises(DatasetError, match="3 different words of 5 to 9 letters"):
        cases(roomy, short, "multi_key")
    write(short, "The " + " ".join(f"ferry{chr(97 + i)}" for i in range(26)) + " met. " * 500)
    with pytest.raises(DatasetError, match="26 different words"):
        cases(roomy, short, "common_words")
    with pytest.raises(ConfigError, match="unknown kind 'singel'"):
        TaskSettings(kinds=("singel",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "references", "em", "share"),
    [
        ("12345.", ["12345"], 1.0, 1.0),
        ("2, 1, and 3.", ["1", "2", "3"], 1.0, 1.0),
        ("AB,CD", ["cd", "ab"], 1.0, 1.0),
        ("1. pier\n2. lamp", ["lamp", "pier"], 1.0, 1.0),
        ("pier, lamp", ["lamp", "pier", "whale"], 0.0, 2 / 3),
        ("the number is 12345", ["12345"], 0.0, 1.0),
        ("pier, pier, lamp", ["lamp", "pier"], 0.0, 1.0),
        ("", ["lamp"], 0.0, 0.0),
    ],
)
def test_scores_count_all_references(answer: str, references: list[str], em: float, share: float) -> None:
    assert exact_match_all(answer, references) == em
    assert contains_all(answer, references) == pytest.approx(share)


def test_the_answer_continues_the_given_words(roomy: Any, essays: Path) -> None:
    """Against the plain model, token by token; and the reference is the list of all."""
    (case,) = cases(roomy, essays, "multi_value", n_documents=1)
    encoded = encode_query(roomy, case.queries[0])
    given = roomy.encode_text(f" {case.queries[0].given}")
    assert list(encoded.prompt) == [*roomy.encode_question(case.queries[0].text), *given]
    assert list(encoded.reference) == roomy.encode_text(f" {', '.join(case.queries[0].references)}")
    ids = [*roomy.prefix_ids, *roomy.encode_document(case.text), *encoded.prompt]
    n_before = len(ids)
    for _ in range(5):
        ids.append(int(roomy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    full = Compressor(roomy, selector=SinkRecent()).compress(case.text, keep_ratio=1.0)
    ((_, said),) = greedy_answers(roomy, full, [encoded.prompt], layout="source", max_new_tokens=5)
    assert list(said) == ids[n_before : n_before + len(said)]


def test_rows_are_grouped_by_length_and_kind(roomy: Any, essays: Path, tmp_path: Path) -> None:
    settings = TaskSettings(haystack=essays, n_documents=1, lengths=(900,), kinds=("single", "multi_value"))

    def run(**options: Any) -> Any:
        return evaluate("ruler", backbone=roomy, methods=["full", "none"], settings=settings, out=tmp_path, **options)

    rows = run().rows
    assert [(row.group["length"], row.group["kind"], row.method) for row in rows] == [
        (900, kind, method) for kind in ("multi_value", "single") for method in ("full", "none")
    ]
    assert [(row.n, row.n_documents) for row in rows] == [(1, 1)] * 4
    measured = {name for name, value in rows[0].means.items() if value is not None}
    assert measured == {"kl", "nll", "em", "contains"}
    averaged = run(by=["length"]).rows
    assert [(row.group, row.n) for row in averaged] == [({"length": 900}, 2)] * 2
    assert (tmp_path / "examples.jsonl").read_bytes().count(b"\n") == 4
