"""The demo's default questions: about descriptions of packages, with answers that can be checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kv_memory.documents import Document

__all__ = ["QUESTIONS", "Question", "contains_any", "known_questions"]


@dataclass(frozen=True)
class Question:
    """A question of the demo.

    Args:
        text: Text of the question.
        accepted: Strings of which a right answer contains one, and the question none; empty if no answer is known.
        package: Package with the description that answers the question, if any.
    """

    text: str
    accepted: tuple[str, ...] = ()
    package: str = ""


# Grouped by package, so that the first questions concern few packages. Each is answered by the demo's text about the
# package. They were not selected by whether a model answers them correctly, from the text or from the cache.
QUESTIONS = (
    Question("Which statements can Alembic emit to a database?", ("ALTER", "ALTER TABLE"), "alembic"),
    Question("Of which library is the author of Alembic also the author?", ("SQLAlchemy",), "alembic"),
    Question("When was Beautiful Soup's support for Python 2 discontinued?", ("2020",), "beautifulsoup4"),
    Question("What was the final release of Beautiful Soup 4 to support Python 2?", ("4.9.3",), "beautifulsoup4"),
    Question("Who is the author of bm25s?", ("Xing Han Lù", "Xing Han Lu"), "bm25s"),
    Question("In which search service is BM25 a core component?", ("Elasticsearch",), "bm25s"),
    Question("Who is the author of diskcache?", ("Grant Jenks",), "diskcache"),
    Question("Which web framework is diskcache compatible with?", ("Django",), "diskcache"),
    Question("With which library does Jinja support I18N?", ("Babel",), "Jinja2"),
    Question("What can HTML templates of Jinja use to prevent XSS?", ("autoescaping", "autoescape"), "Jinja2"),
    Question("What does Mako's syntax compile into?", ("Python modules", "Python module"), "Mako"),
    Question("Name a templating language that Mako borrows from.", ("Django", "Cheetah", "Myghty", "Genshi"), "Mako"),
    Question("What is the licence of networkx?", ("BSD", "BSD-3-Clause"), "networkx"),
    Question("Who is the author of numpy?", ("Oliphant",), "numpy"),
    Question("What does PEFT stand for?", ("Parameter-Efficient Fine-Tuning",), "peft"),
    Question("With which library is PEFT integrated for managing different adapters?", ("Diffusers",), "peft"),
    Question("Between which operating systems does platformdirs handle the differences?", ("macOS",), "platformdirs"),
    Question("What is the licence of platformdirs?", ("MIT",), "platformdirs"),
    Question("Which CLI application uses pypdf to interact with PDFs?", ("pdfly",), "pypdf"),
    Question("Where should questions about pypdf be asked?", ("StackOverflow", "Stack Overflow"), "pypdf"),
    Question("Which lock does the regex module release?", ("GIL", "Global Interpreter Lock"), "regex"),
    Question("Which Unicode encoding does PyPy store strings as?", ("UTF-8",), "regex"),
    Question("Who is the author of rich?", ("Will McGugan",), "rich"),
    Question("Which version of Python does Rich require?", ("3.8", "3.8.0"), "rich"),
    Question("On which site is a video introduction to Rich?", ("calmcode", "calmcode.io"), "rich"),
    Question("What kind of patterns does SQLAlchemy provide?", ("persistence",), "SQLAlchemy"),
    Question("From which language does the name tqdm derive?", ("Arabic",), "tqdm"),
    Question("What is the shortcut for tqdm(range(N))?", ("trange", "trange(N)"), "tqdm"),
    Question("How large is the overhead of ProgressBar per iteration?", ("800ns", "800 ns", "800 nanoseconds"), "tqdm"),
    Question("What is Typer based on?", ("type hints",), "typer"),
)


def known_questions(documents: Iterable[Document]) -> list[Question]:
    """The questions that these documents answer; the description of another release may lack an answer."""
    texts = {document.id.lower(): document.text for document in documents}
    return [asked for asked in QUESTIONS if contains_any(texts.get(asked.package.lower(), ""), asked.accepted)]


def contains_any(text: str, wanted: Iterable[str]) -> bool:
    """Whether a text contains one of the strings, as whole words, ignoring case."""
    spaced = " ".join(text.split())
    return any(re.search(rf"(?<!\w){re.escape(string)}(?!\w)", spaced, re.IGNORECASE) for string in wanted)
