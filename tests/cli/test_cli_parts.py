"""The parts of the command line that have cases of their own: names, output, prose."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from rich.console import Console

import kv_memory.cli
from kv_memory.cli.documents import find_document_id
from kv_memory.cli.output import Name, Output, plain, printable, reporting
from kv_memory.errors import ConfigError, DocumentNotFoundError, StoreError
from kv_memory.store import PassageRecord

IDS = ["/data/a.md", "/data/notes/a.md", "/data/notes/b.md", "text-12ab", "text-12cd", "text-34"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/data/a.md", "/data/a.md"),
        ("b.md", "/data/notes/b.md"),
        ("notes/a.md", "/data/notes/a.md"),
        ("text-3", "text-34"),
        ("text-34", "text-34"),
    ],
)
def test_a_document_is_found_by_id_path_name_or_prefix(given: str, meant: str) -> None:
    assert find_document_id(given, IDS) == meant


def test_an_exact_id_wins_over_longer_ones() -> None:
    assert find_document_id("text", ["text", "text-1", "/x/text"]) == "text"


def test_a_relative_path_matches_the_absolute_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = str(tmp_path / "a.md")
    assert find_document_id("a.md", [own, "/data/a.md"]) == own


@pytest.mark.parametrize(("given", "candidates"), [("a.md", IDS[:2]), ("text-12", IDS[3:5])])
def test_an_ambiguous_name_lists_the_candidates(given: str, candidates: list[str]) -> None:
    with pytest.raises(DocumentNotFoundError) as caught:
        find_document_id(given, IDS)
    assert all(candidate in caught.value.what for candidate in candidates)
    assert "2 documents" in caught.value.what


@pytest.mark.parametrize("given", ["", "nothing", "\0", "~nobody/x"])
def test_an_unknown_name_is_not_found(given: str) -> None:
    with pytest.raises(DocumentNotFoundError, match="no document matches '"):
        find_document_id(given, IDS)


LONG_PATH = "/data/my harbour notes/a-rather-long-name-of-a-note-for-the-harbour-that-fills-a-line.md"
PROSE = "168 tokens in 3 passages, and other words of a sentence that may be wrapped between any two of them"


def table_at(width: int | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of a table with a path and a sentence, on a terminal of this width, or in a file."""
    file = io.StringIO()
    out = Output(as_json=False)
    terminal = {} if width is None else {"width": width, "force_terminal": True, "color_system": None}
    monkeypatch.setattr(out, "_out", Console(file=file, **terminal))
    out.table(("Document", "Tokens", "About"), [(Name(LONG_PATH), "1,200", PROSE), (Name("b"), "1", "-")])
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [None, 300, 100, 80, 20])
def test_tables_break_neither_paths_nor_words(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = table_at(width, monkeypatch)
    assert lines[1].startswith(f"{LONG_PATH}   1,200  168") or lines[1].startswith(f"{LONG_PATH}  1,200   168")
    about = " ".join(line[len(LONG_PATH) + 10 :].strip() for line in lines[1:-1])
    assert " ".join(about.split()) == PROSE
    assert (len(lines) == 3) is (width in {None, 300})  # the sentence is wrapped where there is no room


def test_tables_in_a_file_have_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(line == line.rstrip() for line in table_at(None, monkeypatch))


def test_printable_keeps_text_and_replaces_control_characters() -> None:
    assert printable("Zoë\t1\n") == "Zoë\t1\n"
    assert printable("a\x1b[31mb\x07\r\x9b") == "a\ufffd[31mb\ufffd\ufffd\ufffd"


def test_plain_makes_json_of_records() -> None:
    record = {
        "when": datetime(2026, 1, 2, tzinfo=UTC),
        "where": Path("a/b"),
        "parts": (PassageRecord(text="x", n_tokens=1, text_sha256="0"),),
    }
    texts = dict.fromkeys(("language", "headings", "encoder"), "")
    part = {"text": "x", "n_tokens": 1, "text_sha256": "0", "terms": None, "vector": None, **texts}
    assert plain(record) == {"when": "2026-01-02T00:00:00+00:00", "where": "a/b", "parts": [part]}
    assert plain([StoreError("full", where="/x")])[0]["error"] == "StoreError"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StoreError("it is full", where="/data", next_step="Make room."), 1, "it is full"),
        (ConfigError("too much", where="--x"), 2, "too much"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero"),
    ],
)
def test_errors_become_exit_codes_and_json(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, reporting(as_json=True):
        raise error
    assert caught.value.exit_code == code
    assert json.loads(capsys.readouterr().out)["error"]["what"] == said


def test_an_error_caused_by_ctrl_c_counts_as_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, reporting(as_json=False):
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError  # as a library does that is interrupted while it cleans up
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err.startswith("Stopped. ")


def test_ctrl_c_before_the_command_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    # By name: `kv_memory.cli.app` is the application, which hides its module.
    monkeypatch.setattr(sys.modules["kv_memory.cli.app"], "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        kv_memory.cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_errors_print_what_where_and_next_step_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reporting(as_json=False):
        raise StoreError("it is [bold]full[/bold]", where="/data", next_step="Make room.")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Error: it is [bold]full[/bold]\nWhere: /data\nNext step: Make room.\n"
