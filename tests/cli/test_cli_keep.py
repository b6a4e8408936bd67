"""--keep-ratio 1/8, --keep-tokens and --max-bytes, wherever it is said how much to keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_memory.config import ratio_of
from kv_memory.errors import ConfigError
from tests.cli.ran import Ran

Run = Callable[..., Ran]
TEXT = "The keeper of the lighthouse of Orvik is Ingrid Falk, and her dog is called Biscuit."


def caches(kv: Run, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = kv("show", name, "--json").json["caches"]
    return found


def test_ratios_are_numbers_or_fractions() -> None:
    assert [ratio_of(text) for text in ("0.25", "1/4", " 3/8 ", "1", "1e-2")] == [0.25, 0.25, 0.375, 1.0, 0.01]
    for wrong in ("", "a", "1/0", "1/8/2", "nan", "inf", "0", "-1/4", "9/8"):
        with pytest.raises(ConfigError, match=r"keep.ratio"):
            ratio_of(wrong)


def test_add_accepts_fractions_tokens_and_bytes(kv: Run, quick: list[str]) -> None:
    first = kv("add", "-", "--id", "a", "--keep-ratio", "1/8", "--json", *quick, stdin=TEXT).json
    assert (first["keep_ratio"], first["keep_tokens"], first["max_bytes"]) == (0.125, None, None)
    assert {cache["keep_ratio"] for cache in caches(kv, "a")} == {0.125}

    second = kv("add", "-", "--id", "a", "--keep-tokens", 9, "--json", stdin=TEXT).json
    assert (second["keep_ratio"], second["keep_tokens"], second["replaced"]) == (None, 9, ["a"])
    new = [cache for cache in caches(kv, "a") if cache["keep_ratio"] != 0.125]
    assert {cache["n_kept"] for cache in new} == {9}
    for cache in new:  # what is shown is the share that was kept, not what was asked for
        assert cache["keep_ratio"] == 9 / cache["n_tokens"]
        assert f"{cache['keep_ratio']:g}" in kv("show", "a").out
    assert kv("add", "-", "--id", "a", "--json", stdin=TEXT).json["unchanged"] == ["a"]

    third = kv("add", "-", "--id", "b", "--max-bytes", "20KB", "--storage", "int8", "--json", stdin=TEXT * 20).json
    assert (third["keep_ratio"], third["keep_tokens"], third["max_bytes"]) == (None, None, 20_000)
    assert all(cache["size_bytes"] <= 20_000 for cache in caches(kv, "b"))
    back = kv("add", "-", "--id", "a", "--keep-ratio", "1/8", "--json", stdin=TEXT).json
    assert (back["n_passages"], back["unchanged"], back["keep_ratio"]) == (0, ["a"], 0.125)


def test_stats_show_the_amount_kept(kv: Run, store: Path) -> None:
    for option, value, name, kept, said in (
        ("--keep-tokens", 9, "keep_tokens", 9, "9 tokens per passage"),
        ("--max-bytes", "20KB", "max_bytes", 20_000, "at most 20,000 bytes per passage"),
        ("--keep-ratio", "1/2", "keep_ratio", 0.5, "Keep ratio"),
    ):
        kv("add", "-", "--id", "new", option, value, stdin=TEXT)
        settings = kv("stats", "--json").json["settings"]
        names = {"keep_ratio", "keep_tokens", "max_bytes"}
        assert {name: settings[name] for name in names if settings[name] is not None} == {name: kept}
        assert said in kv("stats").out


def test_questions_are_answered_from_the_caches_of_the_given_amount(kv: Run, store: Path) -> None:
    kv("add", "--stale", "--keep-tokens", 9)
    ask = ("ask", "When does the ferry leave?", "--max-new-tokens", 2, "--json")
    nine = kv(*ask).json
    quarter = kv(*ask, "--keep-ratio", "1/4").json
    assert kv(*ask, "--keep-tokens", 9).json["n_cached_tokens"] == nine["n_cached_tokens"] < quarter["n_cached_tokens"]
    assert set(quarter["keep_ratios"]) == {0.25}
    assert kv(*ask, "--max-bytes", "20KB").json["keep_ratios"] == nine["keep_ratios"]  # the newest cache there is
    assert kv("stats", "--json").json["settings"]["keep_tokens"] == 9  # a question changes no setting
    said = kv("chat", "--keep-ratio", "1/4", "--max-new-tokens", 2, "--json", stdin="When does the ferry leave?\n")
    assert said.code == 0 and '"error"' not in said.out
    assert [answer["n_cached_tokens"] for answer in said.json["answers"]] == [quarter["n_cached_tokens"]]


def test_a_file_added_at_another_ratio_makes_nothing_unanswerable(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The ferry to Skarholm leaves at 7.40 from pier 4 every morning.")
    (tmp_path / "b.txt").write_text("The lighthouse lamp burned whale oil until an office acted.")
    kv("add", "a.txt", "--keep-ratio", "1/4", *quick)
    kv("add", "b.txt", "--keep-ratio", "1/8")
    ask = ("--max-new-tokens", 2, "--json")
    assert kv("ask", "When does the ferry leave?", "--top-k", 1, *ask).json["keep_ratios"] == [0.25]
    assert kv("ask", "What did the lamp burn?", "--top-k", 1, *ask).json["keep_ratios"] == [0.125]
    both = kv("ask", "When does the ferry leave? What did the lamp burn?", "--top-k", 2, *ask).json
    assert sorted(both["keep_ratios"]) == [0.125, 0.25] and both["fallbacks"] == []


@pytest.mark.parametrize("command", [["add", "-"], ["job", "run", "."], ["ask", "Why?"], ["chat"], ["demo"]])
@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--keep-ratio", "1/0"], "keep_ratio"),
        (["--keep-ratio", "a half"], "keep_ratio"),
        (["--keep-tokens", "0"], "keep_tokens"),
        (["--max-bytes", "some"], "max_bytes"),
        (["--keep-ratio", "1/4", "--max-bytes", "2MB"], "max_bytes"),
        (["--keep-tokens", "5", "--max-bytes", "2MB"], "max_bytes"),
    ],
)
def test_wrong_usage(kv: Run, tmp_path: Path, command: list[str], options: list[str], where: str) -> None:
    done = kv(*command, *options, "--json", stdin="x")
    assert done.code == 2
    error = json.loads(done.out.splitlines()[-1])["error"]
    assert error["error"] == "ConfigError" and error["where"] == where and error["next_step"]
    assert not (tmp_path / "kv-memory-store").exists()


def test_a_size_limit_that_is_too_small_reports_the_smallest_possible(
    kv: Run, quick: list[str], tmp_path: Path
) -> None:
    wrong = kv("add", "-", "--max-bytes", "1KB", "--json", *quick, stdin=TEXT)
    assert wrong.code == 2 and wrong.json["error"]["error"] == "ConfigError"
    assert not (tmp_path / "kv-memory-store").exists()
    smallest = wrong.json["error"]["next_step"].split()[1]
    done = kv("add", "-", "--id", "a", "--max-bytes", smallest, "--json", *quick, stdin=TEXT)
    assert done.code == 0
    assert all(cache["size_bytes"] <= int(smallest) and cache["n_kept"] == 1 for cache in caches(kv, "a"))


@pytest.mark.slow
def test_jobs_store_the_size_limit_and_resume_with_it(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for number in range(3):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"Pier {number} has a ferry to Skarholm. " * (number + 1))
    bad = tmp_path / "notes/bad.txt"
    bad.write_bytes(b"\0")
    assert kv("job", "run", "notes", "--name", "j", "--max-bytes", "20KB", "--json", *quick).code == 1
    kept = {cache["blob_key"] for number in range(3) for cache in caches(kv, f"{number}.txt")}
    bad.write_text(TEXT)
    assert kv("job", "resume", "j", "--retry-failed", "--json").code == 0
    shown = kv("job", "show", "j", "--json").json["settings"]["memory"]
    assert (shown["keep_ratio"], shown["max_bytes"]) == (None, 20_000)
    assert "max_bytes 20000" in kv("job", "show", "j").out
    assert all(cache["size_bytes"] <= 20_000 for cache in caches(kv, "bad.txt"))
    again = kv("job", "run", "notes", "--name", "again", "--json").out.splitlines()[-1]
    assert json.loads(again)["unchanged"] == 4
    assert {cache["blob_key"] for number in range(3) for cache in caches(kv, f"{number}.txt")} == kept
