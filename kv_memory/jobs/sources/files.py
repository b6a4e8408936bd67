"""Files: a single one, those of a folder, or those that match a pattern; each file is a document."""

from __future__ import annotations

import fnmatch
import glob as globbing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from kv_memory.documents import read_file
from kv_memory.documents.loaders import file_id
from kv_memory.documents.parsers import FILE_TYPES
from kv_memory.errors import UnreadableDocumentError
from kv_memory.jobs.item import ReadItem, SourceItem

__all__ = ["FileSource", "is_pattern", "path_of", "uri_of"]


def is_pattern(text: str) -> bool:
    """Whether a source is a pattern of file names rather than a file or folder."""
    return globbing.has_magic(text) and not os.path.exists(text)


def uri_of(path: Path) -> str:
    """The uri of a file as named; links are not resolved, because the name determines the type."""
    return path.absolute().as_uri()


def path_of(uri: str) -> Path:
    """The path of a file uri, without the part after `#`; names that are not UTF-8 are restored unchanged."""
    parts = urlsplit(uri)
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if os.name == "nt":  # /C:/a.txt
        path = path.lstrip("/")
    return Path(path)


class FileSource:
    """The files below a folder, the files that match a pattern, or one file.

    Args:
        path: A file, a folder, or a pattern such as `notes/**/*.md`.
        glob: Pattern for the names of a folder's files; None selects files of known types. A pattern with a slash is
            matched against the path below the folder.
        encoding: Encoding of text files without a byte order mark.
    """

    def __init__(self, path: str, *, glob: str | None = None, encoding: str = "utf-8") -> None:
        self.path = path
        self.glob = glob
        self.encoding = encoding
        self.n_skipped = 0

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; not sorted, which would hold the names of a million files in memory."""
        self.n_skipped = 0
        if is_pattern(self.path):
            for name in globbing.iglob(self.path, recursive=True):
                if os.path.isfile(name):
                    yield _item(Path(name))
        elif os.path.isdir(self.path):
            yield from self._below(self.path)
        else:
            yield _item(Path(self.path))

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        return ReadItem(document=read_file(path_of(item.uri), encoding=self.encoding))

    def close(self) -> None:
        """Do nothing; no file stays open."""

    def _below(self, root: str) -> Iterator[SourceItem]:
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                # Not os.walk, which holds all names of a folder in memory.
                with os.scandir(folder) as entries:
                    for entry in entries:
                        hidden = entry.name.startswith(".")
                        if entry.is_dir():
                            # A link to a folder could lead back here.
                            if hidden or entry.is_symlink():
                                self.n_skipped += 1
                            else:
                                folders.append(entry.path)
                        elif hidden or not self._fits(entry.name, os.path.relpath(entry.path, root)):
                            self.n_skipped += 1
                        else:
                            yield _item(Path(entry.path))
            except OSError as error:
                yield _failed(Path(folder), error)

    def _fits(self, name: str, below: str) -> bool:
        if self.glob is None:
            return os.path.splitext(name)[1].lower() in FILE_TYPES
        if "/" not in self.glob:
            return fnmatch.fnmatchcase(name, self.glob)
        return re.fullmatch(_regex(self.glob), below.replace(os.sep, "/")) is not None


def _regex(pattern: str) -> str:
    """A regular expression for a pattern: `**/` matches any number of folders, `*` anything but a slash."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    known = {"**/": r"(?:[^/]+/)*", "*": r"[^/]*", "?": r"[^/]"}
    return "".join(known.get(part, re.escape(part)) for part in parts)


def _item(path: Path) -> SourceItem:
    try:
        resolved = path.resolve(strict=True)
        size_bytes = resolved.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        return _failed(path, error)
    return SourceItem(document_id=file_id(resolved), uri=uri_of(path), size_bytes=size_bytes)


def _failed(path: Path, error: Exception) -> SourceItem:
    reason = getattr(error, "strerror", None) or str(error)
    ours = UnreadableDocumentError(
        f"cannot be read: {reason}", where=file_id(path.absolute()), next_step="Check the path and its permissions."
    )
    return SourceItem(document_id=file_id(path.absolute()), uri=uri_of(path), error=ours.to_dict())
