"""The demo's documents, descriptions of packages installed beside this one, and questions with known answers."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from typing import NamedTuple

from kv_memory.documents import Document


class Question(NamedTuple):
    """A question, strings of which a right answer contains one (none if unknown), and the package it is about."""

    text: str
    accepted: tuple[str, ...] = ()
    package: str = ""


# Grouped by package, so that the first questions concern few packages. They were not selected by whether a model
# answers them correctly, from the text or from the cache.
QUESTIONS = (
    Question("Which statements can Alembic emit to a database?", ("ALTER", "ALTER TABLE"), "alembic"),
    Question("Of which library is the author of Alembic also the author?", ("SQLAlchemy",), "alembic"),
    Question("What is the licence of Alembic?", ("MIT",), "alembic"),
    Question("When was Beautiful Soup's support for Python 2 discontinued?", ("2020",), "beautifulsoup4"),
    Question("What was the final release of Beautiful Soup 4 to support Python 2?", ("4.9.3",), "beautifulsoup4"),
    Question("What kind of library is Beautiful Soup?", ("Screen-scraping", "scraping"), "beautifulsoup4"),
    Question("With which library does Jinja support I18N?", ("Babel",), "Jinja2"),
    Question("What can HTML templates of Jinja use to prevent XSS?", ("autoescaping", "autoescape"), "Jinja2"),
    Question("What are templates of Jinja compiled to?", ("Python code",), "Jinja2"),
    Question("Who is the author of bm25s?", ("Xing Han Lù", "Xing Han Lu"), "bm25s"),
    Question("In which search service is BM25 a core component?", ("Elasticsearch",), "bm25s"),
    Question("In which language is bm25s implemented?", ("Python",), "bm25s"),
)
PACKAGES = tuple(dict.fromkeys(question.package for question in QUESTIONS))

_LINK = re.compile(r"\[([^\[\]]*)\](?:\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\])|`([^`<>]+?)\s*<[^`<>]+>`__?")
_MARKUP = re.compile(
    r"(?m:^ *```.*?^ *``` *$)|<!--.*?-->|</?[a-zA-Z][^<>]*>|!\[[^\]]*\](?:\([^)]*\))?|\|[^|\n]{1,60}\|_?|<?\bhttps?://[^\s>)]+>?"
    r"|:[a-z:]+:(?=`)|\*{1,3}|`+_{0,2}|(?<!\w)_{1,3}|_{1,3}(?!\w)",
    re.DOTALL,
)


def package_documents(names: Sequence[str] = PACKAGES, *, max_chars: int = 900) -> list[Document]:
    """Metadata and the first paragraphs, of at most `max_chars` characters, of those packages that are installed."""
    documents = []
    for name in names:
        try:
            metadata = importlib.metadata.metadata(name).json
        except importlib.metadata.PackageNotFoundError:
            continue
        about = {key: value for key, value in metadata.items() if isinstance(value, str) and len(value) < 90}
        facts = [f"{name} is a Python package, version {about['version']}", about.get("summary", "").rstrip(".")]
        facts += [f"The author of {name} is {about['author'].rstrip('.')}"] if "author" in about else []
        licence = about.get("license_expression", about.get("license"))
        facts += [f"Its licence is {licence}"] if licence else []
        text = f"{'. '.join(filter(None, facts))}.\n\n{_prose(str(metadata.get('description', '')), max_chars)}"
        documents.append(Document(id=name, text=text, source_uri=f"https://pypi.org/project/{name}/"))
    return documents


def _prose(description: str, max_chars: int) -> str:
    """The first paragraphs of a description in Markdown or reStructuredText, without code, images, badges and links.

    A heuristic and not a parser: the result is input for a model, and a stray mark does no harm.
    """
    text = re.sub(r"(?m)^( *)(?:[*+•]|\d+[.)]) +", r"\1- ", description.replace("\r\n", "\n"))
    text = _MARKUP.sub("", _LINK.sub(r"\1\2", _LINK.sub(r"\1\2", text)))  # twice, because a link may hold a badge
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        items = re.split(r"\n *- +", f"\n{block}")
        paragraph = "\n- ".join(" ".join(item.split()).replace("\\", "") for item in items).strip()
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        # Shorter ones are headings, badges, and what comes before code.
        least_words = 12 if paragraph.endswith(":") else 6
        is_prose = len(paragraph.split()) >= least_words and letters > 0.85 * len(paragraph) and paragraph[-1] in ".!?:"
        if not is_prose or block.startswith(("    ", ".. ", "#", ">", "$", "|")):
            continue
        if sum(map(len, kept)) + len(paragraph) > max_chars:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def known_questions(documents: Sequence[Document], questions: Sequence[Question] = QUESTIONS) -> list[Question]:
    """The questions that these documents answer; the description of another release may lack an answer."""
    from kv_memory.evaluate.metrics import contains

    texts = {document.id: document.text for document in documents}
    return [asked for asked in questions if contains(texts.get(asked.package, ""), asked.accepted)]
