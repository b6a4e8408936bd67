"""The task qa: a file of the user's own questions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import BrokenLineError, ConfigError, DatasetError
from kv_memory.evaluate import TaskSettings, evaluate
from kv_memory.evaluate.cases import Case
from kv_memory.evaluate.tasks import find_task
from tests.evaluate.conftest import prose, write

PIER = {"context": "The ferry leaves from pier 4.", "question": "Which pier?", "answer": "pier 4"}
LAMP = {"context": "The lamp burned whale oil.", "question": "What did it burn?", "answer": ["whale oil", "oil"]}


def lines(path: Path, *records: Any) -> Path:
    write(path, "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def cases(backbone: Any, file: Path | None, **settings: Any) -> list[Case]:
    return find_task("qa").cases(backbone, TaskSettings(questions=file, **settings))


def test_questions_about_one_context_are_grouped_across_the_file(roomy: Any, tmp_path: Path) -> None:
    more = {**PIER, "question": "What leaves?", "answers": ["The ferry"]}
    del more["answer"]
    many = [{**LAMP, "question": f"What was burned on day {i}?"} for i in range(7)]
    found = {case.text: case for case in cases(roomy, lines(tmp_path / "own.jsonl", PIER, *many, "", more))}
    assert set(found) == {PIER["context"], LAMP["context"]}
    pier, lamp = found[PIER["context"]], found[LAMP["context"]]  # type: ignore[index]
    assert [(q.text, q.references) for q in pier.queries] == [
        ("Which pier?", ("pier 4",)),
        ("What leaves?", ("The ferry",)),
    ]
    assert len(lamp.queries) == 7  # all of them: they are the user's own
    assert lamp.queries[0].references == ("whale oil", "oil")
    assert pier.id.startswith("own/")


def test_documents_are_read_from_a_folder(roomy: Any, tmp_path: Path) -> None:
    write(tmp_path / "docs/sub/ferry.html", "<html><body><p>The ferry leaves from pier 4.</p></body></html>")
    write(tmp_path / "docs/lamp.txt", "The lamp burned whale oil.\n")
    ferry = {"document": "sub/ferry.html", "question": "Which pier?", "answer": "pier 4"}
    again = {**ferry, "document": "./sub/../sub/ferry.html", "question": "What leaves?"}
    lamp = {"document": "lamp.txt", "question": "What oil?", "answer": "whale"}
    file = lines(tmp_path / "own.jsonl", ferry, lamp, again, LAMP)
    found = {case.id: case for case in cases(roomy, file, documents=tmp_path / "docs")}
    assert [len(found[name].queries) for name in ("sub/ferry.html", "lamp.txt")] == [2, 1]
    assert found["sub/ferry.html"].text == "The ferry leaves from pier 4."
    assert found["lamp.txt"].text == "The lamp burned whale oil."
    assert len(found) == 3  # contexts may stand beside them


def test_long_documents_are_cut_with_a_warning(roomy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {"context": prose(1, 20), "question": "What?", "answer": "ferry"}
    file = lines(tmp_path / "own.jsonl", PIER, long)
    with caplog.at_level(logging.WARNING, "kv_memory"):
        assert len(cases(roomy, file)) == 2 and not caplog.messages
        found = cases(roomy, file, max_tokens=100)
        assert sorted(len(roomy.encode_text(case.text)) for case in found) == [29, 99]  # a space at the end goes
        assert "1 of 2 documents are cut at 100 tokens" in caplog.text
        assert len(cases(roomy, file, n_documents=1)) == 1
        assert "1 of 2 documents are left out" in caplog.text


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"question": "Which?", "answer": "4"}, "neither a context nor a document"),
        ({**PIER, "document": "a.txt"}, "both a context and a document"),
        ({"context": PIER["context"], "question": "Which?"}, "no answer"),
        ({"context": PIER["context"], "answer": "4"}, "no question"),
        ({**PIER, "context": " "}, "empty context"),
        ({**PIER, "answer": []}, "no answer"),
        ({**PIER, "answer": 4}, "answer must be text, got int"),
        ({"document": "a.txt", "question": "Which?", "answer": "4"}, "document 'a.txt': no such file or folder"),
        ({"document": "../own.jsonl", "question": "Which?", "answer": "4"}, "'../own.jsonl' is not inside"),
        ({"document": "empty.txt", "question": "Which?", "answer": "4"}, "document 'empty.txt': no text"),
    ],
)
def test_a_broken_line_is_reported_with_its_number(roomy: Any, tmp_path: Path, line: Any, what: str) -> None:
    write(tmp_path / "docs/empty.txt", " ")
    file = lines(tmp_path / "own.jsonl", PIER, "", line)
    with pytest.raises(BrokenLineError) as caught:
        cases(roomy, file, documents=tmp_path / "docs")
    assert what in caught.value.what
    assert caught.value.where == f"{file}, line 3"
    assert "context, question and answer" in (caught.value.next_step or "")


def test_missing_or_empty_files_are_errors(roomy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qa needs a file of questions"):
        cases(roomy, None)
    with pytest.raises(DatasetError, match="the file has no questions"):
        cases(roomy, lines(tmp_path / "own.jsonl", ""))
    with pytest.raises(DatasetError, match="cannot be read"):
        cases(roomy, tmp_path / "nothing.jsonl")
    nowhere = {"document": "a.txt", "question": "Which?", "answer": "4"}
    with pytest.raises(BrokenLineError, match=r"none is given.*--documents"):
        cases(roomy, lines(tmp_path / "own.jsonl", nowhere))


def test_own_questions_are_measured_like_other_tasks_and_resumed(roomy: Any, tmp_path: Path) -> None:
    settings = TaskSettings(questions=lines(tmp_path / "own.jsonl", PIER, LAMP))
    options = {"backbone": roomy, "methods": ["full", "none", "sink_recent"], "keep_ratios": [0.25]}
    first = evaluate("qa", settings=settings, out=tmp_path / "run", **options)
    rows = {row.method: row for row in first.rows}
    assert rows["full"].means["kl"] == 0 < (rows["none"].means["kl"] or 0)
    assert all(rows["sink_recent"].means[name] is not None for name in ("kl", "nll", "f1", "em", "contains"))
    assert [record.size_bytes is None for record in first.records if record.method != "sink_recent"] == [True] * 4
    # One more question about a document: that one is measured again, the other is there.
    more = lines(tmp_path / "own.jsonl", PIER, LAMP, {**LAMP, "question": "What burned?"})
    seen: list[int] = []
    again = evaluate(
        "qa",
        settings=TaskSettings(questions=more),
        out=tmp_path / "run",
        on_progress=lambda progress: seen.append(progress.n_measured),
        **options,
    )
    assert seen[-1] == 3 and again.rows[0].n == 3
