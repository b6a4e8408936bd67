"""Example and Question: one form for every set, checked when made; and rows gathered into examples."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kv_memory.errors import ConfigError

__all__ = ["Example", "Question", "Row", "check_text", "content_id", "grouped"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a document.

    Attributes:
        text: The question, or an instruction such as a request for a summary.
        answers: References written by people; at least one, none blank.
        choices: All choices of a multiple-choice question; empty for other questions.
        correct: Index of the right one in `choices`; None for other questions.

    Raises:
        ConfigError: A text is blank or no text, there is no answer, or `choices` and `correct` do not fit together.
    """

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    correct: int | None = None

    def __post_init__(self) -> None:
        check_text(self.text, "question")
        if not isinstance(self.answers, tuple) or not self.answers:
            raise ConfigError("a question needs a tuple of at least one answer", where="answers")
        for answer in self.answers:
            check_text(answer, "answer")
        for choice in self.choices:
            check_text(choice, "choice")
        # A bool is an int, and True would name the second choice.
        is_index = isinstance(self.correct, int) and not isinstance(self.correct, bool)
        if self.correct is None:
            fits = not self.choices
        else:
            fits = is_index and len(self.choices) > 1 and 0 <= self.correct < len(self.choices)
        if not fits:
            raise ConfigError(
                f"correct must be an index of one of at least two choices, or None where there are none; got "
                f"{self.correct!r} with {len(self.choices)} choices",
                where="correct",
            )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A document and what is asked about it.

    Attributes:
        id: Stable from run to run, and begins with `source`. Sets without ids of their own get the hash of the
            context, so the same id means the same document, wherever in the set and whichever file it is read from.
        context: The document, without white space around it.
        questions: In the order of the set; empty where the set is plain text.
        source: Name of the set, folder or file.
        title: Of the article, story or page, where known.

    Raises:
        ConfigError: `id`, `context` or `source` is blank, or `context` holds what no tokenizer or database takes.
    """

    id: str
    context: str
    questions: tuple[Question, ...]
    source: str
    title: str = ""

    def __post_init__(self) -> None:
        check_text(self.id, "id")
        check_text(self.source, "source")
        check_text(self.context, "context")


class Row(NamedTuple):
    """One question with the document it belongs to, as most sets store them."""

    context: str
    question: Question
    title: str = ""


def content_id(source: str, context: str) -> str:
    """`source/` and the first 16 hex digits of the context's sha256: 64 bits, enough for billions of documents."""
    return f"{source}/{hashlib.sha256(context.encode()).hexdigest()[:16]}"


def grouped(rows: Iterable[Row], *, source: str) -> Iterator[Example]:
    """Examples of consecutive rows about the same document.

    Only neighbours are gathered: gathering all would mean to hold the whole set. A document that comes again later
    makes another example with the same id.
    """
    for (context, title), group in itertools.groupby(rows, key=lambda row: (row.context, row.title)):
        questions = tuple(row.question for row in group)
        yield Example(id=content_id(source, context), context=context, questions=questions, source=source, title=title)


def check_text(value: object, name: str) -> None:
    """Refuse what is no text, is blank, or holds what neither tokenizers nor databases take.

    Raises:
        ConfigError: Says which, under this name.
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
        raise ConfigError(f"half a surrogate pair in {name}", where=name) from error
