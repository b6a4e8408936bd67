"""Readers of published sets in their original formats, and of the plain form `{context, question, answer}`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kv_memory.datasets.example import Example, Question, Row, content_id, grouped
from kv_memory.datasets.record_files import (
    Faults,
    Record,
    each,
    items_of,
    json_file,
    json_lines,
    text_of,
    texts_of,
    title_of,
)
from kv_memory.errors import DatasetError

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def read_qa(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read JSONL of `{context, question, answer}`; `answer` may be a list, and `title` is optional."""
    return grouped(each(json_lines(path, faults), qa_row, faults), source=source)


def qa_row(where: str, record: Any) -> Iterator[Row]:
    """Yield the row of `{context, question, answer}`, or of SQuAD's flat form, which has `answers`."""
    context, text = text_of(record, "context"), text_of(record, "question")
    answers = texts_of(record.get("answer", record.get("answers")), "answer")
    yield Row(context, Question(text=text, answers=answers), title_of(record))


def read_dolly(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read databricks-dolly-15k: rows with a context; instruction and response become question and answer."""
    return grouped(each(json_lines(path, faults), dolly_row, faults), source=source)


def dolly_row(where: str, record: Any) -> Iterator[Row]:
    """Yield the row of an instruction with a context; the others, most of the set, are skipped without a fault."""
    if str(record.get("context") or "").strip():
        question = Question(text=text_of(record, "instruction"), answers=(text_of(record, "response"),))
        yield Row(text_of(record, "context"), question)


def read_squad(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read SQuAD's nested JSON, one example per paragraph; the file is one JSON value, so all of it is in memory."""
    return each(_paragraphs(path, faults), partial(_paragraph, source=source, faults=faults), faults)


def _paragraphs(path: Path, faults: Faults) -> Iterator[Record]:
    """Yield `(article, paragraph)` for every paragraph of every article."""
    content = json_file(path)
    for place, article in enumerate(faults.items(str(path), partial(items_of, content, "data")), start=1):
        where = f"{path}, article {place}"
        paragraphs = faults.items(where, partial(items_of, article, "paragraphs"))
        for number, paragraph in enumerate(paragraphs, start=1):
            yield f"{where}, paragraph {number}", (article, paragraph)


def _paragraph(where: str, record: Any, *, source: str, faults: Faults) -> Iterator[Example]:
    article, paragraph = record
    context = text_of(paragraph, "context")
    questions: list[Question] = []
    for number, qa in enumerate(items_of(paragraph, "qas"), start=1):
        if isinstance(qa, dict) and qa.get("is_impossible"):
            continue  # version 2 has questions that the paragraph does not answer; they have no reference
        with faults.at(f"{where}, question {number}"):
            questions.append(Question(text=text_of(qa, "question"), answers=texts_of(qa.get("answers"), "answer")))
    if questions:
        yield Example(
            id=content_id(source, context),
            context=context,
            questions=tuple(questions),
            source=source,
            title=title_of(article),
        )


def read_fairytaleqa(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read FairytaleQA, one story per line: one example per section, or joined sections, with questions.

    Sections without questions are left out.
    """
    return each(json_lines(path, faults), partial(_story, source=source, faults=faults), faults)


def _story(where: str, record: Any, *, source: str, faults: Faults) -> Iterator[Example]:
    title = text_of(record, "story_name")
    sections = {text_of(section, "section"): text_of(section, "text") for section in items_of(record, "sections")}
    asked: dict[tuple[str, ...], list[Question]] = {}
    for number, qa in enumerate(items_of(record, "questions"), start=1):
        with faults.at(f"{where}, question {number}"):
            about = tuple(part.strip() for part in text_of(qa, "cor_section").split(","))
            if unknown := [section for section in about if section not in sections]:
                raise DatasetError(f"the question refers to sections {unknown}, which the story does not have")
            # answer1 to 3 are the wordings of one annotator, 4 to 6 of another; most questions have only some of them.
            names = [name for name in (f"answer{n}" for n in range(1, 7)) if name in qa]
            answers = texts_of([text_of(qa, name) for name in names], "answer")
            asked.setdefault(about, []).append(Question(text=text_of(qa, "question"), answers=answers))
    for about, questions in asked.items():
        yield Example(
            id=f"{source}/{title}/{'+'.join(about)}",
            context="\n\n".join(sections[section] for section in about),
            questions=tuple(questions),
            source=source,
            title=title,
        )


def read_squality(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read SQuALITY, one story per line: five questions that ask for summaries, with four references each."""
    return each(json_lines(path, faults), partial(_summarised, source=source, faults=faults), faults)


def _summarised(where: str, record: Any, *, source: str, faults: Faults) -> Iterator[Example]:
    passage = text_of(record.get("metadata"), "passage_id")
    context = _tidy(text_of(record, "document"))
    questions: list[Question] = []
    for number, asked in enumerate(items_of(record, "questions"), start=1):
        with faults.at(f"{where}, question {number}"):
            text = text_of(asked, "question_text")
            answers = texts_of([text_of(r, "response_text") for r in items_of(asked, "responses")], "response")
            questions.append(Question(text=text, answers=answers))
    if questions:
        yield Example(id=f"{source}/{passage}", context=context, questions=tuple(questions), source=source)


def read_quality(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read QuALITY's flat form, a multiple-choice question per line; neighbouring lines of an article are grouped."""
    return grouped(each(json_lines(path, faults), _choice, faults), source=source)


def _choice(where: str, record: Any) -> Iterator[Row]:
    options = tuple(html.unescape(text_of({"option": o}, "option")) for o in items_of(record, "options"))
    label = record.get("gold_label")
    # The flat form counts from 0; the authors' nested form, which is not supported, counts from 1.
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
        raise DatasetError(f"gold_label must be an index of one of {len(options)} options, got {label!r}")
    text = html.unescape(text_of(record, "question"))
    question = Question(text=text, answers=(options[label],), choices=options, correct=label)
    # Tags first, since an escaped `&lt;` is text.
    context = _tidy(html.unescape(_TAG.sub("", text_of(record, "article"))))
    yield Row(context, question, id=text_of(record, "article_id"))


def _tidy(text: str) -> str:
    """Remove white space left over from the stories' HTML: spaces around line breaks, and repeated blank lines.

    It carries no information and costs tokens: 2% of a story's characters, in some stories a sixth.
    """
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", text)).strip()
