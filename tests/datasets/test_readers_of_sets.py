from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kv_memory.datasets import read_examples
from kv_memory.errors import BrokenLineError, ConfigError, DatasetError


def put(path: Path, *lines: Any) -> Path:
    """Write JSON lines, gzipped where the name says so; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def qa(context: Any, question: Any = "Q?", answer: Any = "A") -> dict[str, Any]:
    return {"context": context, "question": question, "answer": answer}


def squad(*paragraphs: dict[str, Any], title: str = "Foxes") -> dict[str, Any]:
    return {"version": "1.1", "data": [{"title": title, "paragraphs": list(paragraphs)}]}


# --- JSON lines ---


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_consecutive_lines_with_one_context_form_one_example(tmp_path: Path, name: str) -> None:
    path = put(
        tmp_path / name, qa(" Foxes run. ", "Who?", ["Foxes", "a fox", "Foxes"]), qa("Foxes run.", "What?"), qa("B")
    )
    first, second = read_examples(path)
    assert (first.context, first.source, len(first.questions)) == ("Foxes run.", "mine", 2)
    assert first.questions[0].answers == ("Foxes", "a fox")
    assert [q.text for q in first.questions] == ["Who?", "What?"]
    assert second.context == "B"


def test_id_depends_only_on_the_context(tmp_path: Path) -> None:
    lines = [qa("A"), qa("B"), qa("A", "again?")]
    ids = [e.id for e in read_examples(put(tmp_path / "x.jsonl", *lines))]
    assert ids[0] == ids[2] != ids[1]
    (tmp_path / "other").mkdir()
    assert {e.id for e in read_examples(put(tmp_path / "other" / "x.jsonl", *lines[1:]))} == set(ids)


def test_title_is_kept_and_byte_order_mark_and_blank_lines_ignored(tmp_path: Path) -> None:
    path = put(tmp_path / "x.jsonl", b"\xef\xbb\xbf", qa("A") | {"title": "T"}, b"\n  \n", qa("B"))
    assert [(e.context, e.title) for e in read_examples(path)] == [("A", "T"), ("B", "")]


BROKEN: list[tuple[Any, str]] = [
    (b'{"context": \n', "not JSON"),
    (b'{"context": "\xff", "question": "Q", "answer": "A"}\n', "not JSON in UTF-8"),
    (b"[" * 100_000 + b"\n", "not JSON"),
    (["a", "list"], "expected a JSON object, got list"),
    ({"question": "Q", "answer": "A"}, "no context"),
    ({"context": "C", "answer": "A"}, "no question"),
    ({"context": "C", "question": "Q"}, "no answer"),
    (qa(" \n"), "empty context"),
    (qa("C", "  "), "empty question"),
    (qa("C", "Q", ""), "empty answer"),
    (qa("C", "Q", ["A", " "]), "empty answer"),
    (qa("C", "Q", []), "no answer"),
    (qa("C", "Q", 42), "answer must be text, got int"),
    (qa(42), "context must be text, got int"),
    (qa("C") | {"title": "T\0"}, "a NUL character in title"),
    (qa("nul \0 byte"), "a NUL character in context"),
    (b'{"context": "C", "question": "\\ud800", "answer": "A"}\n', "an unpaired surrogate in question"),
]


@pytest.mark.parametrize(("line", "what"), BROKEN, ids=[what.replace(" ", "-") for _, what in BROKEN])
def test_broken_line_is_raised_or_skipped_with_its_number(tmp_path: Path, line: Any, what: str) -> None:
    path = put(tmp_path / "x.jsonl", qa("A"), b"\n", line, qa("B"))
    with pytest.raises(BrokenLineError) as caught:
        list(read_examples(path))
    assert what in caught.value.what
    assert caught.value.where == f"{path}, line 3"
    assert "on_error" in str(caught.value.next_step)
    said: list[str] = []
    assert [e.context for e in read_examples(path, on_error="skip", on_skip=said.append)] == ["A", "B"]
    assert len(said) == 1
    assert what in said[0]
    assert "line 3" in said[0]


def test_lines_before_a_broken_line_are_yielded_first(tmp_path: Path) -> None:
    examples = read_examples(put(tmp_path / "x.jsonl", qa("A"), qa("B"), b"{\n"))
    assert next(examples).context == "A"


def test_file_without_a_readable_example_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no readable example in it; 1 broken"):
        list(read_examples(put(tmp_path / "x.jsonl", qa("")), on_error="skip"))
    with pytest.raises(DatasetError, match="no readable example"):
        list(read_examples(put(tmp_path / "empty.jsonl")))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_truncated_or_damaged_gzip_file_is_an_error(tmp_path: Path, on_error: Any) -> None:
    whole = put(tmp_path / "x.jsonl.gz", *(qa(f"context {i}") for i in range(500))).read_bytes()
    for damaged in (whole[:-40], b"no gzip", whole[:60] + b"\0" * 40 + whole[100:]):
        (tmp_path / "y.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DatasetError, match="cannot be read"):
            list(read_examples(tmp_path / "y.jsonl.gz", on_error=on_error))


# --- SQuAD ---


def test_squad_paragraph_becomes_one_example_with_distinct_answers(tmp_path: Path) -> None:
    fox = {
        "context": " Foxes run. ",
        "qas": [
            {"id": "1", "question": "Who?", "answers": [{"text": "Foxes"}, {"text": "foxes "}, {"text": "Foxes"}]},
            {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
        ],
    }
    cat = {"context": "Cats sit.", "qas": [{"id": "3", "question": "Who?", "answers": [{"text": "Cats"}]}]}
    unanswerable = {"context": "Mute.", "qas": [{"id": "4", "question": "?", "answers": [], "is_impossible": True}]}
    put(tmp_path / "squad" / "dev.json.gz", squad(fox, cat, unanswerable))
    first, second = read_examples("squad", split="dev", data=tmp_path)
    assert (first.context, first.title, first.source) == ("Foxes run.", "Foxes", "squad")
    assert [(q.text, q.answers) for q in first.questions] == [("Who?", ("Foxes", "foxes"))]
    assert second.context == "Cats sit."
    by_path = list(read_examples(tmp_path / "squad" / "dev.json.gz"))
    assert [e.questions for e in by_path] == [first.questions, second.questions]


def test_squad_broken_question_is_skipped_within_its_paragraph(tmp_path: Path) -> None:
    good = {"id": "1", "question": "Who?", "answers": [{"text": "Cats"}]}
    bad = {"id": "2", "question": "Why?", "answers": [{"text": " "}]}
    put(
        tmp_path / "squad" / "dev.json", squad({"context": "", "qas": [good]}, {"context": "Cats.", "qas": [bad, good]})
    )
    said: list[str] = []
    found = list(read_examples("squad", split="dev", data=tmp_path, on_error="skip", on_skip=said.append))
    assert [(e.context, len(e.questions)) for e in found] == [("Cats.", 1)]
    assert [("empty context" in s, "empty answer" in s) for s in said] == [(True, False), (False, True)]
    assert "article 1, paragraph 1" in said[0]
    assert "paragraph 2, question 1]" in said[1]
    with pytest.raises(BrokenLineError, match="empty context"):
        list(read_examples("squad", split="dev", data=tmp_path))


@pytest.mark.parametrize("content", [[1], {"data": 3}, {"data": [7]}, {"data": [{"paragraphs": [None]}]}])
def test_squad_with_an_unexpected_structure_is_an_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(BrokenLineError, match=r"no list of|must be a list|no context"):
        list(read_examples(put(tmp_path / "x.json", content)))


def test_json_lines_named_json_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"not JSON.*\.jsonl"):
        list(read_examples(put(tmp_path / "x.json", qa("A"), qa("B"))))


# --- the other named sets ---


def test_dolly_yields_only_rows_with_a_context(tmp_path: Path) -> None:
    def row(context: str | None, response: str = "R") -> dict[str, Any]:
        return {"instruction": "Sum up.", "context": context, "response": response, "category": "summarization"}

    path = put(
        tmp_path / "dolly" / "dolly-15k.jsonl.gz", row(""), row("Text."), row(" \n"), row(None), row("More.", "")
    )
    said: list[str] = []
    (example,) = read_examples("dolly", data=tmp_path, on_error="skip", on_skip=said.append)
    assert (example.context, example.questions[0].text, example.questions[0].answers) == ("Text.", "Sum up.", ("R",))
    assert [s.split("]")[0] for s in said] == [f"empty response [{path}, line 5"]


def test_fairytaleqa_yields_one_example_per_group_of_sections(tmp_path: Path) -> None:
    story = {
        "story_name": "snow-man",
        "sections": [{"section": str(n), "text": f"Section {n}."} for n in (1, 2, 4)],
        "questions": [
            {"cor_section": "4", "question": "Q1?", "answer1": "a", "answer4": "b"},
            {"cor_section": "1, 4", "question": "Q2?", "answer1": "c", "answer2": "c "},
            {"cor_section": "4", "question": "Q3?", "answer2": "d"},
            {"cor_section": "3", "question": "Q4?", "answer1": "e"},
            {"cor_section": "1", "question": "Q5?"},
        ],
    }
    put(tmp_path / "fairytaleqa" / "val.jsonl.gz", story)
    said: list[str] = []
    found = list(read_examples("fairytaleqa", split="dev", data=tmp_path, on_error="skip", on_skip=said.append))
    assert [(e.id, e.context) for e in found] == [
        ("fairytaleqa/snow-man/4", "Section 4."),
        ("fairytaleqa/snow-man/1+4", "Section 1.\n\nSection 4."),
    ]
    assert [q.answers for e in found for q in e.questions] == [("a", "b"), ("d",), ("c",)]
    assert "line 1, question 4" in said[0]
    assert "['3']" in said[0]
    assert said[1].startswith("no answer")


def test_squality_question_has_four_references(tmp_path: Path) -> None:
    def asked(*responses: str) -> dict[str, Any]:
        return {"question_text": "What is the plot?", "responses": [{"response_text": r} for r in responses]}

    story = {
        "metadata": {"passage_id": "7"},
        "document": "\n\n TITLE \n \n\n\n It   began.\n  And ended. \n",
        "questions": [asked("a", "b ", "c", "d"), asked("a", " ")],
    }
    put(tmp_path / "squality" / "train.jsonl.gz", story)
    (example,) = read_examples("squality", data=tmp_path, on_error="skip")
    assert (example.id, example.context) == ("squality/7", "TITLE\n\nIt   began.\nAnd ended.")
    assert [q.answers for q in example.questions] == [("a", "b", "c", "d")]


def test_quality_keeps_choices_and_the_correct_one(tmp_path: Path) -> None:
    def line(article: str, label: Any) -> dict[str, Any]:
        text = "<p>A &lt;b&gt; &amp; c.</p>\n 1 < 2"
        return {
            "article_id": article,
            "article": text,
            "question": "Q?",
            "options": ["x", "y &amp; z"],
            "gold_label": label,
        }

    lines = [line("1", 1), line("1", 0), line("2", 0), line("3", 2), line("3", True), line("3", None)]
    put(tmp_path / "quality" / "dev_sample.jsonl.gz", *lines)
    said: list[str] = []
    one, two = read_examples("quality", split="dev", data=tmp_path, on_error="skip", on_skip=said.append)
    assert (one.id, one.context, len(one.questions)) == ("quality/1", "A <b> & c.\n1 < 2", 2)
    assert (one.questions[0].choices, one.questions[0].correct) == (("x", "y & z"), 1)
    assert one.questions[0].answers == ("y & z",)
    assert (two.id, len(said)) == ("quality/2", 3)
    assert all("gold_label must be an index of one of 2 options" in s for s in said)


# --- plain text ---


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.md").write_text("# Anchors\n\nThey hold.\n")
    (folder / "b.txt").write_text("Boats float.")
    (folder / "LICENSE").write_text("free")
    (folder / ".hidden.md").write_text("secret")
    return folder


def as_archive(folder: Path, name: str) -> Path:
    path = folder.parent / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(folder, arcname=".")
    return path


WANTED = {("handbook/sub/a.md", "Anchors", "# Anchors\n\nThey hold."), ("handbook/b.txt", "b", "Boats float.")}


def test_a_folder_gives_examples_without_questions(corpus: Path) -> None:
    found = list(read_examples(corpus))
    assert {(e.id, e.title, e.context) for e in found} == WANTED
    assert all(e.source == "handbook" and e.questions == () for e in found)


@pytest.mark.parametrize("name", ["handbook.tar.gz", "handbook.tgz", "handbook.tar"])
def test_archive_gives_the_same_examples_as_its_folder(corpus: Path, name: str) -> None:
    archive = as_archive(corpus, name)
    assert {(e.id, e.title, e.context) for e in read_examples(str(archive))} == WANTED


def test_a_single_file_is_one_example(corpus: Path) -> None:
    (example,) = read_examples(corpus / "sub" / "a.md")
    assert (example.id, example.source, example.title) == ("a/a.md", "a", "Anchors")


def test_link_to_a_file_outside_the_folder_keeps_its_name(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.md").write_text("Far.")
    (corpus / "link.md").symlink_to(tmp_path / "elsewhere.md")
    assert "handbook/link.md" in {e.id for e in read_examples(corpus)}


@pytest.mark.parametrize("packed", [False, True])
def test_blank_or_binary_file_of_a_corpus_is_raised_or_skipped(corpus: Path, packed: bool) -> None:
    (corpus / "blank.md").write_text(" \n")
    (corpus / "noise.txt").write_bytes(b"\x00\x01")
    source = as_archive(corpus, "handbook.tar.gz") if packed else corpus
    with pytest.raises(DatasetError, match=r"blank\.md|noise\.txt"):
        list(read_examples(source))
    said: list[str] = []
    assert len(list(read_examples(source, on_error="skip", on_skip=said.append))) == 2
    assert sorted(("blank.md" in s, "noise.txt" in s) for s in said) == [(False, True), (True, False)]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_corpus_without_a_readable_file_is_an_error(tmp_path: Path, on_error: Any) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DatasetError, match=r"no readable file|no readable example"):
        list(read_examples(folder, on_error=on_error))
    with pytest.raises(DatasetError, match="no readable example"):
        list(read_examples(as_archive(folder, "pictures.tar.gz"), on_error=on_error))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_archive_is_an_error(corpus: Path, on_error: Any) -> None:
    (corpus / "long.txt").write_text("".join(f"line {i * 7919 % 10007}\n" for i in range(20_000)))
    archive = as_archive(corpus, "handbook.tar.gz")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DatasetError, match="cannot be read"):
        list(read_examples(archive, on_error=on_error))


# --- settings ---


def test_invalid_settings_are_refused_before_reading(tmp_path: Path) -> None:
    path: Any = put(tmp_path / "x.jsonl", qa("A"))
    bad: Any = "test"
    with pytest.raises(ConfigError, match="split"):
        read_examples(path, split=bad)
    with pytest.raises(ConfigError, match="on_error"):
        read_examples(path, on_error=bad)
    for source in ("", "  ", 3, None):
        wrong: Any = source
        with pytest.raises(ConfigError, match="source"):
            read_examples(wrong)
