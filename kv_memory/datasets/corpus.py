"""Plain text as a set: examples without questions from a file, a folder, or an archive of text and Markdown."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kv_memory.datasets.example import Example
from kv_memory.datasets.record_files import Faults, reading
from kv_memory.documents import Document, read_documents
from kv_memory.documents.parsers import FILE_TYPES, read_content
from kv_memory.errors import DatasetError, DocumentError


def read_texts(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read a file, or a folder in sorted order, of any type that `read_documents` reads; errors go to `faults`."""
    # Always "skip": errors are reported below, as `DatasetError`.
    result = read_documents(path, on_error="skip")
    for error in result.errors:
        faults.report(DatasetError(error.what, where=error.where, next_step=error.next_step))
    folder = path.resolve()
    for document in result.documents:
        file = Path(document.id)
        # A link in the folder may lead to a file outside.
        name = file.relative_to(folder).as_posix() if folder in file.parents else str(document.metadata["file_name"])
        yield _example(document, source, name)


def read_archive(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read the files of known types in a tar archive, plain or compressed, in its order, without unpacking to disk.

    Broken documents go to `faults`; a damaged archive is a DatasetError in both modes.
    """
    with reading(path), tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            hidden = any(part.startswith(".") and part != "." for part in name.parts)
            if hidden or not member.isfile() or name.suffix.lower() not in FILE_TYPES:
                continue
            file = archive.extractfile(member)
            assert file is not None  # never None for a regular file
            where = f"{path}:{member.name}"
            try:
                content = read_content(file.read(), suffix=name.suffix, encoding="utf-8", where=where)
                document = Document(id=where, text=content.text, metadata=content.metadata)
            except DocumentError as error:
                faults.report(DatasetError(error.what, where=error.where, next_step=error.next_step))
                continue
            yield _example(document, source, name.as_posix())


def _example(document: Document, source: str, name: str) -> Example:
    title = str(document.metadata.get("title") or PurePosixPath(name).stem)
    return Example(id=f"{source}/{name}", context=document.text.strip(), questions=(), source=source, title=title)
