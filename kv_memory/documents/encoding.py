"""Bytes to text: byte order marks, the given encoding, and the refusal of bytes that are not text."""

from __future__ import annotations

import codecs
import re

from kv_memory.errors import ConfigError, UnreadableDocumentError

__all__ = [
    "DEFAULT_MAX_LINE_BYTES",
    "check_encoding",
    "check_lines",
    "decode_text",
    "file_format",
    "normalise_newlines",
]

DEFAULT_MAX_LINE_BYTES = 1 << 20

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


def file_format(raw: bytes) -> str | None:
    """The binary format that the first bytes identify, e.g. `a PNG image`; None if they identify no format."""
    for signature, name in _SIGNATURES:
        if raw.startswith(signature):
            return name
    return "a PDF" if _PDF.match(raw) else None


def check_encoding(encoding: str) -> str:
    """Return `encoding` if Python decodes text with it.

    Raises:
        ConfigError: The name is unknown, or names a codec that does not turn bytes into text (`base64`).
    """
    try:
        # Not with empty bytes: Python decodes those without looking up the name.
        b" ".decode(encoding)
    except UnicodeError:  # a text codec in which one space is invalid, e.g. utf-16; before its base ValueError
        pass
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"unknown text encoding {encoding!r}",
            where="encoding",
            next_step="Use a name that Python knows, e.g. utf-8, cp1252, utf-16-le, shift_jis.",
        ) from error
    return encoding


def decode_text(raw: bytes, *, encoding: str, where: str) -> str:
    """Decode a file's bytes; a byte order mark overrides the given encoding and is removed.

    Args:
        raw: All bytes of the file.
        encoding: Encoding of files without a byte order mark.
        where: Name of the file, for errors.

    Returns:
        The text, with its newlines unchanged.

    Raises:
        UnreadableDocumentError: The bytes have a known binary format, such as an image or archive, or contain NUL
            characters; the bytes are not valid in the encoding; the message states the byte and line.
    """
    mark, codec = next(((m, c) for m, c in _MARKS if raw.startswith(m)), (b"", encoding))
    kind = None if mark else file_format(raw)
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


def check_lines(text: str, *, max_line_bytes: int, where: str) -> None:
    """Refuse lines of more than `max_line_bytes` bytes of UTF-8.

    Raises:
        UnreadableDocumentError: A line is too long; the message states the first one and its length.
    """
    if len(text) * 4 <= max_line_bytes:  # no character takes more than 4 bytes
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) * 4 <= max_line_bytes:
            continue
        size_bytes = len(line.encode("utf-8", "surrogatepass"))
        if size_bytes > max_line_bytes:
            raise UnreadableDocumentError(
                f"line {number} has {size_bytes:,} bytes, the limit is {max_line_bytes:,}",
                where=where,
                next_step="Leave it out if it is data. If it is prose, break its lines or raise `max_line_bytes`.",
            )
