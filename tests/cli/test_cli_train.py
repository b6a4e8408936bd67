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


@pytest.fixture
def quick_run(tiny: Path, tmp_path: Path) -> list[str]:
    """Options of a run that takes a second or two."""
    lines = [
        {"context": f"The ferry {i} leaves at {i}.40 from pier {i}.", "question": "Which pier?", "answer": f"pier {i}"}
        for i in range(10)
    ]
    (tmp_path / "ferries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ["rank=2", "scorer_size=4", "span_tokens=8", "questions_per_document=1", "composition_share=0", "eta=2"]
    settings = [arg for text in small for arg in ("--set", text)]
    return ["--model", str(tiny), "--warmup-steps", "1", "--steps", "2", "--max-tokens", "48", *settings]


def test_train_makes_and_evaluates_an_adapter_that_add_accepts(
    kv: Run, quick_run: list[str], tiny: Path, tmp_path: Path
) -> None:
    data = ["--data", "ferries.jsonl", "--eval-every", "2", "--eval-documents", "1"]
    done = kv("train", "run", *data, *quick_run, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert report["adapter"] == "run/adapter" and report["step"] == report["n_steps"] == 3
    assert report["n_examples"] == 9 and report["n_held_out"] == 1
    assert set(report["evaluation"]["kl"]) == set(report["baseline"]) == {"0.25", "0.125", "0.0625"}
    assert report["settings"]["rank"] == 2 and report["settings"]["eta"] == 2
    adapter = Adapter.load(tmp_path / "run/adapter", Backbone.load(tiny))
    assert adapter.config.trained_steps == report["best_step"] and adapter.config.scorer_size == 4
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "ferries.jsonl" in card and "| this adapter |" in card
    added = kv("add", "-", "--id", "x", "--model", tiny, "--adapter", "run/adapter", stdin="The ferry leaves at 7.40.")
    assert added.code == 0, added.err
    # Once more without --resume: nothing is written over. With it: it is finished.
    again = kv("train", "run", *data, *quick_run, "--json")
    assert again.code == 1 and again.json["error"]["error"] == "CheckpointError"
    resumed = kv("train", "run", *data, *quick_run, "--resume")
    assert resumed.code == 0 and "3 of 3" in resumed.out and "no document" in resumed.out
    other = kv("train", "run", *data, *quick_run, "--resume", "--lr-lora", "0.1", "--json")
    assert other.code == 1 and "lr_lora was" in other.json["error"]["what"]


def test_training_on_a_corpus_continues_from_an_adapter(
    kv: Run, quick_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_as_question", lambda text: text.replace("\0", "").strip() or None)
    monkeypatch.setattr(questions, "STEMS", ("What", "How"))
    assert kv("train", "general", "--data", "ferries.jsonl", *quick_run).code == 0
    (tmp_path / "notes").mkdir()
    for name in "abcdef":
        (tmp_path / f"notes/{name}.md").write_text(f"# Pier {name}\n\n" + f"The ferry {name} leaves at 7.40. " * 12)
    options = [o for o in quick_run if o != "eta=2"]
    options = ["--model", options[1], "--steps", "2", "--set", "answer_tokens=6", "--set", "span_tokens=8"]
    tune = ["train", "tuned", "--corpus", "notes", "--init", "general/adapter", *options]
    dry = kv(*tune, "--dry-run", "--json").json
    assert dry["questions_s"] > 0 and dry["warmup_steps"] == 0 and not (tmp_path / "tuned").exists()
    report = kv(*tune, "--json").json
    assert (report["settings"]["min_ratio"], report["settings"]["max_tokens"]) == (0.005, 1536)
    assert (report["settings"]["rank"], report["settings"]["warmup_steps"], report["n_steps"]) == (2, 0, 2)
    held_out = json.loads((tmp_path / "tuned/held_out.json").read_text())
    assert 1 <= len(held_out) < 6
    written = (tmp_path / "tuned/questions.jsonl").read_text().splitlines()
    assert len(written) >= 6 - len(held_out)
    assert json.loads((tmp_path / "tuned/adapter/kv_distill.json").read_text())["trained_steps"] == 5
    assert "general/adapter" in (tmp_path / "tuned/adapter/README.md").read_text()
    few = kv(*tune[:1], "few", *tune[2:], "--question-passages", "1", "--set", "full_strength_ratio=0.1", "--json").json
    assert few["n_examples"] == report["n_examples"]
    assert len((tmp_path / "few/questions.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "few/adapter/kv_distill.json").read_text())["full_strength_ratio"] == 0.1
    none = kv(*tune[:1], "none", *tune[2:], "--question-passages", "0", "--json")
    assert none.code == 0 and not (tmp_path / "none/questions.jsonl").exists(), none.err
    wrong = kv(*tune[:1], "other", *tune[2:], "--rank", "9", "--json")
    assert wrong.code == 2 and "rank is 2" in wrong.json["error"]["what"]


def test_a_dry_run_estimates_and_writes_nothing(kv: Run, quick_run: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = kv("train", "run", "--data", "ferries.jsonl", *quick_run, "--dry-run")
    assert done.code == 0, done.err
    for said in ("Warm-up", "1 steps of", "Total time", "Peak memory", "Each checkpoint"):
        assert said in done.out
    fitted = kv("train", "run", "--data", "ferries.jsonl", *quick_run[:4], *quick_run[6:], "--dry-run", "--json",
                "--time-limit", "60").json  # fmt: skip
    assert fitted["steps"] > 10 and fitted["total_s"] < 60
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "error", "where"),
    [
        ([], "ConfigError", "--data"),
        (["--data", "nothing.jsonl"], "DatasetError", "nothing.jsonl"),
        (["--corpus", "empty"], "DatasetError", "empty"),
        (["--data", "a.jsonl:0"], "ConfigError", "a.jsonl"),
        (["--data", "broken.jsonl"], "BrokenLineError", "broken.jsonl"),
        (["--data", "fine.jsonl", "--preset", "best"], "ConfigError", "preset"),
        (["--data", "fine.jsonl", "--rank", "0"], "ConfigError", "rank"),
        (["--data", "fine.jsonl", "--set", "wings=2"], "ConfigError", "--set"),
        (["--data", "fine.jsonl", "--set", "eta"], "ConfigError", "--set"),
        (["--data", "fine.jsonl", "--set", "eta=six"], "ConfigError", "--set"),
        (["--data", "fine.jsonl", "--time-limit", "0"], "ConfigError", "time_limit"),
        (["--data", "fine.jsonl", "--eval-documents", "0"], "ConfigError", "eval_documents"),
        (["--data", "fine.jsonl", "--prompt", "loud"], "ConfigError", "prompt"),
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
