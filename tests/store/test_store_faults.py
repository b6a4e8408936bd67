"""Full disks, forbidden folders and locked catalogs: real ones where the machine can make them."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from store_samples import FINGERPRINT, blob_files, document, equal, make_cache, sha

from kv_memory.errors import StoreError, StoreFullError, StoreLockedError
from kv_memory.store import Store
from kv_memory.store.sql import engine

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX limits and users")
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_no_partial_blob(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store.put(sha("x"), make_cache(1))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StoreFullError) as caught:
            store.put(sha("y"), make_cache(2))
    assert caught.value.next_step is not None and "kv-memory gc" in caught.value.next_step
    assert len(blob_files(store)) == 1
    report = store.check()
    assert report.ok
    assert report.n_blobs == 1
    store.put(sha("y"), make_cache(2))
    assert equal(store.get(sha("y"), FINGERPRINT, 0.25), make_cache(2))


FILL = """
import resource
folder, limit_bytes = sys.argv[1], int(sys.argv[2])
with Store.open(folder) as store:
    store.put_document(document("first", "0"))
    store.put(sha("0"), make_cache(0, n_kept=100))
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    n = 1
    try:
        while n < 400:
            store.put(sha(str(n)), make_cache(n, n_kept=1000))
            n += 1
    except StoreFullError as error:
        print("full", error.where)
    try:
        for i in range(200):
            store.put_document(document(f"long {i}", "z" * 100_000 + str(i)))
        print("no error")
    except StoreFullError as error:
        print("full", error.where)
    except StoreError as error:  # a file size limit is a plain I/O error to SQLite
        print("failed", error)
    assert store.documents()[0].id == "first"
    for i in range(n):  # everything that put() returned for is there
        n_kept = 1000 if i else 100
        assert equal(store.get(sha(str(i)), FINGERPRINT, 0.25), make_cache(i, n_kept=n_kept)), i
    print("n", n)
    assert not store.has(sha(str(n)), FINGERPRINT, 0.25)
    before = store.revision
    assert len(store.documents()) == before, "a document that failed counts"
if limit_bytes == 0:  # room again
    for junk in Path(folder).parent.glob("junk*"):
        junk.unlink()
    with Store.open(folder) as store:
        report = store.check()
        assert not report.damaged and not report.missing, report
        store.put(sha("again"), make_cache(1))
        store.gc()
        assert store.check().ok
print("done")
"""


@posix
def test_a_file_size_limit_is_reported_as_full(run_script: RunScript, tmp_path: Path) -> None:
    # Files may grow to 60 kB: enough for a new catalog's log, not for a cache of 1000 tokens.
    done = run_script(FILL, tmp_path / "store", 60_000)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.startswith("full ") and done.stdout.endswith("done\n")
    assert "no error" not in done.stdout


@posix
def test_a_full_disk_loses_no_stored_data(run_script: RunScript, tmp_path: Path) -> None:
    # A file system of 4 MiB of its own, in a namespace that goes with the process.
    wrapper = ("unshare", "--mount", "--user", "--map-root-user", "sh", "-ec")
    mount = f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}"; '
    if shutil.which("unshare") is None or subprocess.run([*wrapper, mount], capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    junk = f'head -c 500000 /dev/zero > "{tmp_path}/junk"; '
    done = run_script(FILL, tmp_path / "store", 0, wrapper=(*wrapper, mount + junk + 'exec "$0" "$@"'))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.count("full ") == 2 and done.stdout.endswith("done\n")
    assert not (tmp_path / "store").exists()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder every user can enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


AS_NOBODY = """
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for case in sys.argv[2:]:
    try:
        with Store.open(Path(sys.argv[1]) / case, create=case == "absent/store") as store:
            store.get(sha("x"), FINGERPRINT, 0.25)
            store.put_document(document("a", "x"))
        print(case, "no error")
    except StoreError as error:
        print(case, "refused", error.where)
"""


@posix
def test_a_folder_of_another_user_is_refused(run_script: RunScript, open_folder: Path, empty_store: Path) -> None:
    cases = ["closed", "unwritable", "catalog", "absent/store"]
    for case in cases[:3]:
        shutil.copytree(empty_store, open_folder / case)
        with Store.open(open_folder / case) as store:
            store.put(sha("x"), make_cache(1))
    for folder, _, names in os.walk(open_folder):
        os.chmod(folder, 0o777)
        for name in names:
            os.chmod(Path(folder, name), 0o666)
    (open_folder / "absent").mkdir()
    os.chmod(open_folder / "closed", 0o000)
    os.chmod(open_folder / "unwritable", 0o555)
    os.chmod(open_folder / "catalog" / "catalog.sqlite", 0o444)
    os.chmod(open_folder / "absent", 0o555)
    done = run_script(AS_NOBODY, open_folder, *cases)
    os.chmod(open_folder / "closed", 0o755)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[case, "refused"] for case in cases]


def test_access_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "store")
    assert caught.value.where == str(tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_read_only_file_system_is_a_permission_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StoreError):
        store.put(sha("x"), make_cache(1))


def test_a_blob_without_read_permission_is_not_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    info = store.put(sha("x"), make_cache(1))
    import builtins

    really_open = builtins.open

    def refuse(file: object, *args: object, **kwargs: object) -> object:
        if str(file).endswith(".val"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return really_open(file, *args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", refuse)
        with pytest.raises(StoreError, match="Permission denied"):
            store.get(sha("x"), FINGERPRINT, 0.25)
    assert store.caches() == [info]


def test_a_locked_catalog_is_readable_and_not_writable(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.2)
    folder = shutil.copytree(empty_store, tmp_path / "store")
    with Store.open(folder) as store, closing(sqlite3.connect(folder / "catalog.sqlite")) as other:
        store.put(sha("x"), make_cache(1))
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
        with pytest.raises(StoreLockedError) as caught:
            store.put_document(document("a", "x"))
        assert caught.value.where == str(folder / "catalog.sqlite")
        with pytest.raises(StoreLockedError):
            store.put(sha("y"), make_cache(2))
        other.execute("ROLLBACK")
        store.put_document(document("a", "x"))
        assert store.gc().n_orphan_blobs == 1  # removing the blob would have waited for the lock again
        with closing(sqlite3.connect(folder / "blobs" / "cache.db")) as blobs:
            blobs.isolation_level = None
            blobs.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreLockedError):
                store.put(sha("y"), make_cache(2))
        assert store.check().ok
        assert len(blob_files(store)) == 1


def test_a_writer_holds_the_lock_before_its_first_statement(store: Store) -> None:
    # Blobs are listed, written and removed under this lock, mostly before any row is touched.
    with closing(sqlite3.connect(store.path / "catalog.sqlite", timeout=0, isolation_level=None)) as other:
        with store.catalog.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.execute("BEGIN IMMEDIATE")


def test_a_file_in_place_of_a_folder_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="File exists"):
        Store.open(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"
