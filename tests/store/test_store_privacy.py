"""Who can read what the store writes, and what is left of what was deleted."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select
from store_samples import FINGERPRINT, OTHER, blob_file, document, equal, held, make_cache, samples_of, sha

from kv_memory.errors import CorruptCacheError, DocumentNotFoundError, StoreLockedError
from kv_memory.jobs.job_tables import JobRow, TaskRow
from kv_memory.jobs.ledger import forget_documents
from kv_memory.memory import KVMemory
from kv_memory.retrieval.hashed_terms import hash_word
from kv_memory.retrieval.retriever import Retriever
from kv_memory.store import Store, export_collection, import_archive
from kv_memory.store.sql import engine
from tests.memories import FERRY, FERRY_QUESTION, LAMP_QUESTION, SETTINGS, open_memory

RunScript = Callable[..., Any]


def modes(folder: Path) -> dict[str, int]:
    """Whatever others than the owner may do with it, by path."""
    found = {str(folder): stat.S_IMODE(folder.stat().st_mode)}
    found |= {str(path): stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*") if not path.is_symlink()}
    return {path: mode for path, mode in found.items() if mode & 0o077}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_can_read_stored_files(tmp_path: Path) -> None:
    home = tmp_path / "home"  # made by the store too, and so private
    found: dict[str, int] = {}
    with Store.open(home / "deep" / "store") as store:
        store.put_document(document("a", "text", "damaged"))
        store.put(sha("text"), make_cache(1))
        info = store.put(sha("damaged"), make_cache(2))
        store.put_prefix("p", b"prefix")
        assert Retriever(store).retrieve("text", top_k=1)
        blob_file(store, info.blob_key).write_bytes(b"x")
        with pytest.raises(CorruptCacheError):
            store.get(sha("damaged"), FINGERPRINT, 0.25)
        store.get(sha("text"), FINGERPRINT, 0.25)
        with pytest.raises(ZeroDivisionError):
            export_collection(store, home / "part.tar", on_progress=lambda _: 1 // 0)
        export_collection(store, home / "all.tar", on_progress=lambda _: found.update(modes(home)))
        with Store.open(home / "copy", collection="other") as copy:
            import_archive(home / "all.tar", copy, on_progress=lambda _: found.update(modes(home)))
            assert copy.stats().n_caches == 1
            assert modes(home) == {}
        # What was unpacked was in a folder that only its owner may enter.
        assert all(".unpacked-" in str(Path(path).parent) for path in found)
        names = {path.name for path in home.rglob("*")}
        assert {"catalog.sqlite-wal", "catalog.sqlite-shm", "cache.db-wal", "cache.db-shm", "bm25.index"} <= names
        assert {"all.tar", f"{info.blob_key}.safetensors"} <= names
        store.check()
        store.gc()
        store.purge("a")
        assert modes(home) == {}
    assert modes(home) == {}


SECRET, PUBLIC = (
    "The vault's code is Xylophone-Quagmire-4711. " * 4,
    "Nothing of note happened at Zwiebelturm today. " * 4,
)


def fill_with_secrets(store: Store) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A document to purge and one to keep; returns what gives each of them away."""
    keys = {}
    for seed, (id_, text) in enumerate({"secret-id-0123456789": SECRET, "public-id-0123456789": PUBLIC}.items()):
        data = {"note": f"metadata of {id_}"}
        keys[id_] = store.put(sha(text), make_cache(100 + seed, n_kept=40)).blob_key
        store.put_document(document(id_, text, metadata=data, source_uri=f"file:///{id_}.txt"))
    blobs = {id_: make_cache(100 + seed, n_kept=40).to_bytes() for seed, id_ in enumerate(keys)}
    secret, public = (
        samples_of(id_, blobs[id_], id_.encode(), f"metadata of {id_}".encode(), word, sha(text).encode(), key.encode())
        for (id_, key), text, word in zip(
            keys.items(), (SECRET, PUBLIC), (b"Xylophone-Quagmire", b"Zwiebelturm"), strict=True
        )
    )
    return secret, public


def test_purging_leaves_no_bytes_of_a_document(store: Store) -> None:
    secret, public = fill_with_secrets(store)
    assert Retriever(store).retrieve("xylophone", top_k=1)
    secret |= {"word": hash_word("xylophone").encode()}  # the index has hashes of words
    with store.catalog.write() as session:
        job = JobRow(name="j", collection_id=store.collection_id, state="done", sources={}, settings={})
        session.add(job)
        session.flush()
        for id_ in ("secret-id-0123456789", "public-id-0123456789"):
            session.execute(insert(TaskRow).values(job_id=job.id, document_id=id_, uri=f"file:///{id_}", state="done"))
    assert held(store.path, secret | public) == set(secret | public)
    forget_documents(store, ["secret-id-0123456789"])
    report = store.purge("secret-id-0123456789")
    assert (report.documents, report.n_blobs, report.n_blobs_shared) == (("secret-id-0123456789",), 1, 0)
    assert report.freed_bytes > 1000
    assert held(store.path, secret) == set()
    assert held(store.path, public) == set(public)
    assert store.check().ok and [d.id for d in store.documents()] == ["public-id-0123456789"]
    assert equal(store.get(sha(PUBLIC), FINGERPRINT, 0.25), make_cache(101, n_kept=40))
    assert [hit.document_id for hit in Retriever(store).retrieve("zwiebelturm", top_k=1)] == ["public-id-0123456789"]
    with store.catalog.read() as session:
        assert session.scalars(select(TaskRow.document_id)).all() == ["public-id-0123456789"]


def test_purging_without_an_id_wipes_removed_documents(store: Store) -> None:
    secret, public = fill_with_secrets(store)
    store.delete_document("secret-id-0123456789")
    assert held(store.path, secret)  # so that the next line says something
    assert store.purge().documents == ()
    assert held(store.path, secret) == set()
    assert held(store.path, public) == set(public)


def test_earlier_versions_of_a_document_are_purged_too(store: Store) -> None:
    secret, _ = fill_with_secrets(store)
    store.put_document(document("secret-id-0123456789", "harmless"))
    store.purge("secret-id-0123456789")
    assert held(store.path, secret) == set()


def test_quarantine_orphans_and_leftovers_are_purged(store: Store) -> None:
    secret, public = fill_with_secrets(store)
    (info,) = store.caches("secret-id-0123456789")
    data = bytearray(blob_file(store, info.blob_key).read_bytes())
    (store.path / "blobs" / "left.val.tmp").write_bytes(data)
    data[-1] ^= 1
    blob_file(store, info.blob_key).write_bytes(data)
    with pytest.raises(CorruptCacheError):
        store.get(sha(SECRET), FINGERPRINT, 0.25)
    orphan = make_cache(100, n_kept=40, fingerprint=OTHER).to_bytes()
    store.references.put_blobs({sha_of(orphan): orphan})
    report = store.purge("secret-id-0123456789")
    assert (report.n_quarantined, report.n_orphan_blobs, report.n_strays) == (1, 1, 1)
    assert held(store.path, secret) == set()
    assert held(store.path, public) == set(public)


def sha_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_purging_is_all_or_nothing(store: Store) -> None:
    fill_with_secrets(store)
    with pytest.raises(DocumentNotFoundError):
        store.purge("secret-id-0123456789", "no such document")
    assert len(store.documents()) == 2 and len(store.caches()) == 2


def test_purging_keeps_a_text_that_another_document_has(store: Store) -> None:
    store.put(sha("both"), make_cache(1))
    for id_ in "ab":
        store.put_document(document(id_, "both"))
    assert store.purge("a").n_blobs == 0
    assert equal(store.get(sha("both"), FINGERPRINT, 0.25), make_cache(1))


def test_purging_reports_a_reader_that_does_not_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, _ = fill_with_secrets(store)
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(store.path / "catalog.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM document").fetchone()
        with pytest.raises(StoreLockedError, match="remove --purge"):
            store.purge("secret-id-0123456789")
        reader.execute("COMMIT")
    assert [d.id for d in store.documents()] == ["public-id-0123456789"]
    store.purge()
    assert held(store.path, secret) == set()


def test_scrubbing_wipes_rows_deleted_without_secure_delete(tmp_path: Path) -> None:
    """Whether SQLite zeroes deleted rows is decided where it is built; so what it did not is made here."""
    file = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("CREATE TABLE t (text)")
        database.executemany("INSERT INTO t VALUES (?)", [(f"{SECRET} {i}",) for i in range(50)])
        database.execute("INSERT INTO t VALUES (?)", (PUBLIC,))
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("DELETE FROM t WHERE text LIKE '%Quagmire%'")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert b"Quagmire" in file.read_bytes()
        engine.scrub_sqlite(file)
        assert b"Quagmire" not in file.read_bytes() and b"Zwiebelturm" in file.read_bytes()
        assert (tmp_path / "x.sqlite-wal").read_bytes() == b""
    engine.scrub_sqlite(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()


PURGE_IN_ANOTHER = """
with Store.open(sys.argv[1], create=False) as store:
    store.purge(sys.argv[2])
"""


@pytest.mark.parametrize(
    "pair",
    [
        "sqlite-folder",
        pytest.param("postgres-folder", marks=pytest.mark.postgres),
        pytest.param("postgres-s3", marks=[pytest.mark.postgres, pytest.mark.s3]),
    ],
)
def test_purging_a_shared_store_removes_the_copies_on_each_machine(
    tmp_path: Path, place: Callable[[str], dict[str, Any]], pair: str
) -> None:
    where = place(pair)
    with Store.open(tmp_path / "a", **where) as here:
        secret, public = fill_with_secrets(here)
        if pair.startswith("sqlite"):
            other = tmp_path / "a"
        else:
            other = tmp_path / "b"
            with Store.open(other, **where) as there:
                there.get(sha(SECRET), FINGERPRINT, 0.25)
        assert {name for name in held(other, secret) if " blob at " in name}
        assert here.purge("secret-id-0123456789").n_blobs == 1
        assert held(tmp_path / "a", secret) == set()
        if other != tmp_path / "a":
            with Store.open(other, **where) as there:
                there.purge()
        assert held(tmp_path, secret) == set()  # the objects' folder too, where there is one
        assert {name for name in held(tmp_path, public) if " blob at " in name}
        assert equal(here.get(sha(PUBLIC), FINGERPRINT, 0.25), make_cache(101, n_kept=40))
        assert here.check().ok


def test_another_process_can_purge_an_open_store(store: Store, run_script: RunScript) -> None:
    secret, public = fill_with_secrets(store)
    mapped = store.get(sha(SECRET), FINGERPRINT, 0.25)
    done = run_script(PURGE_IN_ANOTHER, store.path, "secret-id-0123456789")
    assert done.returncode == 0, done.stderr
    assert held(store.path, secret) == set()
    assert equal(mapped, make_cache(100, n_kept=40))  # what is mapped stays until it is let go
    assert equal(store.get(sha(PUBLIC), FINGERPRINT, 0.25), make_cache(101, n_kept=40))
    store.put_document(document("new", "new"))
    assert store.check().ok and held(store.path, public) == set(public)


def test_purged_documents_are_not_retrieved(memory: KVMemory, wide: Any) -> None:
    assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).sources[0].document_id == "ferry"
    blob = next(p for p in (memory.path / "blobs").rglob("*.val") if p.stat().st_size > 1000).read_bytes()
    assert blob
    memory.store.purge("ferry")
    assert held(memory.path, {"text": FERRY.encode()[:32], "word": b"skarholm", "id": b"ferry"}) == set()
    assert [s.document_id for s in memory.ask(FERRY_QUESTION, settings=SETTINGS).sources] in ([], ["lamp"])
    assert memory.ask(LAMP_QUESTION, top_k=1, settings=SETTINGS).sources[0].document_id == "lamp"
    memory.add([("ferry", FERRY)])
    assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).sources[0].document_id == "ferry"
    with open_memory(memory.path, wide) as again:
        assert len(again.documents()) == 2
