from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor
from kv_memory.datasets import read_examples
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate import Evaluation, TaskSettings, aggregate, evaluate, load_rows, markdown, write_report
from kv_memory.evaluate.cases import Case, Query, encode_query
from kv_memory.evaluate.measure import Bench
from kv_memory.evaluate.question_records import Record
from kv_memory.evaluate.tasks import find_task
from tests.conftest import make_backbone
from tests.evaluate.conftest import prose, write

METHODS = ["full", "none", "sink_recent"]


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with two articles of four passages each."""
    folder = tmp_path_factory.mktemp("articles")
    data = []
    for title in ("ferries", "kettles"):
        seeds = range(10, 14) if title == "ferries" else range(20, 24)
        paragraphs = [
            {
                "context": f"This is about {title}. {prose(seed, 2)}",
                "qas": [{"id": f"{seed}", "question": "What number came first?", "answers": [{"text": f"{seed}0"}]}],
            }
            for seed in seeds
        ]
        data.append({"title": title, "paragraphs": paragraphs})
    write(folder / "squad" / "dev.json", json.dumps({"data": data}))
    return folder


def cases(backbone: Any, data: Path, **settings: Any) -> list[Case]:
    return find_task("multidoc").cases(backbone, TaskSettings(data=data, **{"k": (1, 3), **settings}))


def run(backbone: Any, data: Path, **options: Any) -> Evaluation:
    settings = {"data": data, "n_documents": 2, "k": (1, 2), **options.pop("settings", {})}
    options = {"methods": METHODS, "keep_ratios": [0.25], "generate": False, **options}
    return evaluate("multidoc", backbone=backbone, settings=TaskSettings(**settings), **options)


def by_name(result: Any) -> dict[tuple[int, str], Any]:
    return {(row.group["k"], row.method): row for row in result.rows}


def test_the_passage_is_placed_everywhere_among_distractors_from_other_articles(roomy: Any, articles: Path) -> None:
    examples = {example.id: example for example in read_examples("squad", split="dev", data=articles)}
    titles = {example.context: example.title for example in examples.values()}
    found = cases(roomy, articles, n_documents=3)
    assert [(case.group["k"], case.group["place"]) for case in found] == [(3, 1), (3, 2), (3, 3), (1, 1)] * 3
    first = [example.id for example in find_task("squad").cases(roomy, TaskSettings(data=articles, n_documents=3))]
    assert list(dict.fromkeys(case.id for case in found)) == first
    for case in found:
        own = examples[case.id]
        assert case.text == own.context == case.passages[int(case.group["place"]) - 1]
        assert len(set(case.passages)) == len(case.passages) == case.group["k"]
        assert [titles[text] == own.title for text in case.passages].count(True) == 1
    others = [[text for text in case.passages if text != case.text] for case in found[:3]]
    assert others[0] == others[1] == others[2]


def test_distractors_of_a_smaller_k_are_a_prefix_of_a_larger_one(roomy: Any, articles: Path) -> None:
    found = cases(roomy, articles, n_documents=1, k=(1, 2, 4), n_places=1)
    assert [case.passages for case in found] == [found[0].passages[:k] for k in (4, 2, 1)]
    assert cases(roomy, articles, n_documents=1, k=(4,), n_places=1, seed=0) == found[:1]
    seeds = {cases(roomy, articles, n_documents=1, k=(4,), n_places=1, seed=seed)[0].passages for seed in range(5)}
    assert len(seeds) > 1


def test_distractors_can_come_from_the_same_article(roomy: Any, articles: Path) -> None:
    for case in cases(roomy, articles, distractors="same"):
        assert len({text.split(".")[0] for text in case.passages}) == 1
    with pytest.raises(DatasetError, match="no passage has 4 distractors from its own article without its answers"):
        cases(roomy, articles, distractors="same", k=(5,))
    with pytest.raises(DatasetError, match="no passage has 5 distractors from other articles without its answers"):
        cases(roomy, articles, k=(6,))


def test_no_distractor_contains_an_answer(roomy: Any, tmp_path: Path) -> None:
    texts = ["The lamp is red.", "The pier is old.", "The red pier fell.", "A redder lamp."]
    answers = ["Red.", "old", "fell", "redder"]
    data = [
        {
            "title": text,
            "paragraphs": [{"context": text, "qas": [{"question": "What?", "answers": [{"text": answer}]}]}],
        }
        for text, answer in zip(texts, answers, strict=True)
    ]
    write(tmp_path / "squad" / "dev.json", json.dumps({"data": data}))
    found = {case.text: set(case.passages) for case in cases(roomy, tmp_path, k=(3,), n_places=1)}
    assert found[texts[0]] == {texts[0], texts[1], texts[3]}  # `red` is a word of the third, and no word of the fourth


@pytest.mark.parametrize(
    ("n_places", "places"), [(None, [1, 2, 3, 4]), (1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_places_are_evenly_spaced(roomy: Any, articles: Path, n_places: int | None, places: list[int]) -> None:
    found = cases(roomy, articles, n_documents=1, k=(4,), n_places=n_places)
    assert [case.group["place"] for case in found] == places


def test_a_window_too_small_for_all_passages_is_an_error(articles: Path) -> None:
    with pytest.raises(ConfigError, match="3 documents of 1 to"):
        cases(make_backbone("llama", max_position_embeddings=1200), articles, max_tokens=200)


def test_full_is_one_prefill_of_all_texts(roomy: Any, articles: Path) -> None:
    """The likelihood of the reference, against the plain model on all texts in a row."""
    result = run(roomy, articles, methods=["full"])
    by_case = {record.case: record for record in result.records if record.method == "full"}
    for case in cases(roomy, articles, n_documents=2, k=(1, 2)):
        (query,) = [encode_query(roomy, query) for query in case.queries]
        head = [*roomy.prefix_ids, *(t for text in case.passages for t in roomy.encode_document(text)), *query.prompt]
        ids = torch.tensor([[*head, *query.reference]])
        logits = roomy.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[len(head) - 1 : -1], ids[0, len(head) :]).item()
        record = by_case[case.id, tuple(case.group.items())]
        assert record.questions[0].nll == pytest.approx(expected, abs=1e-4)
        assert record.n_tokens == record.n_kept == len(head) - len(roomy.prefix_ids) - len(query.prompt)


def test_passages_are_compressed_separately_and_composed(roomy: Any, articles: Path) -> None:
    rows = by_name(run(roomy, articles, keep_ratios=[1.0]))
    assert list(rows) == [(k, name) for k in (1, 2) for name in ("full", "full+joined", "none", "sink_recent")]
    assert rows[1, "full"].means["kl"] == rows[2, "full"].means["kl"] == rows[2, "full+joined"].means["kl_joined"] == 0
    assert rows[1, "full+joined"].means["kl"] == pytest.approx(0, abs=1e-5)  # one passage has nothing to miss
    assert rows[2, "full+joined"].means["kl"] > 1e-3
    for name in ("kl", "kl_joined", "nll"):  # everything kept is the full cache
        assert rows[2, "sink_recent"].means[name] == pytest.approx(rows[2, "full+joined"].means[name], abs=1e-5)
    assert rows[2, "full"].means["kl_joined"] > 1e-3
    assert (rows[2, "none"].n, rows[2, "none"].n_documents) == (4, 2)  # two places
    assert rows[2, "none"].seconds_per_document is None


def test_a_rank_bias_applies_to_the_other_passages_alone(roomy: Any, articles: Path, tmp_path: Path) -> None:
    plain, biased = (by_name(run(roomy, articles, out=tmp_path, rank_bias=bias)) for bias in (0, -2))
    for key in plain:
        same = key[0] == 1 or key[1] in {"full", "none"}
        for name in ("kl", "nll"):
            assert (biased[key].means[name] == pytest.approx(plain[key].means[name], abs=1e-6)) == same, (key, name)
    assert biased[2, "full+joined"].means["kl_joined"] == 0


def test_metrics_of_generated_answers(roomy: Any, articles: Path) -> None:
    settings = {"n_documents": 1, "k": (2,), "n_places": 1}
    for row in run(roomy, articles, methods=["full"], generate=True, settings=settings).rows:
        measured = {name for name, value in row.means.items() if value is not None}
        assert measured == {"kl", "nll", "f1", "em", "contains", "kl_joined"}


def test_a_passage_is_compressed_once_for_all_its_places(
    roomy: Any, articles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def count(name: str) -> None:
        real = getattr(Compressor, name)

        def counting(self: Any, text: str, **options: Any) -> Any:
            seen.append((name, text))
            return real(self, text, **options)

        monkeypatch.setattr(Compressor, name, counting)

    count("prefill")
    count("compress")
    result = run(roomy, articles, methods=["sink_recent"], settings={"k": (1, 2, 3), "n_documents": 1})
    assert len(seen) == len(set(seen)) == 6  # three passages, to be kept at 1/4 and in full
    assert len(result.records) == 6
    assert all(record.compress_s for record in result.records)


def test_storage_applies_to_every_passage(roomy: Any, articles: Path) -> None:
    settings = {"n_documents": 1, "k": (2,), "n_places": 1}
    plain, stored = (
        by_name(run(roomy, articles, methods=["sink_recent"], storage=storage, settings=settings))
        for storage in ("auto", "int8")
    )
    assert list(stored)[-1] == (2, "sink_recent+int8")
    before, after = plain[2, "sink_recent"].means["kl"], stored[2, "sink_recent+int8"].means["kl"]
    assert before != after == pytest.approx(before, rel=0.1)


def test_a_run_resumes_where_the_time_limit_stopped_it(
    roomy: Any, articles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(roomy, articles, out=tmp_path, time_limit_s=1e-9)
    assert (first.complete, first.rows, first.n_documents, first.n_finished) == (False, (), 6, 0)
    whole = run(roomy, articles, out=tmp_path)
    assert (whole.complete, whole.n_documents, whole.n_finished) == (True, 6, 6)
    assert (tmp_path / "examples.jsonl").read_bytes().count(b"\n") == 6 * 4
    monkeypatch.setattr(Bench, "run", lambda *_, **__: pytest.fail("measured again"))
    assert run(roomy, articles, out=tmp_path).rows == whole.rows
    assert load_rows([tmp_path]).rows == whole.rows
    fewer = run(roomy, articles, out=tmp_path, settings={"k": (2,)})  # the same cases, whatever else is asked for
    assert fewer.rows == tuple(row for row in whole.rows if row.group["k"] == 2)


def test_rows_can_be_grouped_by_place(roomy: Any, articles: Path, tmp_path: Path) -> None:
    result = run(roomy, articles, out=tmp_path, by=["k", "place"])
    assert [row.group for row in result.rows[::4]] == [{"k": 1, "place": 1}, *({"k": 2, "place": p} for p in (1, 2))]
    averaged = by_name(load_rows([tmp_path]))
    at_places = [row.means["kl"] for row in result.rows if row.method == "none" and row.group["k"] == 2]
    assert averaged[2, "none"].means["kl"] == pytest.approx(sum(at_places) / 2)
    assert load_rows([tmp_path], by=["k", "place"]).rows == result.rows
    with pytest.raises(ConfigError, match="cannot be grouped by 'depth'"):
        run(roomy, articles, by=["depth"])
    with pytest.raises(ConfigError, match="no result has the group 'depth'"):
        load_rows([tmp_path], by=["depth"])


def test_a_report_has_a_column_for_k_and_a_plot_for_each(roomy: Any, articles: Path, tmp_path: Path) -> None:
    result = run(roomy, articles, out=tmp_path / "run")
    header = markdown(result.rows).splitlines()[4]
    assert header == "| k | method | kept | n | KL | NLL | KL to joined | s/document | prefills |"
    files = write_report(load_rows([tmp_path / "run"]), tmp_path / "figures")
    assert [file.name for file in files] == ["tables.md", "multidoc_k_1_fidelity.png", "multidoc_k_2_fidelity.png"]
    printed = tmp_path / "rows.jsonl"
    printed.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in result.rows))
    again = load_rows([printed]).rows
    assert [(row.group, row.method, row.means) for row in again] == [(r.group, r.method, r.means) for r in result.rows]


def test_the_bootstrap_treats_places_of_a_passage_as_one_observation() -> None:
    """Two passages at fifty places each: one of the two is drawn twice now and then."""
    records = [
        Record(
            key="",
            config="",
            task="multidoc",
            document=document,
            method="full",
            keep_ratio=None,
            group={"k": 50, "place": place},
            questions=(_measured(float(document == "a")),),
        )
        for document in "ab"
        for place in range(50)
    ]
    (row,) = aggregate(records)
    assert (row.n, row.n_documents, row.ci["score"]) == (100, 2, (0.0, 1.0))


def _measured(f1: float) -> Any:
    from kv_memory.evaluate.question_records import Measured

    return Measured(kl=0.0, nll=0.0, f1=f1, em=0.0, contains=0.0)


def test_digests_of_cases_without_passages_are_unchanged() -> None:
    """The digest of a case without passages is over the fields it always had."""
    query = {"text": "Q?", "references": ["a"], "given": "", "span": None, "choices": [], "correct": None}
    old = {"id": "x", "text": "T.", "queries": [query], "cell": None}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    plain = Case(id="x", text="T.", queries=(Query(text="Q?", references=("a",)),))
    assert plain.digest == digest
    others = (
        Case(id="x", text="T.", queries=plain.queries, passages=("T.",)),
        Case(id="x", text="T.", queries=plain.queries, group={"k": 1}),
        Case(id="x", text="T.", queries=(Query(text="Q?", references=("a",), all_wanted=True),)),
    )
    assert len({digest, *(case.digest for case in others)}) == 4
