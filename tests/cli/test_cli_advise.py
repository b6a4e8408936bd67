"""`kv-memory advise`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.model.embedded import BUILT_IN
from tests.cli.ran import Ran
from tests.evaluate.conftest import prose, write

Kv = Callable[..., Ran]
KEYS = [
    *("keep_ratio", "method", "n_passages", "n_questions", "size_bytes", "full_bytes", "kl", "kl_ci", "same"),
    *("seconds", "prefills", "factor"),
]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for seed in range(3):
        write(tmp_path / "my docs" / f"{seed}.txt", prose(seed, 1))
    return tmp_path / "my docs"


def test_json_prints_one_object_per_row_and_then_the_recommendation(kv: Kv, docs: Path, quick: list[str]) -> None:
    run = ["advise", "my docs", *quick, "--n-passages", 2, "--max-kl", 1000, "--min-same", 0]
    done = kv(*run, "--keep-ratio", "1/4", "--keep-ratio", "0.5", "--json")
    assert done.code == 0, done.err
    *rows, last = [json.loads(line) for line in done.out.splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 2
    assert [row["keep_ratio"] for row in rows] == [0.5, 0.25]
    assert last["recommended"] == last["keep_ratio"] == 0.25 and last["meets"]
    assert (last["max_kl"], last["min_same"], last["n_documents"], last["complete"]) == (1000, 0, 3, True)
    # The command is taken as it is.
    words = ["add", "my docs", "--keep-ratio", "0.25", *last["command"].split("--keep-ratio 0.25 ")[1].split()]
    assert last["command"].startswith("kv-memory add 'my docs' --keep-ratio 0.25 --model ")
    added = kv(*words, "--json").json
    assert len(added["added"]) == 3
    assert added["cache_bytes"] / added["n_passages"] == pytest.approx(rows[1]["size_bytes"], rel=0.5)


def test_text_output_has_a_table_and_a_recommendation(kv: Kv, docs: Path, quick: list[str]) -> None:
    write(docs / "bad.txt", "\0")
    done = kv("advise", "my docs", *quick, "--n-passages", 1, "--keep-ratio", "1/4")
    assert done.code == 0
    first, header, row, said, command = done.out.splitlines()
    assert "passages of 3 documents, attention" in first
    assert header.split() == ["kept", "bytes/passage", "smaller", "KL", "same", "s/passage", "prefills"]
    assert row.startswith("1/4")
    assert said.startswith("Recommended: --keep-ratio 1/4: too little data: questions ")
    assert command.startswith("  kv-memory add 'my docs' --skip-errors --keep-ratio 0.25 --model ")
    assert "Left out: a NUL byte" in done.err
    assert "0/2 done, full," in done.err


@pytest.mark.parametrize(
    ("args", "code", "where"),
    [
        (["nowhere"], 1, "nowhere"),
        (["my docs", "--keep-ratio", "2"], 2, "keep_ratio"),
        (["my docs", "--selector", "magic"], 2, "selector"),
        (["my docs", "--max-kl", "0"], 2, "max_kl"),
        (["my docs", "--min-same", "2"], 2, "min_same"),
        (["my docs", "--passage-tokens", "many"], 2, "passage_tokens"),
        (["my docs", "--encoding", "klingon"], 2, "encoding"),
    ],
)
def test_wrong_usage_fails_before_the_model_is_loaded(
    kv: Kv, docs: Path, args: list[str], code: int, where: str
) -> None:
    done = kv("advise", *args, "--model", "no/such-model", "--json")
    assert done.code == code
    assert done.json["error"]["where"] == where


@pytest.mark.slow
def test_advice_for_one_page_with_a_real_model(kv: Kv, tmp_path: Path) -> None:
    if not BUILT_IN["smollm2"].is_prepared:
        pytest.skip("smollm2 is not prepared (`make setup`)")
    text = "The ferry to Skarholm leaves at 7.40 from pier 4 every morning. Tickets cost 12 crowns."
    write(tmp_path / "docs" / "ferry.md", text)
    done = kv("advise", "docs", "--model", "smollm2", "--keep-ratio", "1/2", "--keep-ratio", "1/16", "--json")
    half, sixteenth, last = [json.loads(line) for line in done.out.splitlines()]
    assert half["n_passages"] == 1 and half["n_questions"] >= 1
    assert half["kl"] < sixteenth["kl"] and half["same"] >= sixteenth["same"]
    assert half["size_bytes"] > 3 * sixteenth["size_bytes"]
    assert not last["enough"] and "--model smollm2" in last["command"]
