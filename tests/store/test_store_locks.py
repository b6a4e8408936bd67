"""Names that are held, by threads and by processes; and what stands on them: a text is compressed once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store_samples import FINGERPRINT, equal, make_cache, sha

from kv_memory.store import Store

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork")
RunScript = Callable[..., Any]


def test_a_lock_is_held_by_one_thread_at_a_time(store: Store) -> None:
    inside, most = [0], [0]

    def work(number: int) -> None:
        with store.catalog.hold(f"name {number % 2}") as had:
            assert had
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(0, 24, 2)))
    assert most[0] == 1, "the same name"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most[0] == 2, "two names"


def test_hold_without_waiting_fails_while_the_lock_is_taken(store: Store) -> None:
    with store.catalog.hold("a") as had:
        assert had
        with store.catalog.hold("a", wait=False) as again, store.catalog.hold("b", wait=False) as other:
            assert (again, other) == (False, True)
    with store.catalog.hold("a", wait=False) as after:
        assert after


HOLDS = """
from kv_memory.store.sql.catalog import Catalog

catalog = Catalog(sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]))
with catalog.hold("a"):
    Path(sys.argv[2]).touch()
    while not Path(sys.argv[3]).exists():
        time.sleep(0.005)
    if sys.argv[4] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["leave", "die"])
def test_a_process_holds_a_lock_until_it_ends(store: Store, run_script: RunScript, tmp_path: Path, end: str) -> None:
    if store.catalog.dialect == "postgresql":
        where = store.catalog._engine.url.render_as_string(hide_password=False)
        where += f"{'&' if '?' in where else '?'}schema={store.catalog._database.schema}"
    else:
        where = str(store.path / "catalog.sqlite")
    begun, done = tmp_path / "begun", tmp_path / "done"
    ran: list[Any] = []
    other = threading.Thread(target=lambda: ran.append(run_script(HOLDS, where, begun, done, end)))
    other.start()
    while not begun.exists():
        assert other.is_alive(), ran
        time.sleep(0.005)
    with store.catalog.hold("a", wait=False) as had:
        assert not had
    done.touch()
    with store.catalog.hold("a") as had:
        assert had
    other.join()


@pytest.mark.embedded
def test_locks_leave_no_files_behind(store: Store) -> None:
    with store.catalog.hold("a"):
        assert len(list((store.path / "locks").iterdir())) == 1
        with store.catalog.hold("a", wait=False) as again:
            assert not again
        assert len(list((store.path / "locks").iterdir())) == 1
    assert list((store.path / "locks").iterdir()) == []


def test_a_lock_can_be_released_by_another_thread(store: Store) -> None:
    held = store.catalog.hold("a")
    assert held.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.__exit__, None, None, None).result()
    with store.catalog.hold("a", wait=False) as after:
        assert after


MAKES = """
from kv_memory.store import Store
where, log = sys.argv[1], Path(sys.argv[2])
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        with Store.open(where) as store:
            wanted = sha("x"), FINGERPRINT, 0.25
            with store.making(*wanted):
                if not store.has(*wanted):
                    time.sleep(0.05)
                    store.put(sha("x"), make_cache(number))
                    with open(log, "a") as file:
                        file.write("made ")
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_eight_processes_create_a_cache_once(store: Store, run_script: RunScript, tmp_path: Path) -> None:
    done = run_script(MAKES, store.path, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "made "
    assert len(store.caches()) == 1 and store.check().ok


def test_eight_threads_create_a_cache_once(store: Store) -> None:
    made = []

    def make(number: int) -> None:
        wanted = sha("x"), FINGERPRINT, 0.25
        with store.making(*wanted):
            if not store.has(*wanted):
                store.put(sha("x"), make_cache(number))
                made.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert len(made) == 1 == len(store.caches())


def test_puts_and_deletes_of_the_same_blob_never_lose_it(store: Store) -> None:
    """Eight threads put and delete the cache of one text in four collections: one blob, and a row always has it."""
    stop = time.monotonic() + 1.5
    stores = [store.in_collection(f"tenant {number}") for number in range(4)]

    def work(number: int) -> int:
        n = 0
        while time.monotonic() < stop:
            tenant = stores[(number + n) % 4]
            if n % 2:
                tenant.delete(sha("x"))
            else:
                tenant.put(sha("x"), make_cache(1))
            n += 1
        return n

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 16
    report = store.check()
    assert not report.missing and not report.damaged and not report.strays
    n_rows = 0
    for tenant in stores:
        for info in tenant.caches():
            tenant.get(info.text_sha256, FINGERPRINT, info.keep_ratio)
            n_rows += 1
    assert report.n_blobs == min(1, n_rows)


def test_a_blob_removed_before_its_row_is_written_is_stored_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    references, removed = store.references, []
    put = references.put_blobs

    def put_and_lose(blobs: Mapping[str, bytes | Path]) -> None:
        put(blobs)
        if not removed:
            removed.extend(references.blobs.delete(key) for key in blobs)

    monkeypatch.setattr(references, "put_blobs", put_and_lose)
    info = store.put(sha("x"), make_cache(1))
    assert removed == [info.size_bytes]
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1)) and store.check().ok
