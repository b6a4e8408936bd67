"""Rows of published sets in their original formats, and of the plain form `{context, question, answer}`.

Each function yields the rows of one record: one question each, with its document. Faults of the record are raised
before its first row; those of a question are reported, and the others are still yielded.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from kv_memory.datasets.example import Question, Row
from kv_memory.datasets.record_files import Faults, items_of, text_of, texts_of, title_of
from kv_memory.errors import DatasetError

RowMaker = Callable[[str, Any, Faults], Iterator[Row]]

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def question_of(record: Any) -> Question:
    """The question of `{question, answer}` or `{question, answers}`; the answers are a text or a list."""
    text = text_of(record, "question")
    return Question(text=text, answers=texts_of(record.get("answer", record.get("answers")), "answer"))


def qa_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the row of `{context, question, answer}`, or of SQuAD's flat form; `title` is optional."""
    yield Row(text_of(record, "context"), question_of(record), title_of(record))


def dolly_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the row of an instruction with a context; the others, most of the set, are skipped without a fault."""
    if str(record.get("context") or "").strip():
        question = Question(text=text_of(record, "instruction"), answers=(text_of(record, "response"),))
        yield Row(text_of(record, "context"), question)


def squad_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the rows of SQuAD's nested JSON: articles with paragraphs with questions."""
    for at_article, article in faults.parts(where, record, "data", "article"):
        for at, paragraph in faults.parts(at_article, article, "paragraphs", "paragraph"):
            with faults.at(at):
                context, title = text_of(paragraph, "context"), title_of(article)
                for at_question, qa in faults.parts(at, paragraph, "qas", "question"):
                    # Version 2 has questions that the paragraph does not answer; they have no reference.
                    if not (isinstance(qa, dict) and qa.get("is_impossible")):
                        with faults.at(at_question):
                            yield Row(context, question_of(qa), title, place=at)


def fairytale_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the rows of a story of FairytaleQA, about a section or joined sections, and grouped by them."""
    title = text_of(record, "story_name")
    sections = {text_of(section, "section"): text_of(section, "text") for section in items_of(record, "sections")}
    rows: dict[str, list[Row]] = {}
    for at_question, qa in faults.parts(where, record, "questions", "question"):
        with faults.at(at_question):
            about = [part.strip() for part in text_of(qa, "cor_section").split(",")]
            if unknown := [section for section in about if section not in sections]:
                raise DatasetError(f"the question refers to sections {unknown}, which the story does not have")
            # answer1 to 3 are the wordings of one annotator, 4 to 6 of another; most questions have only some of them.
            names = [name for name in (f"answer{n}" for n in range(1, 7)) if name in qa]
            answers = texts_of([text_of(qa, name) for name in names], "answer")
            question = Question(text=text_of(qa, "question"), answers=answers)
            id = f"{title}/{'+'.join(about)}"
            rows.setdefault(id, []).append(Row("\n\n".join(map(sections.__getitem__, about)), question, title, id))
    yield from chain.from_iterable(rows.values())


def squality_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the rows of a story of SQuALITY: five questions that ask for summaries, with four references each."""
    passage = text_of(record.get("metadata"), "passage_id")
    context = _tidy(text_of(record, "document"))
    for at_question, asked in faults.parts(where, record, "questions", "question"):
        with faults.at(at_question):
            text = text_of(asked, "question_text")
            answers = texts_of([text_of(r, "response_text") for r in items_of(asked, "responses")], "response")
            yield Row(context, Question(text=text, answers=answers), id=passage)


def quality_rows(where: str, record: Any, faults: Faults) -> Iterator[Row]:
    """Yield the row of QuALITY's flat form: a multiple-choice question."""
    choices = tuple(html.unescape(text_of({"option": o}, "option")) for o in items_of(record, "options"))
    label = record.get("gold_label")
    # The flat form counts from 0; the authors' nested form, which is not supported, counts from 1.
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise DatasetError(f"gold_label must be an index of one of {len(choices)} options, got {label!r}")
    text = html.unescape(text_of(record, "question"))
    question = Question(text=text, answers=(choices[label],), choices=choices, correct=label)
    # Tags first, since an escaped `&lt;` is text.
    context = _tidy(html.unescape(_TAG.sub("", text_of(record, "article"))))
    yield Row(context, question, id=text_of(record, "article_id"))


def _tidy(text: str) -> str:
    """Remove white space left over from the stories' HTML: spaces around line breaks, and repeated blank lines.

    It carries no information and costs tokens: 2% of a story's characters, in some stories a sixth.
    """
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", text)).strip()
