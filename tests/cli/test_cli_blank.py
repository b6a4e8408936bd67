"""Blank values of options and arguments: wrong usage, of every command, before anything is opened."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.ran import Ran


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ask ''", "QUESTION"),
        ("ask ' \t'", "QUESTION"),
        ("add ''", "PATH"),
        ("add notes ''", "PATH"),
        ("add - --id ''", "--id"),
        ("add notes --model ''", "--model"),
        ("add notes --encoding ' '", "--encoding"),
        ("list --collection ''", "--collection"),
        ("list --store ''", "--store"),
        ("show ''", "ID"),
        ("remove a ''", "ID"),
        ("export ''", "FILE"),
        ("job run ''", "SOURCE"),
        ("job run notes --name ''", "--name"),
        ("job run --sync ''", "--sync"),
        ("job show ' '", "NAME"),
        ("job resume ''", "NAME"),
        ("eval squad --out ''", "--out"),
        ("train ''", "OUT"),
        ("demo --docs '' --questions q.txt", "--docs"),
    ],
)
def test_a_blank_value_is_wrong_usage(kv: Callable[..., Ran], tmp_path: Path, command: str, name: str) -> None:
    done = kv(*shlex.split(command), "--json")
    error = done.json["error"]
    assert (done.code, error["error"], error["where"], error["what"]) == (2, "ConfigError", name, f"{name} is empty")
    assert list(tmp_path.iterdir()) == []


def test_values_that_may_be_blank(kv: Callable[..., Ran], store: Path, quick: list[str]) -> None:
    """No switches of a chat template, and a line break as the end of an answer."""
    assert kv("add", "-", "--id", "x", "--chat-options", "", *quick, stdin="A text about a pier.").code == 0
    assert kv("ask", "When does the ferry leave?", "--stop", "\n", "--max-new-tokens", "2").code == 0


def test_chat_without_a_question_is_wrong_usage(kv: Callable[..., Ran], store: Path) -> None:
    done = kv("chat", "--json", stdin=" \n\n")
    assert done.code == 2 and done.json["error"]["what"] == "no question on stdin"


def test_paths_are_paths_after_all(kv: Callable[..., Ran], store: Path, tmp_path: Path) -> None:
    """They are typed as texts; commands get paths."""
    assert kv("export", "a.tar", "--json").json["path"] == str(tmp_path / "a.tar")
    assert kv("import", "a.tar", "--store", "other", "--json").code == 0
    assert kv("stats", "--store", "other", "--json").json["store"] == str(tmp_path / "other")
