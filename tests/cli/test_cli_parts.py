"""The parts of the command line that have cases of their own: names, output, prose."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

import kv_memory.cli
from kv_memory.cli.demo import derived_questions
from kv_memory.cli.demo_questions import QUESTIONS, contains_any, known_questions
from kv_memory.cli.documents import find_document_id
from kv_memory.cli.output import plain, printable, reporting
from kv_memory.cli.packages import PACKAGES, package_documents, prose_of
from kv_memory.documents import Document
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


def test_printable_keeps_text_and_replaces_control_characters() -> None:
    assert printable("Zoë\t1\n") == "Zoë\t1\n"
    assert printable("a\x1b[31mb\x07\r\x9b") == "a\ufffd[31mb\ufffd\ufffd\ufffd"


def test_plain_makes_json_of_records() -> None:
    record = {
        "when": datetime(2026, 1, 2, tzinfo=UTC),
        "where": Path("a/b"),
        "parts": (PassageRecord(text="x", n_tokens=1, text_sha256="0"),),
    }
    assert plain(record) == {
        "when": "2026-01-02T00:00:00+00:00",
        "where": "a/b",
        "parts": [{"text": "x", "n_tokens": 1, "text_sha256": "0", "terms": None}],
    }
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


MARKDOWN = """\
[![CI](https://ci.example/badge.svg)](https://ci.example/run)
<div align="center"><img src="x.png"></div>

# Ferry

Ferry is a **library** for [crossing](https://example.org/a_(b)) water, written in `Python` by <b>one</b> person.
It has no engine. <!-- hidden
words -->

```python
import ferry  # this is no prose at all, and must go.
```

It can do all of these things:

- Row with *two* oars, forwards or backwards
- Sail where there is wind.

| a | table of things that has enough words. |

See https://example.org/manual for all there is to know.

Short one.

[docs]: https://example.org "a title with more than enough words."
"""

RST = """\
Ferry
=====

|PyPI| |Downloads|

.. |PyPI| image:: https://img.example/pypi.svg
    :target: https://pypi.example/ferry

`Ferry <https://example.org>`_ is a library for crossing water,
and uses :class:`Oar` and ``Sail``.

.. code-block:: python

    import ferry  # no prose either, whatever it looks like.

An example follows here for everybody to see::

    >>> ferry.cross("the wide and very deep river.")

The author_ is Maren Dahl, who lives by the water.
"""


def test_prose_of_markdown() -> None:
    assert prose_of(MARKDOWN).split("\n\n") == [
        "Ferry is a library for crossing water, written in Python by one person. It has no engine.",
        "It can do all of these things:",
        "- Row with two oars, forwards or backwards\n- Sail where there is wind.",
        "See for all there is to know.",
    ]


def test_prose_of_restructured_text() -> None:
    assert prose_of(RST).split("\n\n") == [
        "Ferry is a library for crossing water, and uses Oar and Sail.",
        "The author is Maren Dahl, who lives by the water.",
    ]


def test_package_documents_are_prose_of_installed_packages() -> None:
    documents = package_documents((*PACKAGES, "no-such-package-anywhere"))
    # A dependency of ours that has no prose to offer any more must be replaced, and so must its questions.
    assert {question.package for question in QUESTIONS} <= {document.id for document in documents}
    assert len(documents) >= 12
    known = known_questions(documents)
    assert len(known) >= 24 and len({question.package for question in known[:12]}) <= 7  # the demo compresses few
    for document in documents:
        assert 200 < len(document.text) < 1300
        assert document.metadata["version"] in document.text
        assert not any(mark in document.text for mark in ("```", "](", "<img", "https://", ".. "))


def test_no_demo_question_contains_its_answer() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS)
    for question in QUESTIONS:
        assert question.accepted and not contains_any(question.text, question.accepted), question


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("It is\nGrant  Jenks.", ["grant jenks"], True),
        ("The limit is 3.", ["MIT"], False),
        ("Under the MIT-License", ["MIT"], True),
        ("About 800ns", ["80", "800 ns"], False),
        ("", ["MIT"], False),
        ("MIT", [], False),
    ],
)
def test_an_answer_with_whole_words_of_an_accepted_one_is_right(text: str, wanted: list[str], found: bool) -> None:
    assert contains_any(text, wanted) is found


def test_derived_questions_use_headings_or_names() -> None:
    documents = [
        Document(id="/x/guide.md", text="# Ferries\n\nText.\n\n## Oars ##\n\nMore.\n\n## Third\n"),
        Document(id="/x/my_notes.txt", text="No heading."),
    ]
    assert derived_questions(documents) == [
        "What does it say about Ferries?",
        "What does it say about Oars?",
        "What does it say about my notes?",
    ]
