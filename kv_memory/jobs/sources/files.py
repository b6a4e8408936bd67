"""Files: a single one, those of a folder, or those that match a pattern; each file is a document."""

from __future__ import annotations

import fnmatch
import glob as globbing
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kv_memory.documents import read_file
from kv_memory.documents.loaders import file_id, path_of, unreadable, walk_folder
from kv_memory.documents.parsers import FILE_TYPES
from kv_memory.jobs.job_records import SourceItem
from kv_memory.jobs.sources.source import ReadItem, Source, uri_of


def is_pattern(text: str) -> bool:
    """Whether a source is a pattern of file names rather than a file or folder."""
    return globbing.has_magic(text) and not os.path.exists(text)


class FileSource(Source):
    """The files below a folder, the files that match a pattern such as `notes/**/*.md`, or one file.

    `glob` is a pattern for the names of a folder's files; without it, files of known types are selected. A pattern with
    a slash is matched against the path below the folder.
    """

    def __init__(self, path: str, *, glob: str | None = None, encoding: str = "utf-8") -> None:
        self.uri = uri_of(Path(path))
        self.path = path
        self._glob = glob
        self._encoding = encoding

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; not sorted, which would hold the names of a million files in memory."""
        if is_pattern(self.path):
            for name in globbing.iglob(self.path, recursive=True):
                if os.path.isfile(name):
                    yield _item(Path(name))
        elif os.path.isdir(self.path):
            for path, error in walk_folder(Path(self.path), self._fits):
                yield _item(path) if error is None else _failed(path, error)
        else:
            yield _item(Path(self.path))

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        return ReadItem(document=read_file(path_of(item.uri), encoding=self._encoding))

    def _fits(self, path: Path) -> bool:
        if self._glob is None:
            return path.suffix.lower() in FILE_TYPES
        if "/" not in self._glob:
            return fnmatch.fnmatchcase(path.name, self._glob)
        return re.fullmatch(_regex(self._glob), path.relative_to(self.path).as_posix()) is not None


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
    name = file_id(path.absolute())
    return SourceItem(document_id=name, uri=uri_of(path), error=unreadable(error, path).to_dict())
