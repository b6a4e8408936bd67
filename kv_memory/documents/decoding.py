"""From a file's bytes to its text: byte order marks, encodings, and bytes that are no text.

Encoding labels mean what browsers take them for (the WHATWG's Encoding Standard, by `webencodings`): `gb2312` is GBK,
`latin1` is windows-1252. Names that only Python knows (`cp437`, `utf-32-le`) are left to Python.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

import webencodings

from kv_memory.errors import ConfigError, UnreadableDocumentError

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

_REPLACED = "\ufffd"
# Number of valid characters beyond ASCII, for each invalid byte, from which a text is taken to be in an encoding. Text
# of another encoding is hardly ever valid UTF-8 by chance; other multi-byte encodings are less strict.
_VALID_IN_UTF8, _VALID_ELSEWHERE = 1, 10
_MAX_INVALID_SHARE = 0.01  # of the characters of a page that declares the encoding
_MAX_NUL_SHARE = 1e-3  # of the bytes of a page; a binary file has more


class Decoded(NamedTuple):
    r"""A text with newlines as `\n`, and remarks on what had to be replaced."""

    text: str
    notes: tuple[str, ...] = ()


def file_format(raw: bytes) -> str | None:
    """The binary format that the first bytes identify, e.g. `a PNG image`; None if they identify no format."""
    for signature, name in _SIGNATURES:
        if raw.startswith(signature):
            return name
    return "a PDF" if _PDF.match(raw) else None


def check_encoding(encoding: str) -> str:
    """Return `encoding` if it is the label or name of a text encoding.

    Raises:
        ConfigError: The name is unknown, or names a codec that does not turn bytes into text (`base64`).
    """
    try:
        # Not with empty bytes: Python decodes those without looking up the name.
        b" ".decode(_codec_of(encoding))
    except UnicodeError:  # a text codec in which one space is invalid, e.g. utf-16; before its base ValueError
        pass
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"unknown text encoding {encoding!r}",
            where="encoding",
            next_step="Use a name that browsers or Python know, e.g. utf-8, windows-1252, utf-16-le, shift_jis.",
        ) from error
    return encoding


def _codec_of(label: str) -> str:
    """Python's codec for an encoding label."""
    known = webencodings.lookup(label) or webencodings.lookup(codecs.lookup(label).name)
    return label if known is None else known.codec_info.name


def decode_text(raw: bytes, *, encoding: str, where: str, is_page: bool = False) -> Decoded:
    """Decode a file's bytes; a byte order mark overrides the given encoding and is removed.

    A few invalid bytes in a text that is otherwise in its encoding become U+FFFD, with a remark.

    Args:
        raw: All bytes of the file.
        encoding: Encoding of files without a byte order mark, see `check_encoding`.
        where: Name of the file, for errors.
        is_page: True for HTML, which may declare another encoding, used if the given one fails; a few NUL characters
            in it are replaced.

    Raises:
        UnreadableDocumentError: The bytes have a known binary format, such as an image or archive, or contain NUL
            characters; the bytes are not valid in the encoding; the message states the byte and line.
    """
    mark, codec = next(((m, c) for m, c in _MARKS if raw.startswith(m)), (b"", _codec_of(encoding)))
    kind = None if mark else file_format(raw)
    if kind is not None:
        raise UnreadableDocumentError(
            f"not text but {kind}",
            where=where,
            next_step="Give it the suffix .pdf." if kind == "a PDF" else "Convert it to text, Markdown, HTML or PDF.",
        )
    body = raw[len(mark) :]
    declared = _declared_codec(body) if is_page and not mark else None
    candidates = dict.fromkeys((codec, declared or codec))
    # 1. An encoding in which every byte is valid.
    errors: list[UnicodeError] = []
    for candidate in candidates:
        try:
            return _without_nuls(body.decode(candidate), raw, where, is_page=is_page)
        except UnicodeError as error:
            errors.append(error)
    # 2. An encoding in which nearly all are.
    for candidate in candidates:
        text = body.decode(candidate, "replace")
        n_replaced = text.count(_REPLACED)
        n_valid = sum(not character.isascii() for character in text) - n_replaced
        admitted = n_valid // (_VALID_IN_UTF8 if candidate == "utf-8" else _VALID_ELSEWHERE)
        if candidate == declared:
            admitted = max(admitted, int(len(text) * _MAX_INVALID_SHARE))
        if 0 < n_replaced <= admitted:
            noted = (f"{n_replaced} invalid byte(s) of {candidate} replaced by U+FFFD",)
            return _without_nuls(text, raw, where, is_page=is_page, notes=noted)
    if b"\0" in body and not codec.startswith(("utf-16", "utf-32")):
        raise _binary(raw.index(b"\0"), where)
    raise _undecodable(errors[0], body, codec, len(mark), where) from errors[0]  # of the one that the user can change


def _declared_codec(page: bytes) -> str | None:
    """Python's codec for the encoding that a page's `meta` element or XML declaration names; None without one."""
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(page, is_html=True)
    known = webencodings.lookup(declared) if declared else None
    if known is None:
        return None
    # As in browsers: a `meta` that could be read as ASCII cannot be in UTF-16.
    return "utf-8" if known.name.startswith("utf-16") else known.codec_info.name


def _without_nuls(text: str, raw: bytes, where: str, *, is_page: bool, notes: tuple[str, ...] = ()) -> Decoded:
    n_nuls = text.count("\0")
    if n_nuls:
        if not is_page or n_nuls > max(1, len(text) * _MAX_NUL_SHARE):
            raise _binary(raw.index(b"\0"), where)
        text, notes = text.replace("\0", _REPLACED), (*notes, f"{n_nuls} NUL character(s) replaced by U+FFFD")
    return Decoded(normalise_newlines(text), notes)


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
