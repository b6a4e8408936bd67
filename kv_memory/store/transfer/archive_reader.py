"""Reads the archive of a collection, checks everything, and refuses a wrong archive with the place of the error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from kv_memory.errors import TransferError
from kv_memory.model.embedded import recorded_settings
from kv_memory.store.transfer.archive import (
    CHUNK_BYTES,
    END,
    FORMAT,
    HEADER,
    MAX_MEMBER_BYTES,
    ArchiveHeader,
    Chain,
    Mark,
    blob_member,
    manifest_member,
)
from kv_memory.store.transfer.manifest import Group, ManifestError

__all__ = ["ArchiveReader"]

_MAX_HEADER_BYTES = 1 << 24
_ZEROS = bytes(tarfile.BLOCKSIZE)
_AGAIN = "Copy the archive again; if the original is damaged too, run `kv-memory export` again."


class ArchiveReader:
    """Reads an archive from its first byte on, and returns only checked data.

    Args:
        file: Binary file; a pipe can be read only once.
        where: Name of the archive in errors.

    Raises:
        TransferError: The file is not an archive of kv-memory, has another format, or is damaged.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self._where = where
        self._chain = Chain()
        self._due: list[tuple[str, int]] = []  # unread blobs of the present group, the next one last
        self.header = self._read_header()
        self._start = self.mark()

    @property
    def size_bytes(self) -> int:
        """Size of the file in bytes; 0 for a pipe."""
        return os.fstat(self._file.fileno()).st_size if self.can_rewind else 0

    @property
    def offset(self) -> int:
        """Position of the reader in bytes."""
        return self._chain.offset

    @property
    def can_rewind(self) -> bool:
        """Whether the archive can be read again."""
        return self._file.seekable()

    def mark(self) -> Mark:
        """The present position, at which `ArchiveWriter` can resume."""
        return self._chain.mark()

    def rewind(self) -> None:
        """Go back to the first group."""
        self._file.seek(self._start.offset)
        self._chain.reset(self._start)
        self._due = []

    def groups(self) -> Iterator[Group]:
        """The groups in order; blobs that are not read through `blobs` are skipped unread.

        Raises:
            TransferError: The archive is damaged, or the next member is not the next group.
        """
        while True:
            name, size_bytes = self._next()
            if name == END:
                self._check_end(size_bytes)
                return
            if name != manifest_member(self._chain.n_groups + 1):
                raise self._altered(f"found {_shown(name)} instead of rows")
            data = self._read(name, size_bytes)
            try:
                group = Group.parse(data)
            except ManifestError as error:
                raise self._altered(f"{name} is invalid: {error}") from error
            self._chain.take(name, size_bytes, hashlib.sha256(data).hexdigest())
            self._chain.n_groups += 1
            self._due = list(reversed(group.blobs))
            yield group
            while self._due:
                self._skip_blob(*self._due.pop())

    def blobs(self) -> Iterator[tuple[str, bytes]]:
        """Keys and bytes of the present group's blobs; the bytes were checked against the key, their SHA-256.

        Raises:
            TransferError: A blob is missing or damaged.
        """
        while self._due:
            key, size_bytes = self._due.pop()
            name = self._expect(key, size_bytes)
            data = self._read(name, size_bytes)
            if hashlib.sha256(data).hexdigest() != key:
                raise self._altered(f"the bytes of {name} do not match its SHA-256")
            self._chain.take(name, size_bytes, key)
            yield key, data

    def _skip_blob(self, key: str, size_bytes: int) -> None:
        name = self._expect(key, size_bytes)
        length = size_bytes + -size_bytes % tarfile.BLOCKSIZE
        if self.can_rewind:
            self._file.seek(length, 1)
            self._chain.offset += length
        else:
            self._read(name, size_bytes)
        self._chain.take(name, size_bytes, key)

    def _expect(self, key: str, size_bytes: int) -> str:
        name, found_bytes = self._next()
        if name != blob_member(key):
            raise self._altered(f"found {_shown(name)} instead of the blob {key[:12]}…")
        if found_bytes != size_bytes:
            raise self._altered(f"{name} has {found_bytes:,} bytes, expected {size_bytes:,}")
        return name

    def _read_header(self) -> ArchiveHeader:
        foreign = TransferError(
            "this is not a kv-memory archive",
            where=self._where,
            next_step="Give a complete file written by `kv-memory export`.",
        )
        try:
            name, size_bytes = self._next()
            if name != HEADER or size_bytes > _MAX_HEADER_BYTES:
                raise foreign
            data = self._read(name, size_bytes)
            values = json.loads(data)
            format_ = values["format"]
        except (TransferError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise foreign from error
        if format_ != FORMAT:
            raise TransferError(
                f"the archive has format {format_!r}, this version reads {FORMAT}",
                where=self._where,
                next_step="Use the version of kv-memory that wrote it, or a newer one.",
            )
        try:
            header = ArchiveHeader(**values)
            types = {"written_by": str, "collection": str, "settings": dict, "n_documents": int, "size_bytes": int}
            if not all(isinstance(getattr(header, key), kind) for key, kind in types.items()):
                raise TypeError("a field has the wrong type")
        except TypeError as error:
            raise self._altered(f"{HEADER} is invalid: {error}") from error
        self._chain.take(name, size_bytes, hashlib.sha256(data).hexdigest())
        return dataclasses.replace(header, settings=recorded_settings(header.settings))

    def _check_end(self, size_bytes: int) -> None:
        expected = self._chain.end()
        if size_bytes != len(expected) or self._read(END, size_bytes) != expected:
            raise self._altered("its members do not match its checksum")

    def _next(self) -> tuple[str, int]:
        """Name and size of the next member."""
        block = self._file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block == _ZEROS:
            raise self._truncated("the archive ends before its last member")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise self._altered("a tar header is damaged") from error
        if info.type != tarfile.REGTYPE or not 0 <= info.size < MAX_MEMBER_BYTES:
            raise self._altered(f"{_shown(info.name)} is not a regular file")
        self._chain.offset += tarfile.BLOCKSIZE
        return info.name, info.size

    def _read(self, name: str, size_bytes: int) -> bytes:
        pieces: list[bytes] = []  # piece by piece, so that a tampered size reserves no memory
        left = size_bytes + -size_bytes % tarfile.BLOCKSIZE
        while left:
            piece = self._file.read(min(left, CHUNK_BYTES))
            if not piece:
                raise self._truncated(f"the archive ends in the middle of {_shown(name)}")
            self._chain.offset += len(piece)
            pieces.append(piece)
            left -= len(piece)
        return memoryview(b"".join(pieces))[:size_bytes].tobytes()

    def _truncated(self, what: str) -> TransferError:
        return TransferError(what, where=f"{self._where}, byte {self._chain.offset:,}", next_step=_AGAIN)

    def _altered(self, what: str) -> TransferError:
        return TransferError(
            f"the archive was altered or damaged: {what}",
            where=f"{self._where}, byte {self._chain.offset:,}",
            next_step=_AGAIN,
        )


def _shown(name: str) -> str:
    return repr(name[:100])
