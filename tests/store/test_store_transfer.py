"""A collection copied into another store and packed into a file: there and back, interrupted, damaged, forged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import sqlite3
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from store_samples import FINGERPRINT, OTHER, blob_file, document, equal, make_cache, sha

from kv_memory.errors import ConfigError, KVMemoryError, StoreError, StoreFullError, StoreVersionError, TransferError
from kv_memory.memory import KVMemory
from kv_memory.retrieval.hashed_terms import Terms
from kv_memory.store import (
    CacheInfo,
    Store,
    TransferProgress,
    copy_collection,
    export_collection,
    import_archive,
    open_archive,
)
from kv_memory.store.blobs.local import blob_key
from kv_memory.store.sql.schema import CacheRow, PassageRow
from tests.memories import FERRY_QUESTION, LAMP_QUESTION, SETTINGS, open_memory

NOW = datetime(2026, 5, 4, 3, 2, 1, 567, tzinfo=UTC)


def fill(store: Store, n: int = 3) -> None:
    """`n` documents of two passages, one of which they all have; every kind of row."""
    store.update_settings({"model": "tiny", "keep_ratio": 0.25})
    store.put(sha("shared"), make_cache(99))
    for i in range(n):
        store.put(sha(f"text {i}"), make_cache(i), fidelity=0.1 * i)
        store.put_document(document(f"d{i:03}", f"text {i}", "shared", metadata={"n": i, "ü": [None, "\ud800"]}))
    store.put(sha("text 0"), make_cache(7, keep_ratio=0.5, fingerprint=OTHER), storage="int8")
    store.put_document(document("twin", "twin", source_uri="file:///twin", passage_tokens=64))
    store.put(sha("waiting"), make_cache(50))  # belongs to no document, so it stays at home
    store.put_prefix("p", b"prefix")
    with store.catalog.write() as session:
        row = session.scalars(select(CacheRow).where(CacheRow.text_sha256 == sha("text 1"))).one()
        # Two rows with one blob, as in stores from before blobs said what text they are of.
        store._cache_table.references.verified_blobs.blobs.delete(row.blob_key)
        data = make_cache(1).to_bytes()
        row.blob_key, row.size_bytes = blob_key(data), len(data)
        store._cache_table.references.verified_blobs.put(row.blob_key, data)
        names = [column.name for column in CacheRow.__table__.columns if column.name != "id"]
        session.add(CacheRow(**{name: getattr(row, name) for name in names} | {"text_sha256": sha("twin")}))
        session.flush()
        session.execute(
            update(CacheRow)
            .where(CacheRow.text_sha256 == sha("text 1"))
            .values(pinned=True, created_at=NOW, last_used_at=NOW + timedelta(1), expires_at=NOW + timedelta(10**5))
        )


def contents(store: Store) -> dict[str, Any]:
    """All that travels, without the numbers of the store."""
    wanted = [info for info in store.caches() if store.text(info.text_sha256) is not None]
    prefix = store.get_prefix("p")
    return {
        "settings": store.settings(),
        "documents": [replace(store.document(d.id), updated_at=None) for d in store.documents()],
        "caches": sorted(wanted, key=lambda info: (info.text_sha256, info.fingerprint)),
        "prefix": None if prefix is None else prefix.read_bytes(),
        "blobs": {info.blob_key: blob_bytes(store, info) for info in wanted},
    }


def blob_bytes(store: Store, info: CacheInfo) -> bytes:
    return store._cache_table.references.verified_blobs.verified_path(info.blob_key, info.size_bytes).read_bytes()


@pytest.fixture(scope="session")
def _filled(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder with a store and its archive, to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    with Store.open(shutil.copytree(empty_store, folder / "store"), create=False) as store:
        fill(store)
        export_collection(store, folder / "all.tar")
    return folder


@pytest.fixture
def full(tmp_path: Path, _filled: Path) -> Iterator[Store]:
    with Store.open(shutil.copytree(_filled / "store", tmp_path / "store"), create=False) as opened:
        yield opened


@pytest.fixture
def archive(tmp_path: Path, _filled: Path) -> Path:
    return Path(shutil.copy(_filled / "all.tar", tmp_path / "all.tar"))


@pytest.fixture
def fresh(tmp_path: Path, empty_store: Path) -> Iterator[Store]:
    with Store.open(shutil.copytree(empty_store, tmp_path / "fresh"), create=False) as opened:
        yield opened


def test_an_exported_collection_is_imported_unchanged(full: Store, fresh: Store, tmp_path: Path) -> None:
    told: list[TransferProgress] = []
    report = export_collection(full, tmp_path / "all.tar", on_progress=told.append)
    assert (report.n_documents, report.n_caches, report.n_blobs) == (4, 6, 6)
    assert (report.changed, report.damaged) == (False, ())
    assert report.size_bytes == (tmp_path / "all.tar").stat().st_size
    came = import_archive(tmp_path / "all.tar", fresh, on_progress=told.append)
    assert (came.n_added, came.n_caches, came.n_caches_present, came.conflicts) == (4, 6, 0, ())
    assert contents(fresh) == contents(full)
    assert fresh.revision > 0  # so that the index is made anew
    assert equal(fresh.get(sha("text 1"), FINGERPRINT, 0.25), make_cache(1))
    assert fresh.check().ok and fresh.check().unreferenced == ()
    (kept,) = [c for c in fresh.caches() if c.text_sha256 == sha("text 1")]
    assert (kept.pinned, kept.created_at, kept.last_used_at) == (True, NOW, NOW + timedelta(1))
    assert list(dict.fromkeys(p.step for p in told)) == ["copy", "pack", "unpack", "verify", "copy"]
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
    assert len(names) == 3 + 6 and all(name.startswith("blobs/") for name in names[3:])
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600


def test_an_empty_collection_is_exported_and_imported(store: Store, fresh: Store, tmp_path: Path) -> None:
    store.update_settings({"model": "tiny"})
    assert export_collection(store, tmp_path / "none.tar").n_documents == 0
    assert import_archive(tmp_path / "none.tar", fresh).n_documents == 0
    assert fresh.settings() == {"model": "tiny"}


def test_passages_without_their_text_are_copied(full: Store, fresh: Store) -> None:
    terms = Terms.of(["walrus", "walrus"], full.word_key())
    with full.catalog.write() as session:
        session.execute(
            update(PassageRow).where(PassageRow.text_sha256 == sha("text 0")).values(text=None, terms=terms.to_dict())
        )
    copy_collection(full, fresh)
    with fresh.catalog.read() as session:
        row = session.scalars(select(PassageRow).where(PassageRow.text_sha256 == sha("text 0"))).one()
        assert (row.text, row.terms) == (None, terms.to_dict())
        others = session.scalars(select(PassageRow).where(PassageRow.terms.is_not(None))).all()
        assert len(others) == 1


ELSEWHERE = [
    pytest.param("sqlite-folder"),
    pytest.param("postgres-disk", marks=pytest.mark.postgres),
    pytest.param("sqlite-s3", marks=pytest.mark.s3),
    pytest.param("postgres-s3", marks=[pytest.mark.postgres, pytest.mark.s3]),
]


@pytest.mark.parametrize("pair", ELSEWHERE)
def test_transfer_works_between_all_kinds_of_store(
    full: Store, fresh: Store, tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str
) -> None:
    expected = contents(full)
    with Store.open(tmp_path / "elsewhere", **place(pair)) as elsewhere:
        assert copy_collection(full, elsewhere).n_added == 4
        assert contents(elsewhere) == expected and elsewhere.check().ok
        export_collection(elsewhere, tmp_path / "all.tar")
        copy = elsewhere.in_collection("copy")
        assert import_archive(tmp_path / "all.tar", copy).n_added == 4
        assert contents(copy) == expected and elsewhere.check().ok
    import_archive(tmp_path / "all.tar", fresh)
    assert contents(fresh) == expected


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


# conflicts


def test_a_collection_with_other_settings_is_refused(fresh: Store, full: Store) -> None:
    fresh.update_settings({"model": "other", "more": 1})
    copy_collection(full, fresh)  # empty: the settings come along
    assert fresh.settings() == full.settings()
    fresh.update_settings({"model": "other"})
    before = contents(fresh)
    with pytest.raises(TransferError, match='model is "tiny" there, "other" here') as caught:
        copy_collection(full, fresh)
    assert "--collection" in str(caught.value) and contents(fresh) == before


@pytest.mark.parametrize("choice", ["refuse", "skip", "replace"])
def test_conflicting_documents_follow_on_conflict(fresh: Store, full: Store, choice: Any) -> None:
    fresh.update_settings(full.settings())
    fresh.put(sha("mine"), make_cache(60))
    fresh.put_document(document("d001", "mine"))
    fresh.put_document(document("own", "own"))
    before = contents(fresh)
    if choice == "refuse":
        with pytest.raises(TransferError, match="document 'd001'"):
            copy_collection(full, fresh)
        assert contents(fresh) == before
        return
    report = copy_collection(full, fresh, on_conflict=choice)
    assert [d.id for d in fresh.documents()] == ["d000", "d001", "d002", "own", "twin"]
    texts = [p.text for p in fresh.document("d001").passages]
    assert report.conflicts == (("d001",) if choice == "skip" else ())
    assert texts == (["mine"] if choice == "skip" else ["text 1", "shared"])
    assert fresh.has(sha("mine"), FINGERPRINT, 0.25) == (choice == "skip")
    assert fresh.has(sha("text 1"), FINGERPRINT, 0.25) == (choice == "replace")
    assert report.n_caches_left_out == (1 if choice == "skip" else 0)
    assert fresh.check().ok and fresh.check().unreferenced == ()


def test_replace_updates_metadata_of_equal_texts_too(fresh: Store, full: Store) -> None:
    copy_collection(full, fresh)
    fresh.put_document(replace(fresh.document("twin"), metadata={"mine": True}))
    assert copy_collection(full, fresh).n_unchanged == 4
    assert fresh.document("twin").metadata == {"mine": True}
    assert copy_collection(full, fresh, on_conflict="replace").n_replaced == 1
    assert fresh.document("twin").metadata == {}


def test_an_unknown_on_conflict_is_a_config_error(fresh: Store, full: Store) -> None:
    with pytest.raises(ConfigError):
        copy_collection(full, fresh, on_conflict="ask")  # type: ignore[arg-type]


def test_copying_repairs_damaged_caches(fresh: Store, full: Store) -> None:
    copy_collection(full, fresh)
    key = next(c.blob_key for c in fresh.caches() if c.text_sha256 == sha("text 2"))
    blob_file(fresh, key).write_bytes(b"x")
    assert copy_collection(full, fresh).n_caches == 1
    assert equal(fresh.get(sha("text 2"), FINGERPRINT, 0.25), make_cache(2))


@pytest.mark.parametrize("when", ["before the export", "before the import"])
def test_expired_caches_are_not_transferred(full: Store, fresh: Store, tmp_path: Path, when: str) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=1.5 if when == "before the import" else -1)
    with full.catalog.write() as session:
        session.execute(update(CacheRow).where(CacheRow.text_sha256 == sha("text 1")).values(expires_at=expires_at))
    report = export_collection(full, tmp_path / "all.tar")
    assert report.n_caches == (6 if when == "before the import" else 5)
    time.sleep(max(0.0, (expires_at - datetime.now(UTC)).total_seconds() + 0.01))
    assert import_archive(tmp_path / "all.tar", fresh).n_caches_left_out == report.n_caches - 5
    assert not fresh.has(sha("text 1"), FINGERPRINT, 0.25) and fresh.has(sha("twin"), FINGERPRINT, 0.25)
    assert len(fresh.caches()) == 5


def test_the_size_limit_holds_while_copying(fresh: Store, full: Store) -> None:
    limit = full.stats().cache_bytes // 2
    fresh.set_limits(replace(fresh.limits(), max_size_bytes=limit))
    report = copy_collection(full, fresh)
    assert 1 <= report.n_evicted <= 5 and len(fresh.caches()) == 6 - report.n_evicted
    assert sum(c.size_bytes for c in fresh.caches()) <= limit
    assert "d000" in {d.id for d in fresh.documents()} and fresh.check().ok


# interrupted, changed meanwhile, damaged in the source


class Stop(Exception):  # noqa: N818
    pass


def stop_after(n: int) -> Callable[[TransferProgress], None]:
    seen: list[int] = []

    def told(progress: TransferProgress) -> None:
        seen.append(1)
        if len(seen) == n:
            raise Stop

    return told


@pytest.mark.parametrize("n", [1, 3, 6, 9])
def test_an_interrupted_copy_leaves_whole_documents_and_resumes(full: Store, fresh: Store, n: int) -> None:
    with pytest.raises(Stop):
        copy_collection(full, fresh, on_progress=stop_after(n))
    assert fresh.missing(FINGERPRINT, 0.25) == []
    assert fresh.check().ok
    report = copy_collection(full, fresh)
    assert report.n_caches + report.n_caches_present == 6
    assert contents(fresh) == contents(full)


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


def test_a_document_that_never_stays_the_same_is_an_error(full: Store, fresh: Store) -> None:
    def change(progress: TransferProgress) -> None:
        full.put_document(full.document("d000"))
        fresh.delete(sha("text 0"))

    with pytest.raises(TransferError, match="document 'd000'"):
        copy_collection(full, fresh, on_progress=change)
    assert fresh.documents() == []


def test_damaged_caches_are_left_out_of_an_export_and_reported(full: Store, fresh: Store, tmp_path: Path) -> None:
    info = next(c for c in full.caches() if c.text_sha256 == sha("text 2"))
    blob_file(full, info.blob_key).write_bytes(b"x" * info.size_bytes)
    report = export_collection(full, tmp_path / "all.tar")
    assert report.damaged == (info.blob_key,) and report.n_caches == 5
    import_archive(tmp_path / "all.tar", fresh)
    assert [p.text for p in fresh.missing(FINGERPRINT, 0.25)] == ["text 2"]


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


ALIEN, DAMAGED = "does not belong", "damaged, missing or of another text"
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
    "a blob less": (lambda parts: parts.pop(4), DAMAGED),
    "a blob more": (lambda parts: parts.append((tarfile.TarInfo("blobs/a/b.val"), b"x")), DAMAGED),
    "another blob under the name": (lambda parts: parts.__setitem__(3, (parts[3][0], parts[4][1])), DAMAGED),
    "no catalog": (lambda parts: parts.pop(1), "catalog.sqlite is missing"),
    "another catalog": (lambda parts: parts.__setitem__(1, (parts[1][0], parts[2][1])), "do not match their SHA-256"),
    "no header": (lambda parts: parts.pop(0), "not a kv-memory archive"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_archive_is_refused(fresh: Store, archive: Path, forgery: str) -> None:
    parts = members(archive)
    forge, what = FORGERIES[forgery]
    forge(parts)
    write(archive, parts)
    with pytest.raises(TransferError, match=what):
        import_archive(archive, fresh)
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
    "UPDATE passage SET terms = '{}'",
    "UPDATE passage SET n_tokens = 'many'",
    "UPDATE document SET metadata = '[]'",
    "UPDATE document SET metadata = 'no JSON'",
    "UPDATE document SET content_sha256 = x'00'",
    "UPDATE prefix SET blob_key = 'x'",
    "UPDATE collection SET name = 'other'",
    "DROP TABLE passage",
    "DROP TABLE alembic_version",
]


@pytest.mark.parametrize("edit", EDITS)
def test_invalid_rows_are_refused(fresh: Store, archive: Path, tmp_path: Path, edit: str) -> None:
    """Also with the right hash, which a forger would write anew."""
    with_catalog(archive, tmp_path / "catalog", edit)
    with pytest.raises(TransferError, match="was altered"):
        import_archive(archive, fresh)
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
    with pytest.raises(StoreVersionError, match="schema 9999"):
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(
    run_script: Callable[..., Any], tmp_path: Path, empty_store: Path
) -> None:
    """Seven times the documents, and 5 MB of text more: a document at a time is in memory, and no list of all."""
    folder = shutil.copytree(empty_store, tmp_path / "big")
    done = run_script(GROWTH, folder, tmp_path / "big.tar", tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert large - small < 500_000, (small, large)


GROWTH = """
import json, tracemalloc
from kv_memory.store import export_collection, import_archive

peaks = []
for start, stop in ((0, 40), (40, 280)):
    with Store.open(sys.argv[1]) as store:
        for i in range(start, stop):
            store.put_document(document(f"d{i:06}", f"{i} " + "word " * 4000))
        tracemalloc.start()
        export_collection(store, sys.argv[2])
        with Store.open(sys.argv[3] + str(stop)) as copy:
            assert import_archive(sys.argv[2], copy).n_added == stop
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
print(json.dumps(peaks))
"""
