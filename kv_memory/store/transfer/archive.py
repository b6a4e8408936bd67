"""The archive of a collection: a tar of fixed structure, written and read from front to back.

```
kv-memory.json               format, collection, settings
manifest/00000001.jsonl      the rows of some documents and their caches, and the blobs that follow
blobs/<sha256>.safetensors   each blob once, named by the hash of its bytes
manifest/00000002.jsonl      ...
end.json                     the hash over names, sizes and hashes of all members before it
```

Any `tar` lists and unpacks it. Reading is strict: every member must have the name and size that are expected next, or
the archive is refused. So there are no links, folders, absolute paths or `..` to handle. Headers are parsed by
`tarfile.TarInfo`. `tarfile.TarFile` was rejected for reading members: it takes a damaged header for the end of the
archive, and remembers every member it has read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kv_memory.errors import TransferError
from kv_memory.store.transfer.manifest import Group

__all__ = [
    "CHUNK_BYTES",
    "END",
    "FORMAT",
    "HEADER",
    "MAX_MEMBER_BYTES",
    "ArchiveHeader",
    "ArchiveWriter",
    "Chain",
    "Mark",
    "blob_member",
    "manifest_member",
]

FORMAT = 1
HEADER, END = "kv-memory.json", "end.json"
CHUNK_BYTES = 1 << 20
MAX_MEMBER_BYTES = 8**11  # limit of a tar header without extensions: 8 GiB


def blob_member(key: str) -> str:
    """The name of a blob's member."""
    return f"blobs/{key}.safetensors"


def manifest_member(ordinal: int) -> str:
    """The name of the member with a group's rows, counted from 1."""
    return f"manifest/{ordinal:08d}.jsonl"


@dataclass(frozen=True, kw_only=True)
class ArchiveHeader:
    """First member of an archive: a description of its contents.

    Attributes:
        format: Format version of the archive.
        written_by: Version of this package that wrote it.
        collection: Name of the collection in its store of origin.
        collection_created_at: Time of its creation, which distinguishes it from others with that name; ISO 8601, UTC.
        revision: Revision of the collection when the export began.
        settings: Settings of the collection.
        n_documents: Number of documents in the collection when the export began.
        size_bytes: Size of its caches' blobs in bytes when the export began.
    """

    format: int
    written_by: str
    collection: str
    collection_created_at: str
    revision: int
    settings: dict[str, Any]
    n_documents: int
    size_bytes: int

    @property
    def identity(self) -> tuple[Any, ...]:
        """The values that must be unchanged for an interrupted export to be resumed."""
        return self.format, self.collection, self.collection_created_at, self.revision, self.settings


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A position between two members, and the hash up to it."""

    offset: int
    n_members: int
    n_groups: int
    digest: Any


class Chain:
    """The hash over names, sizes and hashes of the members so far."""

    def __init__(self) -> None:
        self.offset = 0
        self.n_members = 0
        self.n_groups = 0
        self.digest = hashlib.sha256()

    def take(self, name: str, size_bytes: int, sha256: str) -> None:
        """Add a member."""
        self.digest.update(f"{name} {size_bytes} {sha256}\n".encode())
        self.n_members += 1

    def end(self) -> bytes:
        """The contents of the last member: hash and number of all members before it."""
        return _json({"sha256": self.digest.hexdigest(), "n_members": self.n_members})

    def mark(self) -> Mark:
        """The present position."""
        return Mark(offset=self.offset, n_members=self.n_members, n_groups=self.n_groups, digest=self.digest.copy())

    def reset(self, mark: Mark) -> None:
        """Go back to a position."""
        self.offset, self.n_members, self.n_groups = mark.offset, mark.n_members, mark.n_groups
        self.digest = mark.digest.copy()


class ArchiveWriter:
    """Writes an archive.

    Args:
        file: Binary file.
        where: Name of the archive in errors.
        at: Position to resume at instead of the start; the file must be seekable.
    """

    def __init__(self, file: BinaryIO, where: str, *, at: Mark | None = None) -> None:
        self._file = file
        self._where = where
        self._chain = Chain()
        if at is not None:
            self.rewind(at)

    def mark(self) -> Mark:
        """The present position, for `rewind`."""
        return self._chain.mark()

    def rewind(self, mark: Mark) -> None:
        """Remove everything after a mark."""
        self._file.seek(mark.offset)
        self._file.truncate()
        self._chain.reset(mark)

    def begin(self, header: ArchiveHeader) -> None:
        """Write the first member."""
        self._member(HEADER, _json(asdict(header)))

    def group(self, group: Group) -> None:
        """Write the rows of a group; its blobs must follow, in its order."""
        self._member(manifest_member(self._chain.n_groups + 1), group.to_bytes())
        self._chain.n_groups += 1

    def blob(self, key: str, path: Path, size_bytes: int) -> None:
        """Write a blob from a file after its hash was checked.

        Raises:
            FileNotFoundError: The file is gone, or was truncated meanwhile: rewind.
            TransferError: The blob is larger than a member of a tar may be.
        """
        with open(path, "rb") as source:
            self._start(blob_member(key), size_bytes)
            left = size_bytes
            while left:
                piece = source.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise FileNotFoundError(f"{path} was truncated")
                self._file.write(piece)
                left -= len(piece)
        self._finish(blob_member(key), size_bytes, key)

    def end(self) -> str:
        """Write the last member; returns the hash over all members before it."""
        sha256 = self._chain.digest.hexdigest()
        self._member(END, self._chain.end())
        # Two empty blocks end a tar, and its length is a multiple of 20 blocks.
        record = tarfile.RECORDSIZE
        padding = -(self._chain.offset + 2 * tarfile.BLOCKSIZE) % record
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + padding))
        self._chain.offset += 2 * tarfile.BLOCKSIZE + padding
        return sha256

    def _member(self, name: str, data: bytes) -> None:
        self._start(name, len(data))
        self._file.write(data)
        self._finish(name, len(data), hashlib.sha256(data).hexdigest())

    def _start(self, name: str, size_bytes: int) -> None:
        if size_bytes >= MAX_MEMBER_BYTES:
            raise TransferError(
                f"{name} has {size_bytes:,} bytes, but members of an archive must have less than {MAX_MEMBER_BYTES:,}",
                where=self._where,
                next_step="Split the document into passages (`--passage-tokens`), then export again.",
            )
        info = tarfile.TarInfo(name)
        info.size = size_bytes
        info.mode = 0o600
        # No times, users or groups, so that the same collection gives the same bytes.
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))

    def _finish(self, name: str, size_bytes: int, sha256: str) -> None:
        padding = -size_bytes % tarfile.BLOCKSIZE
        self._file.write(bytes(padding))
        self._chain.offset += tarfile.BLOCKSIZE + size_bytes + padding
        self._chain.take(name, size_bytes, sha256)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode() + b"\n"
