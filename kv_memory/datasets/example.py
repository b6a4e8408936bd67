"""Example and Question: one form for every set, validated on creation; and the grouping of rows into examples."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from kv_memory.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a document.

    Attributes:
        text: Question, or an instruction such as a request for a summary.
        answers: Human reference answers; at least one, each of them not blank.
        choices: All choices of a multiple-choice question; empty for other questions.
        correct: Index of the correct choice in `choices`; None for other questions.

    Raises:
        ConfigError: A text is blank or not a str, there is no answer, or `choices` and `correct` are inconsistent.
    """

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    correct: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.answers, tuple) or not self.answers:
            raise ConfigError("a question needs a tuple of at least one answer", where="answers")
        for name, texts in {"question": (self.text,), "answer": self.answers, "choice": self.choices}.items():
            for text in texts:
                check_text(text, name)
        # By its type, because a bool is an int, and True would name the second choice.
        is_index = type(self.correct) is int and len(self.choices) > 1 and self.correct in range(len(self.choices))
        if not is_index and (self.correct is not None or self.choices):
            raise ConfigError(
                f"correct must be the index of one of at least two choices, or None without choices; got "
                f"{self.correct!r} with {len(self.choices)} choices",
                where="correct",
            )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A document and its questions.

    Attributes:
        id: Id that starts with `source` and is stable from run to run. In sets without ids it contains the hash of the
            context, so the same id means the same document, regardless of its position in the set and of the file.
        context: Text of the document, without white space around it.
        questions: Questions in the order of the set; empty for plain text.
        source: Name of the set, folder or file.
        title: Title of the article, story or page, if known.

    Raises:
        ConfigError: `id`, `context` or `source` is blank, or contains characters that no tokenizer or database accepts.
    """

    id: str
    context: str
    questions: tuple[Question, ...]
    source: str
    title: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "source", "context"):
            check_text(getattr(self, name), name)


class Row(NamedTuple):
    """One question with its document, the form in which most sets store them.

    `id` is empty if the document's text is to give one. `place` is the document's place in its file, if it is stored
    once for all its questions.
    """

    context: str
    question: Question
    title: str = ""
    id: str = ""
    place: str = ""


_document = attrgetter("context", "title", "id", "place")


def content_id(source: str, context: str) -> str:
    """`source/` and the first 16 hex digits of the context's sha256: 64 bits, enough for billions of documents."""
    return f"{source}/{hashlib.sha256(context.encode()).hexdigest()[:16]}"


def grouped(rows: Iterable[Row], *, source: str) -> Iterator[Example]:
    """Group consecutive rows about the same document into examples.

    Only neighbouring rows are grouped: grouping all of them would hold the whole set in memory. A document that appears
    again later yields another example with the same id.
    """
    for (context, title, id, _), group in itertools.groupby(rows, key=_document):
        name = f"{source}/{id}" if id else content_id(source, context)
        questions = tuple(row.question for row in group)
        yield Example(id=name, context=context, questions=questions, source=source, title=title)


def check_text(value: object, name: str) -> None:
    """Raise a ConfigError for a value that is not text or is blank.

    Characters that tokenizers and databases reject are refused too.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {type(value).__name__}", where=name)
    if not value.strip():
        raise ConfigError(f"empty {name}", where=name)
    if "\0" in value:
        raise ConfigError(f"a NUL character in {name}", where=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"an unpaired surrogate in {name}", where=name) from error
