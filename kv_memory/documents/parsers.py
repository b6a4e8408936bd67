"""Parsers from one file to plain text: text, Markdown, reStructuredText, HTML and PDF.

A parser takes the file's bytes and returns its text and metadata. A byte order mark overrides the given encoding, and
bytes that are not text are refused. HTML becomes Markdown, because `split_passages` cuts at its headings and code
blocks. markdownify converts it; a converter of our own was rejected.
"""

from __future__ import annotations

import codecs
import io
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kv_memory.documents.splitter import FENCE
from kv_memory.errors import EmptyDocumentError, UnreadableDocumentError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
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

# UTF-32 before UTF-16: the little-endian mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# Only signatures that no text begins with, since an 8-bit encoding decodes any bytes. Formats that begin with plain
# letters (RIFF, ID3, GIF) are left to the check for NUL bytes.
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PK\x03\x04", "a ZIP archive (perhaps an office document)"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b\x08", "a gzip archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"\x7fELF", "an ELF program"),
    (b"\xca\xfe\xba\xbe", "a program or Java class"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document"),
    (b"SQLite format 3\x00", "an SQLite database"),
)
_PDF = re.compile(rb"%PDF-\d\.\d")

_ATX_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$")
_UNDERLINE = {
    "markdown": re.compile(r" {0,3}([=-])\1{2,}[ \t]*$"),
    "rst": re.compile(r"([=\-~^\"'`#*+:._])\1{2,}[ \t]*$"),
}
_FRONT_MATTER = re.compile(r"---\n(.*?\n)(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*([\"']?)(.+?)\1[ \t]*$", re.MULTILINE)
_NOT_PROSE = ["script", "style", "nav", "noscript", "template", "title"]


class Content(NamedTuple):
    r"""A file's text, with newlines as `\n`, and its metadata: `file_type`, and `title` and `n_pages` if known."""

    text: str
    metadata: dict[str, Any]


def read_content(raw: bytes, *, suffix: str, encoding: str, where: str) -> Content:
    """Turn all bytes of a file into text.

    A file with an unknown suffix (`.md` is one that is known) is parsed as PDF if its bytes begin like one, and
    otherwise as text. `encoding` is that of text files; an HTML page may declare its own, which is used if this one
    fails. `where` names the file in errors.

    Raises:
        UnreadableDocumentError: The bytes are not text, or not valid in `encoding`; a PDF is encrypted or broken, or
            the parser rejects an HTML page.
        EmptyDocumentError: A PDF or HTML page contains no text.
    """
    file_type = FILE_TYPES.get(suffix.lower())
    if file_type == "pdf" or (file_type is None and _format_of(raw) == "a PDF"):
        return _read_pdf(raw, where)
    if file_type == "html":
        return _read_html(_decode_html(raw, encoding, where), where)
    try:
        text = normalise_newlines(_decode(raw, encoding=encoding, where=where))
    except UnreadableDocumentError as error:
        if file_type is not None or not isinstance(error.__cause__, UnicodeError):
            raise
        raise UnreadableDocumentError(
            f"a file {f'of unknown type {suffix}' if suffix else 'without a suffix'}, and {error.what}",
            where=where,
            next_step=f"Convert it to one of {', '.join(FILE_TYPES)}. If it is text, name its encoding: `encoding=` in "
            "Python, `--encoding` in the shell.",
        ) from error
    title = _first_heading(text, file_type) if file_type in {"markdown", "rst"} else None
    return _content(text, title, file_type=file_type or "text")


def _format_of(raw: bytes) -> str | None:
    """The binary format that the first bytes identify, e.g. `a PNG image`; None if they identify no format."""
    for signature, name in _SIGNATURES:
        if raw.startswith(signature):
            return name
    return "a PDF" if _PDF.match(raw) else None


def _decode(raw: bytes, *, encoding: str, where: str) -> str:
    """Decode a file's bytes; a byte order mark overrides the given encoding and is removed."""
    mark, codec = next(((m, c) for m, c in _MARKS if raw.startswith(m)), (b"", encoding))
    kind = None if mark else _format_of(raw)
    if kind is not None:
        raise UnreadableDocumentError(
            f"not text but {kind}",
            where=where,
            next_step="Give it the suffix .pdf." if kind == "a PDF" else "Convert it to text, Markdown, HTML or PDF.",
        )
    body = raw[len(mark) :]
    try:
        text = body.decode(codec)
    except UnicodeError as error:
        if b"\0" in body and not codecs.lookup(codec).name.startswith(("utf-16", "utf-32")):
            raise _binary(raw.index(b"\0"), where) from None
        raise _undecodable(error, body, codec, len(mark), where) from error
    if "\0" in text:
        raise _binary(raw.index(b"\0"), where)
    return text


def _binary(offset: int, where: str) -> UnreadableDocumentError:
    return UnreadableDocumentError(
        f"a NUL byte at offset {offset}, so this is not text",
        where=where,
        next_step="Leave the file out. If it is UTF-16 without a byte order mark, pass `encoding='utf-16-le'` in "
        "Python or `--encoding utf-16-le` in the shell.",
    )


def _undecodable(
    error: UnicodeError, body: bytes, codec: str, n_mark_bytes: int, where: str
) -> UnreadableDocumentError:
    place = reason = ""
    if isinstance(error, UnicodeDecodeError):
        before = normalise_newlines(body[: error.start].decode(codec, "replace"))
        place = f" at byte offset {error.start + n_mark_bytes}, line {before.count(chr(10)) + 1}"
        reason = f": {error.reason}"
    return UnreadableDocumentError(
        f"not valid {codec}{place}{reason}",
        where=where,
        next_step="Name the file's encoding, e.g. cp1252: `encoding=` in Python, `--encoding` in the shell.",
    )


def normalise_newlines(text: str) -> str:
    r"""The text with `\r\n` and `\r` replaced by `\n`."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _content(text: str, title: str | None, **metadata: Any) -> Content:
    return Content(text, {**metadata, "title": title} if title else metadata)


def _first_heading(text: str, file_type: str) -> str | None:
    """The title of the front matter, or the first heading outside fenced code."""
    if front := _FRONT_MATTER.match(text):
        if title := _FRONT_TITLE.search(front[1]):
            return title[2]
        text = text[front.end() :]
    underline, markdown = _UNDERLINE[file_type], file_type == "markdown"
    fence, previous = "", ""
    for line in text.split("\n"):
        mark = FENCE.match(line) if markdown else None
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
        elif mark:
            fence = mark[1]
        elif markdown and (heading := _ATX_HEADING.match(line)):
            return heading[1]
        elif previous and underline.match(line) and not underline.match(previous):
            return previous
        previous = "" if fence else line.strip()
    return None


def _decode_html(raw: bytes, encoding: str, where: str) -> str:
    from bs4.dammit import EncodingDetector

    try:
        return _decode(raw, encoding=encoding, where=where)
    except UnreadableDocumentError as error:
        declared = EncodingDetector.find_declared_encoding(raw, is_html=True)
        if declared is None or not isinstance(error.__cause__, UnicodeError):
            raise
        try:
            # Browsers decode these names as cp1252, so pages that declare them are written in it.
            return raw.decode("cp1252" if declared.lower() in {"iso-8859-1", "latin-1", "us-ascii"} else declared)
        except (LookupError, UnicodeError):
            pass
        raise  # the error of the encoding the user can change


def _read_html(html: str, where: str) -> Content:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from bs4.exceptions import ParserRejectedMarkup

    try:
        with warnings.catch_warnings():
            # A page that looks like a file name, or like XML, is parsed all the same.
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
            soup = BeautifulSoup(html, "html.parser")
    except ParserRejectedMarkup as error:
        raise UnreadableDocumentError(
            f"not readable HTML: {error}", where=where, next_step="Save the page again, or as text or PDF."
        ) from error
    heading = soup.title or soup.find(["h1", "h2"])
    title = " ".join(heading.get_text(" ").split()) if heading else ""
    for tag in soup.find_all(_NOT_PROSE):
        tag.extract()  # decompose() would fail on a tag inside one already removed
    text = re.sub(r"[ \t]+\n", "\n", _to_markdown(soup).replace("\xa0", " "))
    text = re.sub(r"\n{3,}", "\n\n", normalise_newlines(text)).strip()
    if not text:
        raise EmptyDocumentError(
            "the page contains no text",
            where=where,
            next_step="If scripts generate its text, save the page from a browser as displayed, or as PDF.",
        )
    return _content(text, title, file_type="html")


def _to_markdown(soup: BeautifulSoup) -> str:
    from markdownify import ATX, MarkdownConverter

    # Link targets and images are dropped: they cost many tokens and carry little information.
    converter = MarkdownConverter(
        heading_style=ATX, bullets="-", strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    try:
        return converter.convert_soup(soup)
    except RecursionError:
        # Old pages leave <p> and <li> open, so the parser nests each in the previous one. Their text is still usable.
        return soup.get_text("\n")


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
    if not text.strip():
        raise EmptyDocumentError(
            f"the PDF has {len(pages)} page(s) and no text; it was probably scanned",
            where=where,
            next_step="Run text recognition (OCR) over it first, e.g. `ocrmypdf in.pdf out.pdf`.",
        )
    return _content(normalise_newlines(text), title, file_type="pdf", n_pages=len(pages))


def _pdf_title(reader: PdfReader) -> str:
    title = reader.metadata.title if reader.metadata else None
    return " ".join(str(title or "").replace("\0", "").encode("utf-8", "replace").decode().split())
