"""What the demo reads by default: the descriptions of Python packages that are installed beside this one.

They are texts nobody wrote for a demo, on every machine that has this package, and need no network. What `pip` shows of
a package comes first (summary, version, licence, author), then the prose of its description up to a limit.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from email.message import Message
from typing import Any, cast

from kv_memory.documents import Document

__all__ = ["PACKAGES", "package_documents", "prose_of"]

# Dependencies of this package, its own or of what it needs, whose descriptions have prose in them.
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
_LEAST_WORDS = 6  # of a paragraph; shorter ones are headings, badges and lists of links
_LEAST_CHARS = 200  # of a description; with less to say a package is left out

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
    """One document per package that is installed and has prose to say about itself, in the order of the names.

    Args:
        names: Of the packages, as on PyPI.
        max_chars: The longest text, in characters; cut at a paragraph border, else at the end of a sentence.
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

    A heuristic, not a parser: what remains is meant to be read by a model, and a stray mark does no harm.
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
        (_LINK, r"\1"),  # a badge that was a link leaves another one behind
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
            lead = f"{paragraph}\n\n"  # worth reading only if what it announces is
        else:
            yield lead + paragraph if paragraph.startswith("- ") else paragraph
            lead = ""


def _joined(lines: list[str]) -> str:
    """The lines of a block as one, apart from list items, which keep a line each; links without their text go."""
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
        # Some put the whole text of the licence there, or name everybody who ever helped.
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
