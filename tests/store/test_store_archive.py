"""A collection as one file: there and back, interrupted, damaged, forged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from filled_store import NOW, Stop, contents, stop_after
from sqlalchemy import update
from store_samples import FINGERPRINT, blob_file, document, equal, make_cache, sha

from kv_memory.errors import KVMemoryError, StoreError, StoreFullError, TransferError
from kv_memory.memory import KVMemory
from kv_memory.store import Store, TransferProgress, export_collection, import_archive, open_archive
from kv_memory.store.sql.schema import CacheRow
from tests.memories import FERRY_QUESTION, LAMP_QUESTION, SETTINGS, open_memory


def test_an_exported_collection_is_imported_unchanged(full: Store, fresh: Store, tmp_path: Path) -> None:
    told: list[TransferProgress] = []
    report = export_collection(full, tmp_path / "all.tar", on_progress=told.append)
    assert (report.n_documents, report.n_caches, report.n_blobs) == (4, 6, 7)
    assert (report.changed, report.damaged) == (False, ())
    assert report.size_bytes == (tmp_path / "all.tar").stat().st_size
    came = import_archive(tmp_path / "all.tar", fresh, on_progress=told.append)
    assert (came.n_added, came.n_caches, came.n_caches_present, came.conflicts) == (4, 6, 0, ())
    assert contents(fresh) == contents(full)
    assert fresh.revision > 0  # so that retrieval rebuilds its index
    assert equal(fresh.get(sha("text 1"), FINGERPRINT, 0.25), make_cache(1))
    assert fresh.check().ok and fresh.check().unreferenced == ()
    (kept,) = [c for c in fresh.caches() if c.text_sha256 == sha("text 1")]
    assert (kept.pinned, kept.created_at, kept.last_used_at) == (True, NOW, NOW + timedelta(1))
    assert [step for step, _ in groupby(p.step for p in told)] == ["copy", "pack", "unpack", "verify", "copy"]
    assert told[-1].n_documents == 4 and all(p.size_bytes <= p.size_bytes_total for p in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "fresh", "store"]


def test_a_second_import_changes_nothing(fresh: Store, archive: Path) -> None:
    import_archive(archive, fresh)
    before, revision = contents(fresh), fresh.revision
    again = import_archive(archive, fresh)
    assert (again.n_unchanged, again.n_added, again.n_caches, again.n_caches_present) == (4, 0, 0, 6)
    assert (contents(fresh), fresh.revision) == (before, revision)


def test_any_tar_lists_an_archive_and_it_names_no_user(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert all(member.isfile() and member.mode == 0o600 and member.uname == "" for member in tar)
    assert names[:3] == ["kv-memory.json", "catalog.sqlite", "blobs/cache.db"]
    assert len(names) == 3 + 7 and all(name.startswith("blobs/") for name in names[3:])
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600


def test_an_empty_collection_is_exported_and_imported(store: Store, fresh: Store, tmp_path: Path) -> None:
    store.update_settings({"model": "tiny"})
    assert export_collection(store, tmp_path / "none.tar").n_documents == 0
    assert import_archive(tmp_path / "none.tar", fresh).n_documents == 0
    assert fresh.settings() == {"model": "tiny"}


def test_an_exported_store_answers_elsewhere(memory: KVMemory, wide: Any, tmp_path: Path) -> None:
    questions = (FERRY_QUESTION, LAMP_QUESTION)
    expected = [memory.ask(question, top_k=1, settings=SETTINGS) for question in questions]
    export_collection(memory.store, tmp_path / "memory.tar")
    with Store.open(tmp_path / "laptop") as laptop:
        import_archive(tmp_path / "memory.tar", laptop)
    with open_memory(tmp_path / "laptop", wide) as elsewhere:
        answers = [elsewhere.ask(question, top_k=1, settings=SETTINGS) for question in questions]
    assert [a.text for a in answers] == [a.text for a in expected]
    assert [a.n_cached_tokens for a in answers] == [a.n_cached_tokens for a in expected]
    assert not any(a.fallbacks for a in answers)


@pytest.mark.parametrize("when", ["before the export", "before the import"])
def test_expired_caches_are_not_transferred(full: Store, fresh: Store, tmp_path: Path, when: str) -> None:
    if when == "before the export":
        expired = update(CacheRow).where(CacheRow.text_sha256 == sha("text 1"))
        with full.catalog.write() as session:
            session.execute(expired.values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    report = export_collection(full, tmp_path / "all.tar")
    assert report.n_caches == (6 if when == "before the import" else 5)
    if when == "before the import":
        edit = "UPDATE distilled_cache SET expires_at = '2020-01-01 00:00:00.000000' "
        with_catalog(tmp_path / "all.tar", tmp_path / "catalog", f"{edit} WHERE text_sha256 = '{sha('text 1')}'")
    assert import_archive(tmp_path / "all.tar", fresh).n_caches_left_out == report.n_caches - 5
    assert not fresh.has(sha("text 1"), FINGERPRINT, 0.25) and fresh.has(sha("twin"), FINGERPRINT, 0.25)
    assert len(fresh.caches()) == 5


# interrupted, changed meanwhile, damaged in the source


@pytest.mark.parametrize("n", [3, 12])
def test_an_interrupted_export_leaves_the_old_archive_and_nothing_else(full: Store, archive: Path, n: int) -> None:
    before, names = archive.read_bytes(), sorted(archive.parent.iterdir())
    full.delete_document("twin")
    with pytest.raises(Stop):
        export_collection(full, archive, on_progress=stop_after(n))
    assert (archive.read_bytes(), sorted(archive.parent.iterdir())) == (before, names)
    export_collection(full, archive)
    assert archive.read_bytes() != before


def test_changes_during_an_export_leave_every_document_whole(full: Store, fresh: Store, tmp_path: Path) -> None:
    changes: list[Callable[[], object]] = [
        lambda: full.put_document(document("d000", "changed")),  # the document that is being copied
        lambda: full.delete_document("d001"),
        lambda: full.delete_document("twin"),
        lambda: full.put_document(document("zzz", "new")),
    ]

    def change(progress: TransferProgress) -> None:
        if changes:
            changes.pop(0)()

    report = export_collection(full, tmp_path / "all.tar", on_progress=change)
    assert report.changed
    import_archive(tmp_path / "all.tar", fresh)
    assert [d.id for d in fresh.documents()] == ["d000", "d002", "zzz"] and fresh.check().ok
    for summary in fresh.documents():
        for passage in fresh.document(summary.id).passages:
            if passage.text not in {"changed", "new"}:
                fresh.get(passage.text_sha256, FINGERPRINT, 0.25)


def test_damaged_caches_are_left_out_of_an_export_and_reported(full: Store, fresh: Store, tmp_path: Path) -> None:
    info = next(c for c in full.caches() if c.text_sha256 == sha("text 2"))
    blob_file(full, info.blob_key).write_bytes(b"x" * info.size_bytes)
    report = export_collection(full, tmp_path / "all.tar")
    assert report.damaged == (info.blob_key,) and report.n_caches == 5
    import_archive(tmp_path / "all.tar", fresh)
    assert [p.text for p in fresh.missing(FINGERPRINT, 0.25)] == ["text 2"]


def test_a_row_with_the_blob_of_another_text_is_left_out_of_an_export(
    full: Store, fresh: Store, tmp_path: Path
) -> None:
    other = next(c for c in full.caches() if c.text_sha256 == sha("text 0") and c.keep_ratio == 0.25)
    with full.catalog.write() as session:
        row = update(CacheRow).where(CacheRow.text_sha256 == sha("text 2"))
        session.execute(row.values(blob_key=other.blob_key, size_bytes=other.size_bytes))
    report = export_collection(full, tmp_path / "all.tar")
    assert report.damaged == (sha("text 2"),) and report.n_caches == 5
    import_archive(tmp_path / "all.tar", fresh)
    assert [p.text for p in fresh.missing(FINGERPRINT, 0.25)] == ["text 2"]


def test_an_archive_is_checked_before_it_gets_its_name(full: Store, tmp_path: Path) -> None:
    def damage(progress: TransferProgress) -> None:
        for blob in tmp_path.glob("all.tar.part-*/store/blobs/*/*.val"):
            blob.write_bytes(b"x")

    with pytest.raises(TransferError, match="damaged while it was written"):
        export_collection(full, tmp_path / "all.tar", on_progress=damage)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(("name", "what"), [("no/such.tar", "no such folder"), ("folder", "this is not a file")])
def test_export_to_an_unwritable_path_is_refused(full: Store, tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TransferError, match=what):
        export_collection(full, tmp_path / name)


@pytest.mark.parametrize("method", ["addfile", "extract"])
def test_a_full_disk_is_reported_as_such(
    full: Store, fresh: Store, archive: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before, names = archive.read_bytes(), sorted(archive.parent.iterdir())
    monkeypatch.setattr(tarfile.TarFile, method, fail)
    with pytest.raises(StoreFullError, match="no space left"):
        if method == "addfile":
            export_collection(full, archive)
        else:
            import_archive(archive, fresh)
    assert (archive.read_bytes(), sorted(archive.parent.iterdir())) == (before, names)
    assert (fresh.documents(), fresh.caches()) == ([], [])


# damage


def refused(archive: Path, expected: dict[str, Any]) -> bool:
    """Whether an archive is refused, by a typed error and without a trace; otherwise it is complete and correct."""
    names = sorted(archive.parent.iterdir())
    try:
        with open_archive(archive) as opened:
            assert contents(opened) == expected
            return False
    except TransferError as error:
        assert error.where == str(archive) and error.next_step
        return True
    finally:
        assert sorted(archive.parent.iterdir()) == names


def test_a_truncated_archive_is_refused(full: Store, archive: Path) -> None:
    data, expected = archive.read_bytes(), contents(full)
    end = len(data.rstrip(b"\0"))
    for length in [0, 100, 512, *(random.Random(0).randrange(end) for _ in range(20))]:
        archive.write_bytes(data[:length])
        assert refused(archive, expected), length


def test_a_flipped_bit_is_refused_or_harmless(full: Store, archive: Path) -> None:
    data, expected, chosen = archive.read_bytes(), contents(full), random.Random(0)
    members = [(0, 1536), (1536, 123_904 + 1024), (0, len(data))]  # header, catalog, all
    n_refused = 0
    for first, last in members * 12:
        flipped = bytearray(data)
        flipped[chosen.randrange(first, last)] ^= 1 << chosen.randrange(8)
        archive.write_bytes(flipped)
        n_refused += refused(archive, expected)
    assert n_refused > 24


Members = list[tuple[tarfile.TarInfo, bytes]]


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write(archive: Path, parts: Members) -> None:
    with tarfile.open(archive, "w") as tar:
        for member, data in parts:
            member.size = len(data) if member.isfile() else 0
            tar.addfile(member, io.BytesIO(data))


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


ALIEN, UNLIKE = "does not belong", "not those of its catalog"
FORGERIES: dict[str, tuple[Callable[[Members], object], str]] = {
    "absolute": (lambda parts: parts.insert(2, (tarfile.TarInfo("/etc/cron.d/evil"), b"x")), ALIEN),
    "dots": (lambda parts: parts.insert(2, (tarfile.TarInfo("blobs/../../evil.val"), b"x")), ALIEN),
    "other servers": (lambda parts: parts.insert(2, (tarfile.TarInfo("store.json"), b"{}")), ALIEN),
    "other servers by dots": (lambda parts: parts.insert(2, (tarfile.TarInfo("blobs/../store.json"), b"{}")), ALIEN),
    "symlink": (lambda parts: parts.insert(2, (link("blobs/link.val", tarfile.SYMTYPE), b"")), ALIEN),
    "hardlink": (lambda parts: parts.insert(2, (link("blobs/link.val", tarfile.LNKTYPE), b"")), ALIEN),
    "device": (lambda parts: parts.insert(2, (link("blobs/dev.val", tarfile.CHRTYPE), b"")), ALIEN),
    "folder": (lambda parts: parts.insert(1, (link("blobs/", tarfile.DIRTYPE), b"")), ALIEN),
    "link in place of a blob": (lambda parts: setattr(parts[4][0], "type", tarfile.SYMTYPE), ALIEN),
    "a long name": (lambda parts: parts.insert(2, (tarfile.TarInfo("blobs/" + "x" * 300 + ".val"), b"x")), ALIEN),
    "a blob less": (lambda parts: parts.pop(4), UNLIKE),
    "a blob more": (lambda parts: parts.append((tarfile.TarInfo("blobs/a/b.val"), b"x")), UNLIKE),
    "another blob under the name": (lambda parts: parts.__setitem__(3, (parts[3][0], parts[4][1])), UNLIKE),
    "no catalog": (lambda parts: parts.pop(1), "catalog.sqlite is missing"),
    "another catalog": (lambda parts: parts.__setitem__(1, (parts[1][0], parts[2][1])), "do not match their SHA-256"),
    "no header": (lambda parts: parts.pop(0), "not a kv-memory archive"),
}


def test_a_forged_archive_is_refused(fresh: Store, archive: Path) -> None:
    whole = archive.read_bytes()
    for forgery, (forge, what) in FORGERIES.items():
        archive.write_bytes(whole)
        parts = members(archive)
        forge(parts)
        write(archive, parts)
        with pytest.raises(TransferError, match=what):
            import_archive(archive, fresh)
            pytest.fail(f"imported: {forgery}")
    assert (fresh.documents(), fresh.caches(), fresh.settings()) == ([], [], {})
    assert sorted(path.name for path in archive.parent.iterdir()) == ["all.tar", "fresh"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [-512, 2**40, 2**62])
def test_a_member_of_absurd_size_is_refused(archive: Path, kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("blobs/a/b.val")
    info.type, info.size = kind, size
    first = 512 + 512  # the header and its contents
    data = archive.read_bytes()
    archive.write_bytes(data[:first] + info.tobuf(tarfile.GNU_FORMAT) + data[first:])
    assert refused(archive, {})


HEX = "0" * 64
EDITS = [
    "UPDATE distilled_cache SET keep_ratio = 0.125",
    "UPDATE distilled_cache SET keep_ratio = 'much'",
    "UPDATE distilled_cache SET size_bytes = 1",
    "UPDATE distilled_cache SET created_at = 'yesterday'",
    "UPDATE distilled_cache SET n_kept = x'00'",
    f"UPDATE distilled_cache SET text_sha256 = '{HEX}' WHERE keep_ratio = 0.5",
    f"UPDATE distilled_cache SET fingerprint = '{HEX}'",
    f"UPDATE distilled_cache SET blob_key = '{HEX}' WHERE keep_ratio = 0.5",
    "UPDATE distilled_cache SET blob_key = '../../x'",
    "UPDATE fingerprint SET json = '{}'",
    "UPDATE passage SET text = 'other' WHERE text = 'text 0'",
    "UPDATE passage SET text_sha256 = '../../x', text = NULL",
    "UPDATE passage SET terms = '{\"a\": 1}'",
    "UPDATE passage SET n_tokens = 'many'",
    "UPDATE document SET metadata = '[]'",
    "UPDATE document SET metadata = 'no JSON'",
    f"UPDATE document SET metadata = '{'[' * 100_000}'",
    "UPDATE document SET content_sha256 = x'00'",
    "UPDATE prefix SET blob_key = 'x'",
    "UPDATE collection SET name = 'other'",
    "DROP TABLE passage",
    "DROP TABLE alembic_version",
]


def test_invalid_rows_are_refused(fresh: Store, archive: Path, tmp_path: Path) -> None:
    """Also with the right hash, which a forger would compute again."""
    whole = archive.read_bytes()
    for edit in EDITS:
        archive.write_bytes(whole)
        with_catalog(archive, tmp_path / "catalog", edit)
        with pytest.raises(TransferError, match="was altered"):
            import_archive(archive, fresh)
            pytest.fail(f"imported after {edit[:80]}")
    assert (fresh.documents(), fresh.caches()) == ([], [])


def with_catalog(archive: Path, temporary: Path, edit: str) -> None:
    """Change the catalog of an archive with SQL."""
    parts = members(archive)
    temporary.write_bytes(parts[1][1])
    with closing(sqlite3.connect(temporary)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        connection.execute(edit)
    header = json.loads(parts[0][1])
    header["sha256"]["catalog.sqlite"] = hashlib.sha256(temporary.read_bytes()).hexdigest()
    parts[0] = (parts[0][0], json.dumps(header).encode())
    parts[1] = (parts[1][0], temporary.read_bytes())
    write(archive, parts)


def test_newer_archives_are_refused_by_number(fresh: Store, archive: Path, tmp_path: Path) -> None:
    with_catalog(archive, tmp_path / "catalog", "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="schema 9999"):
        import_archive(archive, fresh)
    parts = members(archive)
    parts[0] = (parts[0][0], parts[0][1].replace(b'"format": 1', b'"format": 2'))
    write(archive, parts)
    with pytest.raises(TransferError, match="format 2, this version reads 1"):
        import_archive(archive, fresh)


@pytest.mark.parametrize("data", [b"", b"x" * 5000, bytes(20480), b"kv-memory.json"])
def test_other_files_are_refused_as_archives(fresh: Store, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(TransferError, match="not a kv-memory archive"):
        import_archive(tmp_path / "x.tar", fresh)


def test_a_missing_archive_is_an_error(fresh: Store, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="no such archive"):
        import_archive(tmp_path / "nothing.tar", fresh)
    assert issubclass(TransferError, StoreError) and issubclass(StoreError, KVMemoryError)


def test_an_archive_in_a_read_only_folder_is_imported(fresh: Store, archive: Path) -> None:
    folder = archive.parent / "read-only"
    folder.mkdir()
    archive.rename(folder / "all.tar")
    folder.chmod(0o500)
    try:
        assert import_archive(folder / "all.tar", fresh).n_added == 4
    finally:
        folder.chmod(0o700)
