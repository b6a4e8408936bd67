"""Parsers from one file to plain text: text, Markdown, reStructuredText, HTML and PDF.

A parser takes the file's bytes and returns its text and metadata, with remarks on what was lost. Its library may raise
anything: what comes out is an error of ours, so that one file never ends a run.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kv_memory.documents.decoding import decode_text, file_format, normalise_newlines
from kv_memory.documents.splitter import FENCE
from kv_memory.errors import EmptyDocumentError, UnreadableDocumentError

if TYPE_CHECKING:
    from pypdf import PdfReader

FILE_TYPES: Mapping[str, str] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".rst": "rst",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
}

_ATX_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*)")
_UNDERLINE = {
    "markdown": re.compile(r" {0,3}([=-])\1{2,}[ \t]*$"),
    "rst": re.compile(r"([=\-~^\"'`#*+:._])\1{2,}[ \t]*$"),
}
_FRONT_MATTER = re.compile(r"---\n(.*?\n)(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:(.*)$", re.MULTILINE)
# A picture or font that is embedded in a text: its bytes are no words.
_EMBEDDED = re.compile(r"data:[\w.+-]{1,80}/[\w.+-]{1,80}(?:;[\w.+=-]{1,80})*,[\w+/=%-]{64,}", re.ASCII)
# A page with less text than this share of its bytes, and fewer characters than this, has lost its text to scripts.
_MIN_TEXT_SHARE, _FEW_CHARACTERS = 0.01, 1000
_FEW_ON_PAGE = 20  # characters a page of a PDF


class Content(NamedTuple):
    r"""The content of a file.

    Attributes:
        text: Text, with newlines as `\n`.
        metadata: `file_type`, and `title` and `n_pages` if known.
        notes: Remarks on what was replaced or lost.
    """

    text: str
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_content(raw: bytes, *, suffix: str, encoding: str, where: str) -> Content:
    """Turn a file's bytes into text.

    Args:
        raw: All bytes of the file.
        suffix: Suffix of the file name with the dot, e.g. `.md`. A file with an unknown suffix is parsed as PDF if its
            bytes begin like one, and otherwise as text.
        encoding: Encoding of text files. An HTML page may declare its own, which is used if this one fails.
        where: Name of the file, for errors.

    Raises:
        UnreadableDocumentError: The bytes are not text, or not valid in `encoding`; a PDF is encrypted or broken, or
            the parser rejects an HTML page.
        EmptyDocumentError: A PDF or HTML page contains no text.
    """
    file_type = FILE_TYPES.get(suffix.lower())
    if file_type == "pdf" or (file_type is None and file_format(raw) == "a PDF"):
        return _read_pdf(raw, where)
    if file_type == "html":
        return _read_html(raw, encoding, where)
    try:
        decoded = decode_text(raw, encoding=encoding, where=where)
    except UnreadableDocumentError as error:
        if file_type is not None or not isinstance(error.__cause__, UnicodeError):
            raise
        raise UnreadableDocumentError(
            f"a file {f'of unknown type {suffix}' if suffix else 'without a suffix'}, and {error.what}",
            where=where,
            next_step=f"Convert it to one of {', '.join(FILE_TYPES)}. If it is text, name its encoding: `encoding=` in "
            "Python, `--encoding` in the shell.",
        ) from error
    text, n_embedded = _EMBEDDED.subn("", decoded.text)
    notes = (*decoded.notes, f"{n_embedded} embedded file(s) left out") if n_embedded else decoded.notes
    title = _first_heading(text, file_type) if file_type in {"markdown", "rst"} else ""
    return _content(text, title, notes, file_type=file_type or "text")


def _content(text: str, title: str, notes: tuple[str, ...], **metadata: Any) -> Content:
    return Content(text, {**metadata, "title": title} if title else metadata, notes)


def _first_heading(text: str, file_type: str) -> str:
    """The title of the front matter, or the first heading outside fenced code, or an empty text."""
    if front := _FRONT_MATTER.match(text):
        if title := _FRONT_TITLE.search(front[1]):
            return _unquoted(title[1].strip())
        text = text[front.end() :]
    underline, markdown = _UNDERLINE[file_type], file_type == "markdown"
    fence, previous = "", ""
    for line in text.split("\n"):
        mark = FENCE.match(line) if markdown else None
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
        elif mark:
            fence = mark[1]
        elif markdown and (heading := _ATX_HEADING.match(line)) and heading[1].strip():
            return heading[1].rstrip().rstrip("#").rstrip()
        elif previous and underline.match(line) and not underline.match(previous):
            return previous
        previous = "" if fence else line.strip()
    return ""


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _read_html(raw: bytes, encoding: str, where: str) -> Content:
    from kv_memory.documents.pages import read_page

    decoded = decode_text(raw, encoding=encoding, where=where, is_page=True)
    try:
        title, text = read_page(_EMBEDDED.sub("", decoded.text))
    except Exception as error:
        raise UnreadableDocumentError(
            f"not readable HTML: {error or type(error).__name__}",
            where=where,
            next_step="Save the page again, or as text or PDF.",
        ) from error
    scripts = "If scripts generate its text, save the page from a browser as displayed, or as PDF."
    if not text:
        raise EmptyDocumentError("the page contains no text", where=where, next_step=scripts)
    notes = decoded.notes
    if len(text) < min(len(raw) * _MIN_TEXT_SHARE, _FEW_CHARACTERS):
        notes = (*notes, f"{len(text):,} characters of text in {len(raw):,} bytes of HTML. {scripts}")
    return _content(text, title, notes, file_type="html")


def _read_pdf(raw: bytes, where: str) -> Content:
    from pypdf import PdfReader

    try:
        reader = PdfReader(io.BytesIO(raw), strict=False)
        # Many files only have an owner's password, against printing; the empty password opens those.
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
        title = "" if locked else _pdf_title(reader)
    except Exception as error:  # on broken files, pypdf raises ValueError, KeyError, RecursionError and others
        raise UnreadableDocumentError(
            f"not a readable PDF: {error or type(error).__name__}",
            where=where,
            next_step="Open it in a PDF viewer and save it again, or convert it to text.",
        ) from error
    if locked:
        raise UnreadableDocumentError(
            "the PDF is encrypted", where=where, next_step="Save a copy without a password and read that."
        )
    # Fonts without a proper character map yield NULs and lone surrogates, which cannot be stored or tokenised.
    text = "\n\n".join(page.strip() for page in pages).replace("\0", "").encode("utf-8", "replace").decode()
    ocr = "Run text recognition (OCR) over it first, e.g. `ocrmypdf in.pdf out.pdf`."
    if not text.strip():
        raise EmptyDocumentError(
            f"the PDF has {len(pages)} page(s) and no text; it was probably scanned", where=where, next_step=ocr
        )
    few = len(text) < _FEW_ON_PAGE * len(pages)
    notes = (
        (f"{len(text):,} characters of text on {len(pages):,} pages. Most were probably scanned: {ocr}",) if few else ()
    )
    return _content(normalise_newlines(text), title, notes, file_type="pdf", n_pages=len(pages))


def _pdf_title(reader: PdfReader) -> str:
    title = reader.metadata.title if reader.metadata else None
    return " ".join(str(title or "").replace("\0", "").encode("utf-8", "replace").decode().split())
