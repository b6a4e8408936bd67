"""Exports a collection into an archive: groups of documents, each read in one transaction and followed by its blobs.

A group has to fit into memory. A blob may vanish between the transaction and its copy, because its document was
changed or its cache evicted. The group is then removed and read again, so that every document in the archive is
complete. The keys of written blobs are kept in a temporary SQLite database, which copes with a million of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from kv_memory.errors import CorruptCacheError, TransferError
from kv_memory.store.caches import Caches
from kv_memory.store.transfer.archive import ArchiveHeader, ArchiveWriter, Mark
from kv_memory.store.transfer.archive_reader import ArchiveReader
from kv_memory.store.transfer.gathering import Gatherer
from kv_memory.store.transfer.manifest import Group
from kv_memory.store.transfer.part_files import ExportReport, TransferProgress, part_file, tell

__all__ = ["export_collection"]

_TRIES = 10  # of a group with blobs that vanish while they are copied


def export_collection(
    cache_table: Caches,
    collection_id: int,
    target: Path | str,
    on_progress: Callable[[TransferProgress], None] | None = None,
) -> ExportReport:
    """See `Store.export_to`."""
    if str(target) == "-":
        with Exporter(cache_table, collection_id, on_progress) as exporter:
            return exporter.run(sys.stdout.buffer, "standard output", can_rewind=False)
    path = Path(os.path.abspath(Path(target).expanduser()))
    with part_file(path) as file, Exporter(cache_table, collection_id, on_progress) as exporter:
        return replace(exporter.run(file, str(path), can_rewind=True), path=path)


@dataclass(kw_only=True)
class _State:
    """Progress of an export.

    Attributes:
        mark: Position after the last complete member.
        before: Position at which the present group begins, for removing the group.
        cursor: Id of the last document before the present group.
        group: Present group; None between groups.
        n_written: Number of the present group's blobs in the archive.
        n_taken_back: Number of times that the present group was removed.
        n_documents: Number of documents in the groups before.
        n_caches: Number of cache rows in the groups before.
        damaged: Keys of blobs that were found damaged or missing.
    """

    mark: Mark
    before: Mark
    cursor: str | None = None
    group: Group | None = None
    n_written: int = 0
    n_taken_back: int = 0
    n_documents: int = 0
    n_caches: int = 0
    damaged: list[str] = field(default_factory=list)

    def advance(self) -> None:
        """Complete the present group."""
        if self.group is not None:
            self.n_documents += len(self.group.documents)
            self.n_caches += len(self.group.caches)
            self.cursor = _last_id(self.group, self.cursor)
        self.group, self.n_written, self.n_taken_back, self.before = None, 0, 0, self.mark


class Exporter:
    """One export; a context manager, because it has a temporary database."""

    def __init__(
        self,
        cache_table: Caches,
        collection_id: int,
        on_progress: Callable[[TransferProgress], None] | None,
    ) -> None:
        self._cache_table = cache_table
        self._on_progress = on_progress
        self._gatherer = Gatherer(cache_table.references.catalog, collection_id)
        self._seen = self._gatherer.seen

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def run(self, file: BinaryIO, where: str, *, can_rewind: bool) -> ExportReport:
        """Write the archive; in a file, after what an interrupted export left in it."""
        self._cache_table.uses.flush()  # times of last use are exported too
        header = self._gatherer.header()
        state = self._survey(file, where, header) if can_rewind else None
        resumed = state is not None
        if state is None:
            self._seen.clear()
            writer = ArchiveWriter(file, where)
            if can_rewind:
                writer.rewind(writer.mark())
            writer.begin(header)
            state = _State(mark=writer.mark(), before=writer.mark())
        else:
            writer = ArchiveWriter(file, where, at=state.mark)
        total = header.size_bytes
        while True:
            if state.group is None:
                state.group = self._gatherer.group(state.cursor, first=state.mark.n_groups == 0)
                if state.group is None:
                    break
                writer.group(state.group)
                state.mark = writer.mark()
            for key, size_bytes in state.group.blobs[state.n_written :]:
                if not self._copy(writer, state, key, size_bytes, can_rewind=can_rewind):
                    break
                tell(self._on_progress, "export", state.n_documents, state.mark.offset, total)
            else:
                state.advance()
        sha256 = writer.end()
        return ExportReport(
            path=None,
            collection=header.collection,
            n_documents=state.n_documents,
            n_caches=state.n_caches,
            n_blobs=len(self._seen),
            size_bytes=writer.mark().offset,
            sha256=sha256,
            resumed=resumed,
            changed=self._gatherer.header().revision != header.revision,
            damaged=tuple(state.damaged),
        )

    def _copy(self, writer: ArchiveWriter, state: _State, key: str, size_bytes: int, *, can_rewind: bool) -> bool:
        """Write the next blob of the group; False if it is gone and the group was removed."""
        try:
            path = self._cache_table.references.verified_blobs.verified_path(key, size_bytes)
            writer.blob(key, path, size_bytes)
        except (CorruptCacheError, FileNotFoundError) as error:
            if not can_rewind:
                raise TransferError(
                    f"blob {key} was removed or damaged during the export",
                    where="standard output",
                    next_step="Run `kv-memory check`, then export again, preferably to a file.",
                ) from error
            if self._cache_table.references.quarantine_if_damaged(key, size_bytes):
                state.damaged.append(key)
            state.n_taken_back += 1
            if state.n_taken_back > _TRIES:
                raise TransferError(
                    f"blobs are removed as fast as they are copied, most recently {key}",
                    where=f"documents after {state.cursor!r}",
                    next_step="Export again when the store changes less; the export resumes where it stopped.",
                ) from error
            assert state.group is not None
            self._seen.forget(key for key, _ in state.group.blobs)
            writer.rewind(state.before)
            state.mark, state.group, state.n_written = state.before, None, 0
            return False
        self._seen.add(key)
        state.mark = writer.mark()
        state.n_written += 1
        return True

    def _survey(self, file: BinaryIO, where: str, header: ArchiveHeader) -> _State | None:
        """Progress of an interrupted export of the collection in this state; None if the file has no such export."""
        file.seek(0)
        try:
            reader = ArchiveReader(file, where)
        except TransferError:
            return None
        if reader.header.identity != header.identity:
            return None
        state = _State(mark=reader.mark(), before=reader.mark())
        try:
            for group in reader.groups():
                state.advance()
                state.before, state.group, state.mark = state.mark, group, reader.mark()
                for key, _ in reader.blobs():
                    self._seen.add(key)
                    state.mark = reader.mark()
                    state.n_written += 1
                    tell(self._on_progress, "verify", state.n_documents, reader.offset, reader.size_bytes)
        except TransferError:
            pass  # the export was interrupted here
        if state.group is not None and state.n_written == len(state.group.blobs):
            state.advance()
        return state


def _last_id(group: Group, before: str | None) -> str | None:
    return group.documents[-1].document.document_id if group.documents else before
