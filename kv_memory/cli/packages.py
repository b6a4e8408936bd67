"""The demo's default documents: the descriptions of Python packages that are installed beside this one.

These texts were not written for a demo, exist on every machine that has this package, and need no network. Each begins
with the metadata that `pip` shows (summary, version, licence, author), followed by the prose of the description up to a
limit.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from email.message import Message
from typing import Any, cast

from kv_memory.documents import Document

__all__ = ["PACKAGES", "package_documents", "prose_of"]

# Direct and indirect dependencies of this package with prose in their descriptions.
PACKAGES = (
    "alembic",
    "beautifulsoup4",
    "bm25s",
    "diskcache",
    "Jinja2",
    "Mako",
    "networkx",
    "numpy",
    "peft",
    "platformdirs",
    "pypdf",
    "regex",
    "rich",
    "SQLAlchemy",
    "tqdm",
    "typer",
)
_LEAST_WORDS = 6  # minimum length of a paragraph; shorter ones are headings, badges and lists of links
_LEAST_CHARS = 200  # minimum length of a description's prose; packages with less are left out

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1`*~* *$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_IMAGE = re.compile(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])?")
_LINK = re.compile(r"\[([^\[\]]*)\](\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\])")
_LINK_TARGET = re.compile(r"^ *\[[^\]]+\]:.*$", re.MULTILINE)
_RST_LINK = re.compile(r"`([^`<>]+?)\s*<[^`<>]+>`__?")
_RST_ROLE = re.compile(r":[a-z:]+:`([^`]+)`")
_RST_NAME = re.compile(r"`([^`]+)`__?")
_RST_BLOCK = re.compile(r"^( *)\.\. .*\n(?:(?:\1 +.*)?\n)*", re.MULTILINE)
_SUBSTITUTION = re.compile(r"\|[^|\n]{1,60}\|_?")
_URL = re.compile(r"<?\bhttps?://[^\s>)]+>?")
_UNDERLINE = re.compile(r"^ *([=\-~^*#.+])\1{2,} *$", re.MULTILINE)
_EMPHASIS = re.compile(r"(\*{1,3}|`+|(?<!\w)_{1,3}|_{1,3}(?!\w))")
_BULLET = re.compile(r"^ *(?:[-*+•]|\d+[.)]) +")


def package_documents(names: Iterable[str] = PACKAGES, *, max_chars: int = 900) -> list[Document]:
    """One document for each installed package with enough prose in its description, in the order of the names.

    Args:
        names: Names of the packages, as on PyPI.
        max_chars: Maximum length of the description's prose in characters; it is cut at the end of a paragraph, or
            else of a sentence.
    """
    documents = []
    for name in names:
        try:
            metadata = cast(Message, importlib.metadata.metadata(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        description = str(metadata.get("Description") or metadata.get_payload() or "")
        prose = _shortened(prose_of(description), max_chars)
        if len(prose) >= _LEAST_CHARS:
            about = {key: value for key, value in _about(metadata).items() if value}
            documents.append(
                Document(
                    id=str(metadata["Name"]),
                    text=f"{_heading(about)}\n\n{prose}",
                    source_uri=f"https://pypi.org/project/{name}/",
                    metadata=about,
                )
            )
    return documents


def prose_of(description: str) -> str:
    """The paragraphs of a Markdown or reStructuredText description, without code, images, badges and links.

    This is a heuristic and not a parser: the result is input for a model, and a stray mark does no harm.
    """
    text = description.replace("\r\n", "\n").expandtabs(4)
    for pattern, by in (
        (_FENCE, "\n"),
        (_COMMENT, ""),
        (_IMAGE, ""),
        (_LINK_TARGET, ""),
        (_RST_BLOCK, "\n"),
        (_UNDERLINE, ""),
        (_TAG, ""),
        (_LINK, r"\1"),
        (_LINK, r"\1"),  # twice, because links may be nested, e.g. around a badge
        (_RST_LINK, r"\1"),
        (_RST_ROLE, r"\1"),
        (_RST_NAME, r"\1"),
        (_SUBSTITUTION, ""),
        (_URL, ""),
    ):
        text = pattern.sub(by, text)
    return "\n\n".join(_paragraphs(text))


def _paragraphs(text: str) -> Iterable[str]:
    code_follows, lead = False, ""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or lines[0].lstrip().startswith((">", "$", "|", "+-")):
            continue
        if code_follows and all(line.startswith("  ") for line in lines):
            continue  # the literal block announced by `::`; several may follow each other
        code_follows = lines[-1].rstrip().endswith("::")
        if lines[0].startswith("    "):
            continue  # an indented code block
        paragraph = _joined(lines)
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        if len(paragraph.split()) < _LEAST_WORDS or letters < 0.85 * len(paragraph) or paragraph[-1] not in ".!?:":
            lead = ""
        elif paragraph.endswith(":"):
            lead = f"{paragraph}\n\n"  # kept only if the list that it announces is
        else:
            yield lead + paragraph if paragraph.startswith("- ") else paragraph
            lead = ""


def _joined(lines: list[str]) -> str:
    """The lines of a block joined into one, except list items, which keep their own line.

    List items that contain nothing but a label (the label of a removed link) are dropped.
    """
    joined = ""
    for line in lines:
        if not line.lstrip().startswith("#"):
            joined += ("\n- " if _BULLET.match(line) else " ") + _BULLET.sub("", line).strip()
    joined = re.sub(r"[ \t]{2,}", " ", _EMPHASIS.sub("", joined)).replace("::", ":").replace("\\", "")
    joined = re.sub(r" +([.,;:!?)])(?=\s|$)", r"\1", joined)
    return "\n".join(line for line in joined.split("\n") if not re.fullmatch(r"- .{0,40}:", line)).strip()


def _shortened(text: str, max_chars: int) -> str:
    kept = ""
    for paragraph in text.split("\n\n"):
        if len(kept) + len(paragraph) > max_chars:
            if not kept:
                kept = paragraph[: paragraph.rfind(". ", 0, max_chars) + 1]
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept


def _about(metadata: Message) -> dict[str, Any]:
    licence = str(metadata.get("License-Expression") or metadata.get("License") or "").strip()
    author = str(metadata.get("Author") or "").strip().rstrip(".")
    return {
        "name": str(metadata["Name"]),
        "version": str(metadata["Version"]),
        "summary": str(metadata.get("Summary") or "").strip().rstrip("."),
        # Some packages put the whole licence text here, or name all contributors.
        "licence": licence if len(licence) < 40 else "",
        "author": author if len(author) < 60 else "",
        "requires_python": str(metadata.get("Requires-Python") or ""),
    }


def _heading(about: dict[str, Any]) -> str:
    text = f"{about['name']} is a Python package, version {about['version']}."
    if "summary" in about:
        text += f" {about['summary']}."
    if "author" in about:
        text += f" The author of {about['name']} is {about['author']}."
    if "licence" in about:
        text += f" Its licence is {about['licence']}."
    return text
