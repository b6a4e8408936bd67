"""Moving a collection as one file: what it reports, and the file, whether it is whole and who is writing it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from kv_memory.errors import TransferError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_opener
from kv_memory.store.transfer.archive_reader import ArchiveReader
from kv_memory.store.transfer.manifest import Group

try:
    import fcntl
except ImportError:  # Windows: two exports into one file are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ExportReport",
    "ImportReport",
    "OnConflict",
    "TransferProgress",
    "open_archive",
    "part_file",
    "tell",
    "verify_archive",
]

OnConflict = Literal["refuse", "skip", "replace"]


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """How far an export or import is.

    Attributes:
        step: What is being done: `verify` reads the archive through before anything is changed.
        n_documents: Done.
        size_bytes: Done.
        size_bytes_total: To do, as far as is known; 0 where it is not.
    """

    step: Literal["export", "verify", "import"]
    n_documents: int
    size_bytes: int
    size_bytes_total: int


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `Store.export_to` did.

    Attributes:
        path: The archive; None for a pipe.
        collection: What is in it.
        n_documents: In the archive.
        n_caches: Rows of distilled caches in the archive; those that several groups of documents share count in each.
        n_blobs: In the archive.
        size_bytes: Of the archive.
        sha256: Over names, sizes and hashes of all members; the archive's last member has it too.
        resumed: Whether an interrupted export was gone on with.
        changed: Whether documents were added, changed or removed meanwhile. Each document in the archive is one that
            was there, with its caches; all of them together may never have been.
        damaged: Keys of blobs that were found damaged or missing, and are not in the archive.
    """

    path: Path | None
    collection: str
    n_documents: int
    n_caches: int
    n_blobs: int
    size_bytes: int
    sha256: str
    resumed: bool
    changed: bool
    damaged: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What `Store.import_from` did.

    Attributes:
        collection: Where it went.
        n_documents: In the archive.
        n_added: Documents that are new.
        n_replaced: Documents that took the place of others of their id.
        n_unchanged: Documents that were there already, with the same text.
        conflicts: Ids that are there with other text, and were left as they are.
        n_caches: Distilled caches that are new.
        n_caches_present: Distilled caches that were there already.
        n_caches_left_out: Distilled caches that have expired, or belong to documents that were left out.
        n_evicted: Caches of the collection that went to keep its budget.
        size_bytes: Of the blobs that were stored.
    """

    collection: str
    n_documents: int
    n_added: int
    n_replaced: int
    n_unchanged: int
    conflicts: tuple[str, ...]
    n_caches: int
    n_caches_present: int
    n_caches_left_out: int
    n_evicted: int
    size_bytes: int


@contextmanager
def open_archive(source: Path | str) -> Iterator[ArchiveReader]:
    """An archive to read; `-` is the standard input.

    Raises:
        TransferError: There is no such file, or it is no archive.
    """
    if str(source) == "-":
        yield ArchiveReader(sys.stdin.buffer, "standard input")
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise TransferError(
            "there is no such archive",
            where=str(path),
            next_step="Name a file that `kv-memory export` has written; one that ends in .part is not complete.",
        )
    with mapped(path):
        file = open(path, "rb")  # noqa: SIM115  closed below, so that errors of the block are not mapped here
    with file:
        yield ArchiveReader(file, str(path))


def verify_archive(
    archive: ArchiveReader,
    on_progress: Callable[[TransferProgress], None] | None = None,
    *,
    on_group: Callable[[Group], object] | None = None,
) -> None:
    """Read an archive through and hash all of it.

    Args:
        archive: At its start.
        on_progress: Called after every blob.
        on_group: Called with every group, whose rows were verified and whose blobs were not yet.

    Raises:
        TransferError: It is damaged or incomplete.
    """
    n_documents = 0
    for group in archive.groups():
        if on_group is not None:
            on_group(group)
        for _ in archive.blobs():
            tell(on_progress, "verify", n_documents, archive.offset, archive.size_bytes)
        n_documents += len(group.documents)


def tell(
    on_progress: Callable[[TransferProgress], None] | None,
    step: Literal["export", "verify", "import"],
    n_documents: int,
    size_bytes: int,
    size_bytes_total: int,
) -> None:
    """Report progress to whoever wants to hear of it."""
    if on_progress is not None:
        total = max(size_bytes, size_bytes_total) if size_bytes_total else 0
        on_progress(TransferProgress(step=step, n_documents=n_documents, size_bytes=size_bytes, size_bytes_total=total))


@contextmanager
def part_file(target: Path) -> Iterator[BinaryIO]:
    """The file beside an archive that becomes it when the block ends well; it stays when the block does not.

    Raises:
        TransferError: Another process writes it.
        StoreError: The folder may not be written, or is not there.
    """
    part = target.with_name(target.name + ".part")
    if target.is_dir():
        raise TransferError("this is a folder", where=str(target), next_step="Name the file to be written.")
    if not target.parent.is_dir():
        raise TransferError("there is no such folder", where=str(target.parent), next_step="Make it first.")
    with mapped(part):
        # Whatever the umask, and not through a link that somebody else may have laid there.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        descriptor = private_opener(str(part), flags)
        with os.fdopen(descriptor, "r+b") as file:
            if not _lock(descriptor, part):
                raise TransferError(
                    "another export is writing this file",
                    where=str(part),
                    next_step="Wait for it to finish, or name another file.",
                )
            if os.name == "posix":
                os.fchmod(descriptor, 0o600)
            yield file
            file.flush()
            os.fsync(descriptor)
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there; elsewhere it is renamed while it is locked
            os.replace(part, target)
            fsync_folder(str(target.parent.resolve()))


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file; False if another process has it, or has just given it another name."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
