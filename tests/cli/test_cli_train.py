"""`kv-memory train` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.compress import Adapter
from kv_memory.model.backbone import Backbone
from kv_memory.train import questions
from tests.cli.ran import Ran

Run = Callable[..., Ran]


RUN = {
    "warmup_steps": 1,
    "steps": 2,
    "max_tokens": 48,
    "rank": 2,
    "scorer_size": 4,
    "span_tokens": 8,
    "questions_per_document": 1,
    "composition_share": 0,
    "eta": 2,
}


@pytest.fixture
def quick_run(tiny: Path, tmp_path: Path) -> list[str]:
    """Options of a run that takes a second or two, most of them from a file."""
    lines = [
        {"context": f"The ferry {i} leaves at {i}.40 from pier {i}.", "question": "Which pier?", "answer": f"pier {i}"}
        for i in range(10)
    ]
    (tmp_path / "ferries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "model": str(tiny)}))
    return ["--data", "ferries.jsonl", "--config", "run.json"]


def test_train_makes_and_evaluates_an_adapter_that_add_accepts(
    kv: Run, quick_run: list[str], tiny: Path, tmp_path: Path
) -> None:
    measured = ["--set", "eval_every=2", "--set", "eval_documents=1", "--set", "eval_ratios=1/4,1/8"]
    command = ["train", "run", *quick_run, *measured]
    done = kv(*command, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["adapter"] == "run/adapter" and report["step"] == report["n_steps"] == 3
    assert report["n_examples"] == 9 and report["n_held_out"] == 1
    assert set(report["kl"]) == set(report["baseline"]) == {"0.25", "0.125"}
    assert report["settings"]["rank"] == 2 and report["settings"]["eta"] == 2
    adapter = Adapter.load(tmp_path / "run/adapter", Backbone.load(tiny))
    assert adapter.config.trained_steps == report["best_step"] and adapter.config.scorer_size == 4
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "ferries.jsonl" in card and "| this adapter |" in card
    added = kv("add", "-", "--id", "x", "--model", tiny, "--adapter", "run/adapter", stdin="The ferry leaves at 7.40.")
    assert added.code == 0, added.err
    # Once more without --resume: nothing is written over. With it: it is finished.
    again = kv(*command, "--json")
    assert again.code == 1 and again.json["error"]["error"] == "TrainingError"
    resumed = kv(*command, "--resume")
    assert resumed.code == 0 and "3 of 3" in resumed.out and "no document" in resumed.out
    other = kv(*command, "--resume", "--set", "lr_lora=0.1", "--json")
    assert other.code == 1 and "lr_lora was" in other.json["error"]["what"]


def test_training_on_a_corpus_continues_from_an_adapter(
    kv: Run, quick_run: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_as_question", lambda text: text.replace("\0", "").strip() or None)
    monkeypatch.setattr(questions, "STEMS", ("What", "How"))
    assert kv("train", "general", *quick_run, "--set", "steps=1").code == 0
    (tmp_path / "notes").mkdir()
    for name in "abcd":
        (tmp_path / f"notes/{name}.md").write_text(f"# Pier {name}\n\n" + f"The ferry {name} leaves at 7.40. " * 12)
    small = (
        'corpus = "notes"\ninit = "general/adapter"\nsteps = 1\nanswer_tokens = 6\nspan_tokens = 8\nn_questions = 2\n'
    )
    (tmp_path / "tune.toml").write_text(f"model = {json.dumps(str(tiny))}\n{small}")
    tune = ("--config", "tune.toml", "--json")
    dry = kv("train", "tuned", *tune, "--dry-run").json
    assert dry["questions_s"] > 0 and dry["warmup_steps"] == 0 and not (tmp_path / "tuned").exists()
    report = kv("train", "tuned", *tune, "--set", "full_strength_ratio=0.1", "--set", "question_passages=1").json
    assert (report["settings"]["min_ratio"], report["settings"]["max_tokens"]) == (0.005, 1536)
    assert (report["settings"]["rank"], report["settings"]["warmup_steps"], report["n_steps"]) == (2, 0, 1)
    held_out = json.loads((tmp_path / "tuned/held_out.json").read_text())
    assert 1 <= len(held_out) < 4
    assert len((tmp_path / "tuned/questions.jsonl").read_text().splitlines()) == 1
    assert report["n_examples"] > 4 - len(held_out)  # the windows, with and without questions, and their passages
    config = json.loads((tmp_path / "tuned/adapter/kv_distill.json").read_text())
    assert (config["trained_steps"], config["full_strength_ratio"]) == (3, 0.1)
    assert "general/adapter" in (tmp_path / "tuned/adapter/README.md").read_text()
    none = kv("train", "none", *tune, "--set", "question_passages=0")
    assert none.json["n_examples"] == report["n_examples"] and not (tmp_path / "none/questions.jsonl").exists(), (
        none.err
    )
    wrong = kv("train", "other", *tune, "--set", "rank=9")
    assert wrong.code == 2 and "rank is 2" in wrong.json["error"]["what"]


def test_a_dry_run_estimates_and_writes_nothing(kv: Run, quick_run: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = kv("train", "run", *quick_run, "--dry-run")
    assert done.code == 0, done.err
    for said in ("Warm-up", "1 steps of", "Total time", "Peak memory", "Each checkpoint"):
        assert said in done.out
    fitting = {
        name: value for name, value in json.loads((tmp_path / "run.json").read_text()).items() if name != "steps"
    }
    (tmp_path / "run.json").write_text(json.dumps(fitting))
    fitted = kv("train", "run", *quick_run, "--dry-run", "--json", "--time-limit", "60").json
    assert fitted["steps"] > 10 and fitted["total_s"] < 60
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "error", "where"),
    [
        ([], "ConfigError", "data"),
        (["--data", "nothing.jsonl"], "DatasetError", "nothing.jsonl"),
        (["--corpus", "empty"], "DatasetError", "empty"),
        (["--data", "a.jsonl:0"], "ConfigError", "a.jsonl"),
        (["--data", "broken.jsonl"], "BrokenLineError", "broken.jsonl"),
        (["--data", "fine.jsonl", "--set", "preset=best"], "ConfigError", "preset"),
        (["--data", "fine.jsonl", "--set", "rank=0"], "ConfigError", "rank"),
        (["--data", "fine.jsonl", "--time-limit", "0"], "ConfigError", "time_limit_s"),
        (["--data", "fine.jsonl", "--set", "eval_documents=0"], "ConfigError", "eval_documents"),
        (["--data", "fine.jsonl", "--set", "prompt=loud"], "ConfigError", "--set"),
        (["--data", "fine.jsonl", "--model", "nowhere/at-all"], "ModelNotFoundError", "nowhere/at-all"),
        (["--data", "fine.jsonl", "--model", "TINY", "--init", "nowhere"], "AdapterError", "nowhere"),
    ],
)
def test_invalid_input_fails_before_anything_is_written(
    kv: Run, tiny: Path, tmp_path: Path, args: list[str], error: str, where: str
) -> None:
    line = json.dumps({"context": "A ferry.", "question": "What?", "answer": "A ferry"})
    (tmp_path / "fine.jsonl").write_text(line + "\n")
    (tmp_path / "broken.jsonl").write_text(line + "\n{\n")
    (tmp_path / "empty").mkdir()
    done = kv("train", "run", *[str(tiny) if arg == "TINY" else arg for arg in args], "--json")
    assert done.code == (2 if error == "ConfigError" else 1)
    assert done.json["error"]["error"] == error and where in done.json["error"]["where"]
    assert not (tmp_path / "run").exists()
