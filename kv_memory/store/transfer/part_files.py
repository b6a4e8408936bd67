"""Files and reports of an export or import: opening, verifying and writing an archive, and its progress."""

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
except ImportError:  # Windows: a second export into the same file is not noticed
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
    """Progress of an export or import.

    Attributes:
        step: Present step; `verify` reads the whole archive before anything is changed.
        n_documents: Number of documents done.
        size_bytes: Size of the archive done, in bytes.
        size_bytes_total: Total size in bytes as far as it is known; 0 if it is not.
    """

    step: Literal["export", "verify", "import"]
    n_documents: int
    size_bytes: int
    size_bytes_total: int


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of `Store.export_to`.

    Attributes:
        path: Path of the archive; None for a pipe.
        collection: Name of the exported collection.
        n_documents: Number of documents in the archive.
        n_caches: Number of rows of distilled caches in the archive; one that several groups of documents share counts
            in each.
        n_blobs: Number of blobs in the archive.
        size_bytes: Size of the archive in bytes.
        sha256: SHA-256 hex digest over names, sizes and hashes of all members; the archive's last member has it too.
        resumed: Whether an interrupted export was resumed.
        changed: Whether documents were added, changed or removed during the export. Each document in the archive
            existed with its caches, but maybe not all of them at the same time.
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
    """Result of `Store.import_from`.

    Attributes:
        collection: Name of the collection that was imported into.
        n_documents: Number of documents in the archive.
        n_added: Number of new documents.
        n_replaced: Number of documents that replaced others with their id.
        n_unchanged: Number of documents that existed already, with the same text.
        conflicts: Ids of documents that exist with other text, and were left unchanged.
        n_caches: Number of new distilled caches.
        n_caches_present: Number of distilled caches that existed already.
        n_caches_left_out: Number of distilled caches that have expired, or belong to documents that were left out.
        n_evicted: Number of caches evicted to stay within size limits.
        size_bytes: Size of the stored blobs in bytes.
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
    """Open an archive for reading; `-` is standard input.

    Raises:
        TransferError: The file does not exist, or is not an archive.
    """
    if str(source) == "-":
        yield ArchiveReader(sys.stdin.buffer, "standard input")
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise TransferError(
            "there is no such archive",
            where=str(path),
            next_step="Give a file written by `kv-memory export`; a file that ends in .part is not complete.",
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
    """Read a whole archive and check all its hashes.

    Args:
        archive: Archive, positioned at its start.
        on_progress: Callback, called after every blob.
        on_group: Callback, called with every group once its rows are verified, before its blobs are.

    Raises:
        TransferError: The archive is damaged or incomplete.
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
    """Report progress to the callback, if any."""
    if on_progress is not None:
        total = max(size_bytes, size_bytes_total) if size_bytes_total else 0
        on_progress(TransferProgress(step=step, n_documents=n_documents, size_bytes=size_bytes, size_bytes_total=total))


@contextmanager
def part_file(target: Path) -> Iterator[BinaryIO]:
    """A part file for writing an archive; it is renamed to the archive if the block succeeds, and kept otherwise.

    Raises:
        TransferError: Another process is writing the file, the target is a folder, or its folder does not exist.
        StoreError: The folder is not writable.
    """
    part = target.with_name(target.name + ".part")
    if target.is_dir():
        raise TransferError("this is a folder", where=str(target), next_step="Give the path of the file to write.")
    if not target.parent.is_dir():
        raise TransferError("there is no such folder", where=str(target.parent), next_step="Create it first.")
    with mapped(part):
        # Private whatever the umask, and not through a link that another user may have placed there.
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
    """Lock an open file; False if another process has locked it, or has just renamed it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
