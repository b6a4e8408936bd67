"""KVMemoryByteStore beyond LangChain's standard suites: durable, kept apart, checked, and never unpickled."""

from __future__ import annotations

import pickle
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kv_memory import ConfigError, CorruptCacheError, KVMemory
from kv_memory.integrations.langchain import KVMemoryByteStore
from tests.memories import FERRY_QUESTION, answerable, open_memory


def files(store: KVMemoryByteStore) -> list[Path]:
    return sorted(store._blobs.folder.rglob("*.val"))


def test_values_outlive_the_process(memory: KVMemory, wide: Any) -> None:
    with KVMemoryByteStore(memory) as store:
        store.mset([("a", b"one"), ("b/../../c", b"two")])
    path = memory.path
    memory.close()
    with open_memory(path, wide) as again, KVMemoryByteStore(again) as store:
        assert store.mget(["b/../../c", "a", "c"]) == [b"two", b"one", None]
        assert list(store.yield_keys()) == ["a", "b/../../c"]


def test_upkeep_of_the_caches_leaves_them_alone(memory: KVMemory) -> None:
    with KVMemoryByteStore(memory) as store:
        store.mset([("a", b"one")])
        assert memory.check().ok
        memory.gc()
        for summary in memory.documents():
            memory.remove(summary.id)
        memory.gc()
        assert store.mget(["a"]) == [b"one"] and memory.check().ok


def test_they_are_no_caches(memory: KVMemory) -> None:
    with KVMemoryByteStore(memory) as store:
        store.mset([(info.blob_key, b"mine") for info in memory.store.caches()])
        store.mdelete(list(store.yield_keys()))
    assert answerable(memory, FERRY_QUESTION) == ["ferry"]


def test_collections_and_namespaces_are_apart(memory: KVMemory) -> None:
    stores = [
        KVMemoryByteStore(memory),
        KVMemoryByteStore(memory, namespace="other"),
        KVMemoryByteStore(memory.in_collection("other")),
    ]
    for number, store in enumerate(stores):
        store.mset([("a", bytes([number]))])
    assert [store.mget(["a"]) for store in stores] == [[b"\0"], [b"\1"], [b"\2"]]
    stores[0].mdelete(["a"])
    assert [store.mget(["a"]) for store in stores] == [[None], [b"\1"], [b"\2"]]
    assert KVMemoryByteStore(memory, namespace="other").mget(["a"]) == [b"\1"]


def test_a_replaced_value_leaves_no_file(memory: KVMemory) -> None:
    with KVMemoryByteStore(memory) as store:
        for number in range(5):
            store.mset([("a", b"x" * number)])
        assert len(files(store)) == 1 and store.mget(["a"]) == [b"xxxx"]
        store.mdelete(["a"])
        assert files(store) == []


def test_readers_see_the_old_value_or_the_new_one(memory: KVMemory) -> None:
    store, stop = KVMemoryByteStore(memory), threading.Event()
    store.mset([("a", b"0" * 1000)])
    seen: list[bytes | None] = []
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                seen.extend(store.mget(["a"]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(30):
        store.mset([("a", str(number % 10).encode() * 1000)])
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == [] and len(seen) > 2
    assert all(value is not None and len(value) == 1000 and len(set(value)) == 1 for value in seen)


def test_keys_can_be_listed_in_steps_from_several_threads(memory: KVMemory) -> None:
    store = KVMemoryByteStore(memory)
    store.mset([(f"key {number}", b"") for number in range(4)])
    keys, found = store.yield_keys(prefix="key"), []
    for _ in range(4):
        thread = threading.Thread(target=lambda: found.append(next(keys)))
        thread.start()
        thread.join()
    assert found == [f"key {number}" for number in range(4)]


def test_damaged_bytes_are_never_returned(memory: KVMemory) -> None:
    with KVMemoryByteStore(memory) as store:
        store.mset([("a", b"one"), ("b", b"two")])
        path = next(path for path in files(store) if path.read_bytes().endswith(b"one"))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(CorruptCacheError, match="not those that were written") as caught:
            store.mget(["a"])
        assert "a in " in str(caught.value.where) and store.mget(["b"]) == [b"two"]
        path.write_bytes(b"")
        with pytest.raises(CorruptCacheError):
            store.mget(["a"])
        store.mset([("a", b"new")])
        assert store.mget(["a"]) == [b"new"]


def test_nothing_is_unpickled(memory: KVMemory) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("a pickle was loaded",)

    with KVMemoryByteStore(memory) as store:
        store.mset([("a", b"one")])
        with closing(sqlite3.connect(store._blobs.folder / "cache.db", isolation_level=None)) as connection:
            connection.execute("UPDATE Cache SET mode = 4, filename = NULL, value = ?", (pickle.dumps(Exploit()),))
        with pytest.raises(CorruptCacheError):
            store.mget(["a"])
        assert list(store.yield_keys()) == []


@pytest.mark.parametrize("pair", [("", b""), (7, b""), ("a", "text"), ("a", bytearray(b"x")), ("a", None)])
def test_only_bytes_under_names(memory: KVMemory, pair: Any) -> None:
    with KVMemoryByteStore(memory) as store:
        with pytest.raises(ConfigError):
            store.mset([("good", b""), pair])
        assert list(store.yield_keys()) == []
        if not isinstance(pair[0], str) or not pair[0]:
            for call in (store.mget, store.mdelete):
                with pytest.raises(ConfigError):
                    call([pair[0]])
