"""Archives: a collection in one file, which is a small store packed with tar.

```
kv-memory.json      format, collection, and the SHA-256 of the two databases
catalog.sqlite      documents, texts, settings, and rows of caches
blobs/cache.db      diskcache's table of the blobs' files
blobs/...           the blobs, each named in the catalog by the SHA-256 of its bytes
```

An archive is verified by the store's own check, which hashes the blobs, and by the hashes of the two databases. It does
not prove who wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from sqlalchemy import JSON, inspect, select

import kv_memory
from kv_memory.errors import CorruptCacheError, KVMemoryError, StoreError, TransferError
from kv_memory.store.blobs.local import is_blob_key
from kv_memory.store.copy import OnConflict, copy_collection
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_opener
from kv_memory.store.records import CopyReport, TransferProgress
from kv_memory.store.sql.schema import Base, CacheRow, FingerprintRow, PassageRow, UTCDateTime
from kv_memory.store.store import Store

_FORMAT = 1
_HEADER = "kv-memory.json"
_MALFORMED = (tarfile.TarError, ValueError, TypeError, LookupError, RecursionError)  # raised by parsers
_MAX_HEADER_BYTES = 1 << 16
_DATABASES = ("catalog.sqlite", "blobs/cache.db")
# Not `store.json`, with which the unpacked store would connect to servers of the writer's choice.
_MEMBER = re.compile(r"kv-memory\.json|catalog\.sqlite|blobs/(\w+/)*\w+\.\w+")
_WORD_HASH = re.compile("[0-9a-f]{16}")
_PYTHON_TYPES = {JSON: dict, UTCDateTime: datetime}  # where SQLAlchemy's answer is `object`
_AGAIN = "Copy the archive again; if the original is damaged too, run `kv-memory export` again."

OnProgress = Callable[[TransferProgress], None]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of `export_collection`.

    Attributes:
        path: Path of the archive.
        collection: Name of the exported collection.
        n_documents: Number of documents in the archive.
        n_caches: Number of distilled caches in the archive.
        n_blobs: Number of blobs in the archive, with those of shared prefixes.
        size_bytes: Size of the archive in bytes.
        changed: Whether documents were added, changed or removed during the export. Each document in the archive
            existed with its caches, but maybe not all of them at the same time.
        damaged: Keys of blobs that were found damaged or missing, and text hashes of caches with the blob of another
            text. They are not in the archive.
    """

    path: Path
    collection: str
    n_documents: int
    n_caches: int
    n_blobs: int
    size_bytes: int
    changed: bool
    damaged: tuple[str, ...]


def export_collection(store: Store, path: Path | str, *, on_progress: OnProgress | None = None) -> ExportReport:
    """Write a collection into one file: documents, caches, prefixes and settings.

    It is copied into a folder `PATH.part-...`, checked and packed there, and renamed to PATH. Blobs are linked into
    that folder; where that is not possible, an export takes twice the size of the collection on the disk. A killed
    process leaves the folder behind. Documents may be added during the export.

    A blob is hashed in the store, unless this process has done so before, because a damaged one is left out. It is
    hashed again in the folder, because the archive replaces an older one.

    Args:
        store: Collection to export.
        path: File to write; an existing one is replaced.
        on_progress: Callback, called after every cache and document.

    Raises:
        TransferError: The path is not that of a file, or its folder does not exist.
        StoreFullError: No space left. An existing archive is untouched.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    if target.exists() and not target.is_file():
        raise TransferError("this is not a file", where=str(target), next_step="Give the path of the file to write.")
    if not target.parent.is_dir():
        raise TransferError("there is no such folder", where=str(target.parent), next_step="Create it first.")
    revision = store.revision
    with _temporary(target.parent, f"{target.name[:99]}.part-") as name:
        folder = Path(name)
        # Not durable: only the finished file is synced, before its rename.
        with Store.open(folder / "store", collection=store.collection, durable=False) as small:
            copied = copy_collection(store, small, on_progress=on_progress)
            checked = small.check()
        if checked.damaged or checked.missing:
            raise TransferError(
                "the copy was damaged while it was written",
                where=str(folder),
                next_step="Check the disk, or export to another one.",
            )
        part = folder / "archive.tar"
        progress = TransferProgress(step="pack", n_documents=copied.n_documents, size_bytes_total=checked.size_bytes)
        _pack(folder / "store", store.collection, part, progress, on_progress)
        with mapped(target):
            size_bytes = part.stat().st_size
            os.replace(part, target)
            fsync_folder(str(target.parent))
    return ExportReport(
        path=target,
        collection=store.collection,
        n_documents=copied.n_documents,
        n_caches=copied.n_caches - len(checked.misfiled),
        n_blobs=checked.n_blobs,
        size_bytes=size_bytes,
        changed=store.revision != revision,
        damaged=(*copied.damaged, *checked.misfiled),
    )


def import_archive(
    path: Path | str, store: Store, *, on_conflict: OnConflict = "refuse", on_progress: OnProgress | None = None
) -> CopyReport:
    """Import an archive that `export_collection` wrote into a collection; arguments and errors as in `copy_collection`.

    The archive is verified completely before anything is changed. Import one only from a source that you would accept
    a model from.

    Raises:
        TransferError: The archive is damaged, incomplete, or of another format.
        StoreError: A newer version of this package wrote the archive.
    """
    with open_archive(path, on_progress=on_progress) as archive:
        return copy_collection(archive, store, on_conflict=on_conflict, on_progress=on_progress)


@contextmanager
def open_archive(path: Path | str, *, on_progress: OnProgress | None = None) -> Iterator[Store]:
    """Unpack and verify an archive; errors as in `import_archive`.

    It is unpacked beside the file or, where that is not possible, in the system's temporary folder. The store is
    removed afterwards.
    """
    source = Path(os.path.abspath(Path(path).expanduser()))
    if not source.is_file():
        raise TransferError(
            "there is no such archive", where=str(source), next_step="Give a file written by `kv-memory export`."
        )
    beside = source.parent if os.access(source.parent, os.W_OK) else None
    with _temporary(beside, f"{source.name[:99]}.unpacked-") as name:
        folder = Path(name)
        with _as_damage(source):
            collection = _unpack(source, folder, on_progress)
            opened = Store.open(folder, collection=collection, create=False, durable=False)
        with opened:
            if on_progress is not None:
                on_progress(TransferProgress(step="verify"))
            with _as_damage(source):
                _verify(opened)
            yield opened


def _temporary(beside: Path | None, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A folder that only its owner may enter."""
    with mapped(beside or tempfile.gettempdir()):
        return tempfile.TemporaryDirectory(prefix=prefix, dir=beside, ignore_cleanup_errors=True)


# writing


def _pack(
    folder: Path, collection: str, part: Path, progress: TransferProgress, on_progress: OnProgress | None
) -> None:
    """Write the tar of a closed store, durably."""
    with mapped(part):
        for name in _DATABASES:
            with closing(sqlite3.connect(folder / name)) as connection:
                connection.execute("PRAGMA journal_mode = DELETE")  # everything is in this one file afterwards
        sums = {name: _sha256(folder / name) for name in _DATABASES}
        header = {"format": _FORMAT, "written_by": kv_memory.__version__, "collection": collection, "sha256": sums}
        with open(folder / _HEADER, "w", opener=private_opener) as file:
            json.dump(header, file)
        blobs = (path for path in sorted((folder / "blobs").rglob("*/*")) if path.is_file())
        with open(part, "wb", opener=private_opener) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for path in (*(folder / name for name in (_HEADER, *_DATABASES)), *blobs):
                    tar.add(path, path.relative_to(folder).as_posix(), filter=_without_owner)
                    if on_progress is not None:
                        total = max(file.tell(), progress.size_bytes_total)
                        on_progress(replace(progress, size_bytes=file.tell(), size_bytes_total=total))
            file.flush()
            os.fsync(file.fileno())


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid, info.gid, info.uname, info.gname, info.mode, info.mtime = 0, 0, "", "", 0o600, 0
    return info


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# reading


class _Member(tarfile.TarInfo):
    """A plain file of an archive; all else is refused before tarfile interprets it: links, devices, other headers."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        """See `tarfile.TarInfo.frombuf`."""
        info = super().frombuf(buf, encoding, errors)
        if info.type != tarfile.REGTYPE or info.size < 0 or _MEMBER.fullmatch(info.name) is None:
            raise tarfile.ReadError(f"{info.name[:100]!r} does not belong in an archive")
        return info


def _unpack(source: Path, folder: Path, on_progress: OnProgress | None) -> str:
    """Unpack an archive and check the hashes of its databases; returns the name of the collection."""
    foreign = TransferError(
        "this is not a kv-memory archive",
        where=str(source),
        next_step="Give a complete file written by `kv-memory export`.",
    )
    with mapped(folder), open(source, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)  # noqa: SIM115  closed with the file
            first = tar.next()
            if first is None or first.name != _HEADER or first.size > _MAX_HEADER_BYTES:
                raise foreign
            tar.extract(first, folder, filter="data")
            header = json.loads((folder / _HEADER).read_bytes())
            format_ = header["format"]
        except _MALFORMED as error:
            raise foreign from error
        if format_ != _FORMAT:
            raise TransferError(
                f"the archive has format {format_!r}, this version reads {_FORMAT}",
                where=str(source),
                next_step="Use the version of kv-memory that wrote it, or a newer one.",
            )
        while (member := tar.next()) is not None:
            # Without the mode and time of the archive: the store that it is imported into takes over these files.
            tar.extract(member, folder, set_attrs=False, filter="data")
            os.chmod(folder / member.name, 0o600)
            if on_progress is not None:
                on_progress(TransferProgress(step="unpack", size_bytes=file.tell(), size_bytes_total=total))
        for name in _DATABASES:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if _sha256(folder / name) != header["sha256"][name]:
                raise ValueError(f"the bytes of {name} do not match their SHA-256")
        return str(header["collection"])


def _verify(store: Store) -> None:
    """Check blobs and rows; SQLite takes any value in any column, and an archive may come from anywhere.

    Raises:
        ValueError: The store is not what an export writes.
    """
    report = store.check()
    if not report.ok:
        faults = {name: getattr(report, name) for name in ("damaged", "missing", "misfiled", "orphans", "strays")}
        told = ", ".join(f"{len(keys)} {name}" for name, keys in faults.items() if keys)
        raise ValueError(f"its blobs are not those of its catalog: {told}")
    with store.catalog.read() as session:
        for table in Base.__subclasses__():
            for row in session.scalars(select(table).execution_options(yield_per=5)):
                _check_types(row)
                if isinstance(row, FingerprintRow) and _digest(row.json) != row.digest:
                    raise ValueError("a fingerprint does not match its digest")
                if isinstance(row, CacheRow) and session.get(FingerprintRow, row.fingerprint) is None:
                    raise ValueError(f"a cache has no fingerprint {row.fingerprint[:80]!r}")
                if isinstance(row, CacheRow | PassageRow) and not is_blob_key(row.text_sha256):
                    raise ValueError(f"{row.text_sha256[:80]!r} is not a SHA-256")
                if isinstance(row, PassageRow) and row.text is not None and _digest(row.text) != row.text_sha256:
                    raise ValueError("the text of a passage does not match its SHA-256")
                if isinstance(row, PassageRow) and not _fits(row.encoder, row.vector):
                    raise ValueError("a passage has a malformed vector, or one without an encoder")
                terms = (row.terms or {}) if isinstance(row, PassageRow) else {}
                if not all(_WORD_HASH.fullmatch(word) and type(n) is int and n > 0 for word, n in terms.items()):
                    raise ValueError("the terms of a passage must map hashes of words to positive integers")


def _fits(encoder: str, vector: bytes | None) -> bool:
    """Whether both are there, as finite float16 numbers, or neither."""
    if vector is None:
        return not encoder
    if not encoder or not vector or len(vector) % 2:
        return False
    return bool(np.isfinite(np.frombuffer(vector, dtype="<f2")).all())


def _check_types(row: Base) -> None:
    for attribute in inspect(type(row)).column_attrs:
        column, value = attribute.columns[0], getattr(row, attribute.key)
        expected = _PYTHON_TYPES.get(type(column.type), column.type.python_type)
        if not (column.nullable if value is None else isinstance(value, expected)):
            raise ValueError(f"{attribute.key} is {str(value)[:40]!r} in a row of {type(row).__tablename__}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _as_damage(source: Path) -> Iterator[None]:
    """Map what damaged or forged data may raise to `TransferError`."""
    try:
        yield
    except (StoreError, CorruptCacheError, *_MALFORMED) as error:
        if isinstance(error, StoreError) and type(error) is not StoreError:
            raise  # no space, no permission, a newer version
        what = error.what if isinstance(error, KVMemoryError) else error
        raise TransferError(
            f"the archive is damaged, incomplete or was altered: {what}", where=str(source), next_step=_AGAIN
        ) from error
