"""Processes killed with SIGKILL, and processes that write at the same time. All of them are real.

Each script forks its children after torch was imported, because importing it takes longer than the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from store_samples import FINGERPRINT, blob_files, document, equal, make_cache, sha

from kv_memory.store import Store

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL")
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]

KILLED = """
import random, stat
from kv_memory.store.blobs.local import DiskBlobs
from kv_memory.store.blob_references import BlobReferences

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(method):
    def run(*args, **kwargs):
        method(*args, **kwargs)
        die()
    return run

def put_blob_then_die(store):
    DiskBlobs.put = after(DiskBlobs.put)
    store.put(sha("y"), make_cache(2))

def die_while_writing(store):
    store.put(sha("warm"), make_cache(3))
    # Not before the first byte: a folder may be synced before.
    fsync = os.fsync
    os.fsync = lambda fd: fsync(fd) if stat.S_ISDIR(os.fstat(fd).st_mode) else die()
    store.put(sha("y"), make_cache(2))

def die_after_rename(store):
    os.rename = after(os.rename)
    store.put(sha("y"), make_cache(2))

def die_before_the_document(store):
    for i in range(3):
        store.put(sha(f"part {i}"), make_cache(10 + i))
    die()

def die_before_sweeping(store):
    BlobReferences.delete_unreferenced = die
    store.put_document(document("a", "new"))

def die_before_deleting(store):
    DiskBlobs.delete = die
    store.delete_document("a")

def die_any_time(store):
    i = 0
    while True:
        store.put(sha(f"loop {i}"), make_cache(10 + i))
        store.put_document(document("loop", f"loop {i}"))
        i += 1

random.seed(0)
for name in sys.argv[2:]:
    case, _, number = name.partition(" ")
    child = os.fork()
    if child == 0:
        with Store.open(Path(sys.argv[1]) / name) as store:
            globals()[case](store)
        os._exit(0)
    if case == "die_any_time":
        time.sleep(0.15 + random.random() / 4)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""


def test_gc_repairs_a_store_left_by_a_killed_process(run_script: RunScript, tmp_path: Path, empty_store: Path) -> None:
    loops = [f"die_any_time {i}" for i in range(3)]
    names = [
        "put_blob_then_die",
        "die_while_writing",
        "die_after_rename",
        "die_before_the_document",
        "die_before_sweeping",
        "die_before_deleting",
        *loops,
    ]
    for name in names:
        with Store.open(shutil.copytree(empty_store, tmp_path / name)) as store:
            store.put(sha("x"), make_cache(1))
            store.put_document(document("a", "x"))
    done = run_script(KILLED, tmp_path, *names)
    assert done.returncode == 0, done.stderr

    found: dict[str, tuple[int, int]] = {}
    for name in names:
        with Store.open(tmp_path / name, create=False) as store:
            report = store.check()
            assert not report.damaged and not report.missing, (name, report)
            found[name] = (len(report.orphans), len(report.strays))
            if name == "die_before_the_document":
                assert all(store.has(sha(f"part {i}"), FINGERPRINT, 0.25) for i in range(3))
                store.put_document(document("b", *(f"part {i}" for i in range(3))))
                assert store.missing(FINGERPRINT, 0.25) == []
            gone = store.gc()
            assert (gone.n_orphan_blobs, gone.n_strays, gone.n_dangling_rows) == (*found[name], 0), name
            assert store.check().ok
            for info in store.caches():
                store.get(info.text_sha256, FINGERPRINT, info.keep_ratio)
            assert len(blob_files(store)) == len(store.caches()), name
            if name in loops:
                # A document is put after its cache, so one that is there always has it.
                assert [p.document_id for p in store.missing(FINGERPRINT, 0.25)] == []
            store.put(sha("y"), make_cache(2))
            assert equal(store.get(sha("y"), FINGERPRINT, 0.25), make_cache(2)), name
    # Without these the kills would have missed the moments they are meant for.
    assert found["put_blob_then_die"] == (1, 0)
    assert found["die_while_writing"] == (0, 1)
    assert found["die_after_rename"] == (0, 1)
    assert found["die_before_sweeping"] == (1, 0)
    assert found["die_before_deleting"] == (1, 0)


TOGETHER = """
folder, start = sys.argv[1], time.time() + 0.3

def work(me):
    time.sleep(max(0, start - time.time()))  # open the folder, which is not there yet, at one moment
    with Store.open(folder) as store:
        for i in range(12):
            store.put_document(document(f"{me} {i}", f"{me} {i}", f"shared {i}"))
            store.put(sha(f"{me} {i}"), make_cache(1000 * me + i))
            store.put(sha(f"shared {i}"), make_cache(i))
            assert equal(store.get(sha(f"shared {i}"), FINGERPRINT, 0.25), make_cache(i))
        for i in range(0, 12, 2):
            store.delete_document(f"{me} {i}")

def clean(_):
    time.sleep(max(0, start - time.time()))
    with Store.open(folder) as store:
        for _ in range(15):
            store.gc()
            report = store.check()
            assert not report.damaged and not report.missing, report

children = []
for me, job in enumerate([work, work, work, clean]):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job(me)
            code = 0
        finally:
            if code:
                import traceback
                traceback.print_exc()
            os._exit(code)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_processes_write_one_store_concurrently(run_script: RunScript, tmp_path: Path) -> None:
    done = run_script(TOGETHER, tmp_path / "store")
    assert done.returncode == 0, done.stderr
    with Store.open(tmp_path / "store", create=False) as store:
        kept = [f"{me} {i}" for me in range(3) for i in range(1, 12, 2)]
        assert sorted(d.id for d in store.documents()) == sorted(kept)
        assert store.missing(FINGERPRINT, 0.25) == []
        for me in range(3):
            for i in range(1, 12, 2):
                assert equal(store.get(sha(f"{me} {i}"), FINGERPRINT, 0.25), make_cache(1000 * me + i))
                assert equal(store.get(sha(f"shared {i}"), FINGERPRINT, 0.25), make_cache(i))
        store.gc()
        report = store.check()
        assert report.ok
        # Caches 0 of the first worker are the shared ones: equal bytes, one blob.
        assert report.n_blobs == len(blob_files(store)) == len({c.blob_key for c in store.caches()})
        assert store.revision == 3 * (12 + 6)


FORKED = """
store = Store.open(sys.argv[1], create=False)
store.put(sha("x"), make_cache(1))
child = os.fork()
if child == 0:
    store.put(sha("child"), make_cache(2))
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
    store.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert equal(store.get(sha("child"), FINGERPRINT, 0.25), make_cache(2))
store.put(sha("parent"), make_cache(3))
store.close()
"""


def test_an_open_store_works_after_a_fork(run_script: RunScript, store: Store) -> None:
    done = run_script(FORKED, store.path)
    assert done.returncode == 0, done.stderr
    assert len(store.caches()) == 3
    assert store.check().ok
