"""Plain text as a set: examples without questions from a file, a folder, or an archive of text and Markdown."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kv_memory.datasets.example import Example
from kv_memory.datasets.record_files import READ_ERRORS, Faults, unreadable
from kv_memory.documents import Document, read_documents
from kv_memory.documents.parsers import FILE_TYPES, read_content
from kv_memory.errors import DatasetError, DocumentError


def read_texts(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read one file, or a folder in sorted order, by the rules of `read_documents`: any type that it reads.

    Raises:
        DatasetError: A document is broken or nothing is readable, and `faults` raises.
    """
    # Always "skip": errors are reported below, as `DatasetError`.
    result = read_documents(path, on_error="skip")
    for error in result.errors:
        faults.report(_of_set(error))
    folder = path.resolve()
    for document in result.documents:
        # A link in the folder may lead to a file outside.
        inside = PurePosixPath(document.id).is_relative_to(folder.as_posix()) and document.id != folder.as_posix()
        name = PurePosixPath(document.id).relative_to(folder.as_posix()).as_posix() if inside else None
        yield _example(document, source, name or str(document.metadata["file_name"]))


def read_archive(path: Path, source: str, faults: Faults) -> Iterator[Example]:
    """Read the files of known types in a tar archive, plain or compressed, in its order, without unpacking to disk.

    Raises:
        DatasetError: The archive is damaged, in both modes; or a document is broken, and `faults` raises.
    """
    try:
        with tarfile.open(path) as archive:
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
                    faults.report(_of_set(error))
                    continue
                yield _example(document, source, name.as_posix())
    except (tarfile.TarError, *READ_ERRORS) as error:
        raise unreadable(path, error) from error


def _example(document: Document, source: str, name: str) -> Example:
    title = str(document.metadata.get("title") or PurePosixPath(name).stem)
    return Example(id=f"{source}/{name}", context=document.text.strip(), questions=(), source=source, title=title)


def _of_set(error: DocumentError) -> DatasetError:
    """The same error as a DatasetError, so that callers only need to catch one type."""
    fault = DatasetError(error.what, where=error.where, next_step=error.next_step)
    fault.__cause__ = error
    return fault
