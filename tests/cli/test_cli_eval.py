"""`kv-memory eval` and `kv-memory report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.ran import Ran
from tests.evaluate.conftest import prose, write

Kv = Callable[..., Ran]
KEYS = [
    *("task", "method", "keep_ratio", "n", "kl", "nll", "f1", "em", "contains", "accuracy", "rouge_l"),
    *("kl_joined", "retention", "ci", "seconds_per_document", "prefills"),
]


@pytest.fixture
def squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with two paragraphs, where the commands look for it."""
    paragraphs = [
        {
            "context": prose(seed, 2),
            "qas": [{"id": f"{seed}", "question": "What came?", "answers": [{"text": f"{seed}0"}]}],
        }
        for seed in range(2)
    ]
    write(tmp_path / "data/squad/dev.json", json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    monkeypatch.setenv("KV_MEMORY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def options(tiny: Path) -> list[str]:
    chosen = ["--model", str(tiny), "--prompt", "passage", "--keep-ratio", "1/4"]
    return [*chosen, *(f"--method={name}" for name in ("full", "none", "sink_recent"))]


def test_json_prints_one_object_per_row(kv: Kv, squad: Path, options: list[str]) -> None:
    done = kv("eval", "squad", *options, "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [(row["method"], row["keep_ratio"], row["n"]) for row in rows] == [
        ("full", None, 2),
        ("none", None, 2),
        ("sink_recent", 0.25, 2),
    ]
    assert rows[0]["kl"] == 0 < rows[1]["kl"]


def test_a_stopped_evaluation_resumes_and_is_reported(kv: Kv, squad: Path, options: list[str], tmp_path: Path) -> None:
    stopped = kv("eval", "squad", *options, "--out", "run", "--time-limit", "0.000001")
    assert stopped.code == 0
    assert "Stopped by the time limit, 0 of 2 documents finished; run the same command to resume." in stopped.err
    done = kv("eval", "squad", *options, "--out", "run")
    assert done.out.splitlines()[0].split()[:4] == ["method", "kept", "KL", "NLL"]
    assert done.out.splitlines()[3].split()[:2] == ["sink_recent", "1/4"]
    reported = kv("report", "run", "--to", "figures")
    assert reported.out == done.out
    assert (tmp_path / "figures/tables.md").is_file()
    assert "Wrote figures/squad_fidelity.png" in reported.err
    only = kv("report", "run", "--method", "sink_recent", "--keep-ratio", "1/4")
    assert len(done.out.splitlines()) == 4
    assert [line.split()[:2] for line in only.out.splitlines()[1:]] == [["sink_recent", "1/4"]]
    assert kv("report", "run", "--method", "sink", "--json").json["error"]["what"] == "no result has the method 'sink'"


def test_multidoc_and_ruler_tasks(kv: Kv, squad: Path, options: list[str], tmp_path: Path) -> None:
    multidoc = ["eval", "multidoc", *options, "--distractors", "same", "--k", "2", "--no-generate", "--out", "run"]
    rows = [json.loads(line) for line in kv(*multidoc, "--json").out.splitlines()]
    assert [list(row) for row in rows] == [["task", "k", *KEYS[1:]]] * 4
    assert [(row["k"], row["method"], row["n"]) for row in rows] == [
        (2, name, 4) for name in ("full", "full+joined", "none", "sink_recent")
    ]
    at_places = kv(*multidoc, "--by", "k", "--by", "place").out.splitlines()
    assert at_places[0].split()[:4] == ["k", "place", "method", "kept"]
    assert [line.split()[:3] for line in at_places[1:]] == [
        ["2", place, row["method"]] for place in "12" for row in rows
    ]
    assert kv("report", "run", "--by", "k", "--by", "place").out.splitlines() == at_places
    write(tmp_path / "essay.txt", "The ferry met the whale and then the walrus. " * 40)
    chosen = ["--haystack", "essay.txt", "--length", "600", "--kind", "single", "--n-documents", "2", "--no-generate"]
    made = kv("eval", "ruler", *options, *chosen, "--json")
    assert [(row["length"], row["kind"], row["n"]) for row in map(json.loads, made.out.splitlines())] == [
        (600, "single", 2)
    ] * 3


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["sqaud"], 2, "unknown task 'sqaud'"),
        (["squad", "--method", "fool"], 2, "unknown method 'fool'"),
        (["squad", "--method", "adapter"], 2, "method 'adapter' needs an adapter"),
        (["squad", "--keep-ratio", "1/0"], 2, "keep_ratio must be a number or a fraction"),
        (["squad", "--keep-ratio", "3"], 2, "keep_ratio must lie in (0, 1]"),
        (["squad", "--n-documents", "0"], 2, "n_documents must be at least 1"),
        (["squad", "--prompt", "poem"], 2, "unknown prompt 'poem'"),
        (["squad", "--adapter", "nowhere"], 1, "not an adapter folder"),
        (["quality"], 1, "the set quality (dev) was not found"),
        (["spans"], 2, "spans needs a corpus"),
        (["squad", "--by", "k"], 2, "rows of squad cannot be grouped by 'k'"),
        (["multidoc", "--k", "0"], 2, "k must be at least 1 passage each"),
        (["multidoc", "--distractors", "none"], 2, "unknown distractors 'none'"),
        (["multidoc", "--k", "2"], 1, "no passage has 1 distractors from other articles"),
        (["ruler", "--kind", "singel"], 2, "unknown kind 'singel'"),
        (["ruler"], 1, "no haystack is given"),
    ],
)
def test_invalid_input_is_refused(kv: Kv, squad: Path, tiny: Path, args: list[str], code: int, said: str) -> None:
    done = kv("eval", *args, "--model", tiny, *([] if "--prompt" in args else ["--prompt", "passage"]))
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_a_report_without_results_is_an_error(kv: Kv) -> None:
    done = kv("report", "nowhere", "--json")
    assert done.code == 1
    assert done.json["error"]["error"] == "DatasetError"


def test_questions_from_a_file(kv: Kv, tiny: Path, options: list[str], tmp_path: Path) -> None:
    write(tmp_path / "docs/ferry.txt", "The ferry leaves from pier 4.")
    own = {"document": "ferry.txt", "question": "Which pier?", "answer": ["pier 4", "4"]}
    write(tmp_path / "own.jsonl", json.dumps(own) + "\n")
    run = ["eval", "qa", "own.jsonl", "--documents", "docs", *options, "--json"]
    rows = [json.loads(line) for line in kv(*run).out.splitlines()]
    assert [(row["task"], row["n"], row["f1"] is None) for row in rows] == [("qa", 1, False)] * 3
    write(tmp_path / "own.jsonl", json.dumps({**own, "answer": None}) + "\n")
    done = kv(*run)
    assert done.code == 1 and done.json["error"]["error"] == "BrokenLineError"
    assert (done.json["error"]["what"], done.json["error"]["where"]) == ("no answer", "own.jsonl, line 1")
    for wrong, said in (
        (["qa"], "qa needs a file of questions"),
        (["squad", "own.jsonl"], "only qa takes a file of questions"),
    ):
        done = kv("eval", *wrong, "--model", "nowhere")  # said before any model is loaded
        assert done.code == 2 and said in done.err
