"""Which examples a run trains on, and the model card that says so."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kv_memory.datasets import read_examples
from kv_memory.errors import BrokenLineError, ConfigError, DatasetError
from kv_memory.train.data import read_sources, split_share
from kv_memory.train.settings import TrainSettings
from kv_memory.train.train_report import TrainReport, write_card


def write_set(path: Path, n: int) -> str:
    lines = [{"context": f"Room {i} of {path.stem}.", "question": "Which room?", "answer": str(i)} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("text", "name", "share"),
    [
        ("squad", "squad", 1.0),
        ("squad:0.5", "squad", 0.5),
        ("notes/a.jsonl:2", "notes/a.jsonl", 2.0),
        ("hf:owner/name", "hf:owner/name", 1.0),
        ("hf:owner/name:.25", "hf:owner/name", 0.25),
        ("C:/data/a.jsonl", "C:/data/a.jsonl", 1.0),
    ],
)
def test_a_source_may_have_a_share(text: str, name: str, share: float) -> None:
    assert split_share(text) == (name, share)


@pytest.mark.parametrize("text", ["squad:0", "squad:1000"])
def test_a_share_out_of_range_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError):
        split_share(text)


def test_each_data_set_contributes_its_share(tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a.jsonl", 10), write_set(tmp_path / "b.jsonl", 4)
    sources = [f"{a}:0.3", f"{b}:2.5"]
    found = read_sources(sources)
    assert Counter(example.source for example in found) == {"a": 3, "b": 10}
    assert sorted(Counter(e.context for e in found if e.source == "b").values()) == [2, 2, 3, 3]
    assert read_sources(sources) == found
    assert read_sources(sources, seed=1) != found


def test_a_broken_line_raises_or_is_skipped_and_reported(tmp_path: Path) -> None:
    name = write_set(tmp_path / "a.jsonl", 3)
    with Path(name).open("a") as file:
        file.write('{"context": "Room 9.", "question": "Which?", "answer": ""}\n')
    with pytest.raises(BrokenLineError, match="4"):
        read_sources([name])
    skipped: list[str] = []
    assert len(read_sources([name], read=partial(read_examples, on_error="skip", on_skip=skipped.append))) == 3
    assert len(skipped) == 1 and "4" in skipped[0]
    with pytest.raises(DatasetError):
        read_sources([str(tmp_path / "nothing.jsonl")])


def report(folder: Path, **changes: Any) -> TrainReport:
    figures: dict[str, Any] = {
        "adapter": folder,
        "step": 500,
        "n_steps": 500,
        "best_step": 400,
        "loss": 0.5,
        "kl": {0.25: 0.111, 0.125: 0.222},
        "baseline": {0.25: 0.333, 0.125: 0.444},
        "none": 1.5,
        "n_held_out": 24,
        "n_examples": 1234,
        "n_tokens": 98765,
        "elapsed_s": 7300.0,
        "settings": TrainSettings(rank=17),
    }
    return TrainReport(**{**figures, **changes})


def test_card_lists_data_settings_and_results(backbone: Any, tmp_path: Path) -> None:
    path = write_card(
        report(tmp_path),
        backbone,
        command="kv-memory train runs/x --data squad",
        data=[("squad:0.5", "CC BY-SA 4.0"), ("notes", None)],
        begun_from=Path("runs/general/adapter"),
    )
    text = path.read_text()
    for said in (
        "base_model: tiny-llama",
        "1,234 examples: squad:0.5 (CC BY-SA 4.0); notes (licence: set by its owner)",
        "Started from: runs/general/adapter",
        "400 of 500",
        "2.0 h",
        "CPU cores",
        "`kv-memory train runs/x --data squad`",
        "- `rank`: 17",
        "| kept | 0.25 | 0.125 |",
        "| this adapter | 0.111 | 0.222 |",
        "| reconstruction attention (no training) | 0.333 | 0.444 |",
        "without any document: 1.500",
        "## Limits",
    ):
        assert said in text, said
    assert max(map(len, text.splitlines())) < 500


def test_card_reports_a_missing_evaluation(backbone: Any, tmp_path: Path) -> None:
    bare = report(tmp_path, kl=None, baseline=None, none=None, settings=TrainSettings())
    text = write_card(bare, backbone, command="x", data=[]).read_text()
    assert "It was not evaluated" in text and "| kept |" not in text and "differ from the defaults:\n\nnone" in text
