"""Documents, validated on creation, and loaders that make them of texts, files, folders, and mixtures of them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

from kv_memory.config import check_choice, check_name
from kv_memory.documents.decoding import check_encoding
from kv_memory.documents.parsers import FILE_TYPES, read_content
from kv_memory.errors import ConfigError, DocumentError, EmptyDocumentError, UnreadableDocumentError

MAX_LINE_BYTES = 1 << 20  # a longer line of UTF-8 is data, not prose
OnError = Literal["raise", "skip"]
_LONGEST_PATH = 4096


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text with a name.

    Attributes:
        id: Id of the document in its collection; adding the same id with another text replaces the document.
        text: Text, kept exactly as given.
        source_uri: Origin of the document, e.g. `file:///data/a.md`.
        metadata: JSON-serialisable values under str keys; a copy is kept.
        notes: Remarks on what the file's parser replaced or lost, for reports; `read_file` puts them into the metadata
            too, as `reader_notes`.

    Raises:
        EmptyDocumentError: `text` is blank.
        UnreadableDocumentError: `text` contains a NUL character, which neither SQL nor tokenizers accept; `text`
            contains an unpaired surrogate and cannot be encoded as UTF-8.
        ConfigError: `id` is blank or contains control characters, or `metadata` is not JSON-serialisable.
    """

    id: str
    text: str
    source_uri: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_name(self.id, where="id")
        if self.source_uri is not None:
            check_name(self.source_uri, where="source_uri")
        if not isinstance(self.text, str):
            raise ConfigError(f"text must be a str, got {type(self.text).__name__}", where=self.id)
        if not self.text.strip():
            raise EmptyDocumentError("no text, or white space only", where=self.id, next_step="Leave the document out.")
        if "\0" in self.text:
            raise UnreadableDocumentError(
                f"a NUL character at offset {self.text.index(chr(0))}",
                where=self.id,
                next_step="Pass text, not the bytes of a file; remove the NUL if it is there by mistake.",
            )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UnreadableDocumentError(
                f"an unpaired surrogate at character {error.start}",
                where=self.id,
                next_step="Decode the text with errors='replace', not 'surrogateescape' or 'surrogatepass'.",
            ) from error
        object.__setattr__(self, "metadata", _json_copy(self.metadata, where=self.id))

    @cached_property
    def content_sha256(self) -> str:
        """SHA-256 of the text's UTF-8 bytes, in hex; it decides whether a stored document is current."""
        return hashlib.sha256(self.text.encode()).hexdigest()


# A str is always text, and a path object always a file or folder: a guess would depend on the disk. A text that names a
# folder is refused, because it was hardly meant as a text.
DocumentLike: TypeAlias = str | os.PathLike[str] | Document | tuple[str, str] | tuple[str, str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ReadResult:
    """The result of `read_documents`.

    Attributes:
        documents: Documents in the order given, those of a folder in sorted order; no id occurs twice.
        errors: One error for each file, folder or text left out, with `on_error="skip"`; empty otherwise.
        skipped: Hidden entries, folder links and files of unknown type that were found in a folder.
    """

    documents: tuple[Document, ...]
    errors: tuple[DocumentError, ...] = ()
    skipped: tuple[Path, ...] = ()


def read_documents(
    source: DocumentLike | Iterable[DocumentLike], *, encoding: str = "utf-8", on_error: OnError = "raise"
) -> ReadResult:
    """Read texts, files and folders.

    Args:
        source: A text (str), a file or folder (a path object), a Document, `(id, text)`, `(id, text, metadata)`, or
            an iterable of these. Folders are read recursively.
        encoding: Encoding of text files without a byte order mark.
        on_error: `raise` stops at the first bad document; `skip` continues and collects the errors.

    Raises:
        DocumentError: A document is bad, with `on_error="raise"`; the subclass names the problem.
        ConfigError: A setting or the type of `source` is wrong; raised in both modes.
    """
    check_choice(on_error, OnError, where="on_error")
    if encoding != "utf-8":  # the default needs no check
        check_encoding(encoding)
    documents: dict[str, Document] = {}
    errors: list[DocumentError] = []
    skipped: list[Path] = []
    for part in (part for item in _items(source) for part in _parts(item, skipped)):
        try:
            if isinstance(part, DocumentError):
                raise part
            if isinstance(part, Path):
                document = read_file(part, encoding=encoding)
            else:
                document = part()
                check_lines(document.text, where=document.id)
            if documents.setdefault(document.id, document).text != document.text:
                raise DocumentError(
                    "this id was given twice, with different texts",
                    where=document.id,
                    next_step="Give each text its own id, or leave out the outdated one.",
                )
        except DocumentError as error:
            if on_error == "raise":
                raise
            errors.append(error)
    return ReadResult(documents=tuple(documents.values()), errors=tuple(errors), skipped=tuple(skipped))


def read_file(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> Document:
    r"""Read one file of a known type, or any file that is valid text.

    The id is the absolute path with links resolved. Newlines become `\n`. The metadata hold `file_name`, `file_type`,
    `size_bytes`, and `title`, `n_pages` and `reader_notes` if there are any.

    Args:
        path: Path of the file.
        encoding: Encoding of text files without a byte order mark.

    Raises:
        UnreadableDocumentError: The path is missing, forbidden, a folder, a device, or a broken or encrypted PDF; the
            bytes are not text; the bytes are not valid in `encoding`; a line is longer than `MAX_LINE_BYTES`.
        EmptyDocumentError: The file contains no text.
        ConfigError: `encoding` is unknown.
    """
    check_encoding(encoding)
    resolved, raw = _read_bytes(path)
    # A link's own name determines the type, not its target's.
    name = Path(path).name
    return parse_file(raw, name=name, id=file_id(resolved), source_uri=resolved.as_uri(), encoding=encoding)


def parse_file(
    raw: bytes, *, name: str, id: str | None = None, source_uri: str | None = None, encoding: str = "utf-8"
) -> Document:
    """The document of a file's bytes, as `read_file` makes it; no file is opened.

    Args:
        raw: All bytes of the file.
        name: Name of the file, whose suffix determines the type.
        id: Id of the document; None means the name.
        source_uri: Origin of the document.
        encoding: Encoding of text files without a byte order mark.
    """
    check_encoding(encoding)
    printable = _printable(name)
    id = printable if id is None else id
    content = read_content(raw, suffix=PurePath(name).suffix, encoding=encoding, where=id)
    check_lines(content.text, where=id)
    metadata = {"file_name": printable, "size_bytes": len(raw), **content.metadata}
    if content.notes:
        metadata["reader_notes"] = list(content.notes)
    return Document(id=id, text=content.text, source_uri=source_uri, metadata=metadata, notes=content.notes)


def file_id(path: str | os.PathLike[str]) -> str:
    """The id of a file's document: its absolute path with links resolved; bytes unfit for JSON or SQL are escaped."""
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links; half a surrogate pair or a NUL
        resolved = Path(path).absolute()
    return _printable(resolved.as_posix())


def path_of(uri: str) -> Path:
    """The path of a file uri, without the part after `#`; names that are not UTF-8 are restored unchanged."""
    path = os.fsdecode(unquote_to_bytes(urlsplit(uri).path))
    return Path(path.lstrip("/") if os.name == "nt" else path)  # /C:/a.txt


def _items(source: DocumentLike | Iterable[DocumentLike]) -> Iterable[DocumentLike]:
    if isinstance(source, str | os.PathLike | Document):
        return [source]
    if isinstance(source, tuple) and source and isinstance(source[0], str):
        return [source]
    if isinstance(source, bytes | bytearray | Mapping) or not isinstance(source, Iterable):
        raise _wrong_type(source)
    return source  # type: ignore[return-value]  # an empty tuple is not a DocumentLike, but a valid iterable


def _parts(item: DocumentLike, skipped: list[Path]) -> Sequence[Path | DocumentError | Callable[[], Document]]:
    """The files, errors and documents to be made of one item; entries of a folder that are left out go to `skipped`."""
    if isinstance(item, Document):
        return [lambda: item]
    if isinstance(item, str):
        is_path = len(item) < _LONGEST_PATH and os.path.exists(item)
        if is_path and os.path.isdir(item):
            return [
                UnreadableDocumentError(
                    "this text is the name of a folder",
                    where=repr(item),
                    next_step=f"Pass Path({item!r}) to add its files, or (id, {item!r}) to add these words.",
                )
            ]
        notes = (f"This text is the name of a file; to add the file, pass Path({item!r}).",) if is_path else ()
        id_ = f"text-{hashlib.sha256(item.encode(errors='replace')).hexdigest()[:12]}"
        return [partial(Document, id=id_, text=item, notes=notes)]
    if isinstance(item, tuple) and 2 <= len(item) <= 3:
        return [partial(Document, id=item[0], text=item[1], metadata=item[2] if len(item) == 3 else {})]
    if not isinstance(item, os.PathLike) or not isinstance(os.fspath(item), str):
        raise _wrong_type(item)
    path = Path(item)
    if not os.path.isdir(path):  # unlike Path.is_dir, False if a parent folder may not be searched
        return [path]
    files: list[Path] = []
    left_out: list[Path] = []
    failed: list[DocumentError] = []
    for found, error in walk_folder(path, lambda file: file.suffix.lower() in FILE_TYPES, on_skip=left_out.append):
        if error is None:
            files.append(found)
        else:
            failed.append(unreadable(error, found))
    skipped.extend(sorted(left_out))
    if not files and not failed:
        known = f"Known types are {', '.join(FILE_TYPES)}; pass the path of a file of another type itself."
        return [UnreadableDocumentError("no readable file in this folder", where=str(path), next_step=known)]
    return [*failed, *sorted(files)]


def walk_folder(
    folder: Path, fits: Callable[[Path], bool], *, on_skip: Callable[[Path], object] = lambda path: None
) -> Iterator[tuple[Path, OSError | None]]:
    """Yield the files below a folder in no order, and each folder that cannot be listed, with its error.

    Args:
        folder: Folder to walk.
        fits: Function that selects the files.
        on_skip: Callback for the entries left out: hidden ones, links to folders, and files that do not fit.
    """
    folders = [folder]
    while folders:
        folder = folders.pop()
        try:
            # Not os.walk, which holds all names of a folder in memory.
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    # A link to a folder could lead back here.
                    if entry.name.startswith(".") or (entry.is_symlink() and os.path.isdir(path)):
                        on_skip(path)
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif fits(path):
                        yield path, None
                    else:
                        on_skip(path)
        except OSError as error:
            yield folder, error


def _read_bytes(path: str | os.PathLike[str]) -> tuple[Path, bytes]:
    try:
        resolved = Path(path).resolve(strict=True)
        mode = resolved.stat().st_mode
        if not stat.S_ISREG(mode):
            # Checked before opening, which on a named pipe would wait for a writer.
            folder = stat.S_ISDIR(mode)
            raise UnreadableDocumentError(
                "this is a folder" if folder else "this is a device, a pipe or a socket, not a file",
                where=str(path),
                next_step="Use `read_documents` for folders." if folder else "Write its content to a file first.",
            )
        return resolved, resolved.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # loop of links: RuntimeError up to 3.12; NUL: ValueError
        raise unreadable(error, path) from error


def unreadable(error: Exception, path: str | os.PathLike[str]) -> UnreadableDocumentError:
    """The error for a file or folder that cannot be read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        what, step = "no such file or folder", f"Check the path; relative ones start at {Path.cwd()}."
    elif isinstance(error, PermissionError):
        what, step = "permission denied", "Grant this user read permission, or leave it out."
    else:
        what, step = f"cannot be read: {getattr(error, 'strerror', None) or error}", "Check the path and the disk."
    return UnreadableDocumentError(what, where=_printable(os.fspath(path)), next_step=step)


def _printable(path: str) -> str:
    r"""A path as a string that JSON and SQL accept; control characters and bytes that are not UTF-8 become `\xff`."""
    try:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which no path contains
        name = path.encode("utf-8", "backslashreplace").decode()
    return "".join(c if ord(c) >= 32 and c != "\x7f" else f"\\x{ord(c):02x}" for c in name)


def check_lines(text: str, *, where: str) -> None:
    """Refuse a text with a line longer than `MAX_LINE_BYTES`; an UnreadableDocumentError names it."""
    for number, line in enumerate(text.split("\n"), start=1):
        size_bytes = len(line.encode("utf-8", "surrogatepass"))
        if size_bytes > MAX_LINE_BYTES:
            raise UnreadableDocumentError(
                f"line {number} has {size_bytes:,} bytes, the limit is {MAX_LINE_BYTES:,}",
                where=where,
                next_step="Leave it out if it is data. If it is prose, break its lines.",
            )


def _wrong_type(source: object) -> ConfigError:
    return ConfigError(
        f"cannot read documents from a {type(source).__name__}",
        where="source",
        next_step="Pass a text (str), a path, a Document, (id, text), (id, text, metadata), or a list of these.",
    )


def _json_copy(metadata: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Copy metadata through JSON, so that the stored and the in-memory values never differ."""
    try:
        if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
            raise TypeError("it must be a mapping with str keys")
        # ensure_ascii=False and encode() find lone surrogates, which databases would refuse later.
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        text.encode()
        copy: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"metadata cannot be written as JSON: {error}",
            where=where,
            next_step="Use str keys, and str, int, finite float, bool, None, lists and mappings as values.",
        ) from error
    return copy
