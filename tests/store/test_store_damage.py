from __future__ import annotations

import io
import os
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import diskcache
import pytest
import torch
from store_samples import FINGERPRINT, blob_file, document, equal, make_cache, sha

from kv_memory.errors import CacheNotFoundError, CorruptCacheError, StoreError
from kv_memory.store import Store
from kv_memory.store.blobs.local import SafeTensorsDisk


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def blob_table(store: Store, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(store.path / "blobs" / "cache.db")) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


DAMAGES: list[Callable[[Path], None]] = [flip_a_bit, truncate, append, Path.unlink]


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_blob_is_never_decoded_and_can_be_replaced(
    store: Store, damage: Callable[[Path], None], read_before: bool
) -> None:
    store.put_document(document("a", "other", "x"))
    info = store.put(sha("x"), make_cache(1))
    sound = store.put(sha("other"), make_cache(2))
    if read_before:
        store.get(sha("x"), FINGERPRINT, 0.25)
    damage(blob_file(store, info.blob_key))
    with pytest.raises(CorruptCacheError, match="damaged") as caught:
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert caught.value.where == f"document 'a', passage 1, blob {info.blob_key}"
    assert [p.text for p in store.missing(FINGERPRINT, 0.25)] == ["x"]
    quarantined = [path.name for path in (store.path / "quarantine").iterdir()]
    assert quarantined == ([] if damage is Path.unlink else [f"{info.blob_key}.safetensors"])
    assert store.stats().n_quarantined == len(quarantined)
    assert store.put(sha("x"), make_cache(1)).blob_key == info.blob_key
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
    assert [c.blob_key for c in store.caches()] == [sound.blob_key, info.blob_key]
    assert store.check().ok


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_putting_over_a_damaged_blob_repairs_it(store: Store, damage: Callable[[Path], None]) -> None:
    info = store.put(sha("x"), make_cache(1))
    store.put(sha("y"), make_cache(1))
    damage(blob_file(store, info.blob_key))
    store.put(sha("x"), make_cache(1))
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
    assert store.check().ok


def test_damage_takes_the_rows_of_every_collection_that_shares_the_blob(tmp_path: Path) -> None:
    with Store.open(tmp_path, collection="one") as one, Store.open(tmp_path, collection="two") as two:
        key = one.put(sha("x"), make_cache(1)).blob_key
        two.put(sha("x"), make_cache(1))
        flip_a_bit(blob_file(one, key))
        with pytest.raises(CorruptCacheError):
            one.get(sha("x"), FINGERPRINT, 0.25)
        assert two.caches() == []


def test_check_quarantines_a_blob_whose_bytes_changed_without_a_trace_in_its_file_times(store: Store) -> None:
    info = store.put(sha("x"), make_cache(1))
    file = blob_file(store, info.blob_key)
    flip_a_bit(file)
    status = file.stat()
    store.references._hashed[info.blob_key] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    assert store.check().damaged == (info.blob_key,)
    assert store.caches() == [] and store.stats().n_quarantined == 1


def test_an_intact_blob_that_is_not_a_cache_is_quarantined(store: Store) -> None:
    store.put(sha("x"), make_cache(1))
    store.put_prefix("p", b"no tensors in here")
    with closing(sqlite3.connect(store.path / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE distilled_cache SET (blob_key, size_bytes) = (SELECT blob_key, size_bytes FROM prefix)")
    with pytest.raises(CorruptCacheError, match="not a readable distilled cache"):
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert not store.has(sha("x"), FINGERPRINT, 0.25)
    assert store.gc().n_orphan_blobs == 1


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_prefix_is_reported_once_and_then_removed(store: Store, damage: Callable[[Path], None]) -> None:
    store.put_prefix("p", b"prefix")
    damage(blob_file(store, sha("prefix")))
    with pytest.raises(CorruptCacheError, match="prefix 'p'"):
        store.get_prefix("p")
    assert store.get_prefix("p") is None


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("inline", [True, False])
def test_a_pickled_value_is_refused_and_not_run(store: Store, tmp_path: Path, inline: bool) -> None:
    trace = tmp_path / "ran"
    key = store.put(sha("x"), make_cache(1)).blob_key
    payload = pickle.dumps(Bomb(trace))
    blob_file(store, key).write_bytes(payload)
    if inline:
        blob_table(store, "UPDATE Cache SET mode = 4, filename = NULL, value = ? WHERE key = ?", payload, key)
    else:
        blob_table(store, "UPDATE Cache SET mode = 4 WHERE key = ?", key)
    with pytest.raises(CorruptCacheError):
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert not trace.exists()
    # The same row runs under diskcache's own Disk; so the test would see it.
    with closing(sqlite3.connect(store.path / "blobs" / "cache.db")) as connection, connection:
        columns = (4, None, payload) if inline else (4, "evil.val", None)
        (store.path / "blobs" / "evil.val").write_bytes(payload)
        connection.execute("INSERT INTO Cache (key, raw, mode, filename, value) VALUES ('evil', 1, ?, ?, ?)", columns)
    assert store.check().strays != ()
    assert not trace.exists()
    with diskcache.Cache(str(store.path / "blobs")) as plain:
        plain.get("evil")
    assert trace.exists()


def test_a_pickled_key_is_refused_and_removed(store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    store.put(sha("x"), make_cache(1))
    blob_table(store, "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 4, ?)", pickle.dumps(Bomb(trace)), b"")
    assert len(store.check().strays) == 1
    assert store.gc().n_strays == 1
    assert store.check().ok
    assert not trace.exists()
    with pytest.raises(CorruptCacheError):
        SafeTensorsDisk(str(tmp_path)).get(pickle.dumps(Bomb(trace)), False)
    assert not trace.exists()


@pytest.mark.parametrize("filename", ["../../secret.val", "{absolute}", "link.val"])
def test_a_row_that_points_outside_is_refused_and_the_file_left_alone(
    store: Store, tmp_path: Path, filename: str
) -> None:
    cache = make_cache(1)
    info = store.put(sha("x"), cache)
    secret = tmp_path / "secret.val"
    secret.write_bytes(cache.to_bytes())  # the very bytes, so that only the path can be what is refused
    (store.path / "blobs" / "link.val").symlink_to(secret)
    blob_table(store, "UPDATE Cache SET filename = ? WHERE key = ?", filename.format(absolute=secret), info.blob_key)
    with pytest.raises(CorruptCacheError):
        store.get(sha("x"), FINGERPRINT, 0.25)
    store.gc()
    assert secret.read_bytes() == cache.to_bytes()
    assert store.check().ok
    store.put(sha("x"), cache)
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), cache)


def test_the_disk_takes_text_keys_and_written_files_only(tmp_path: Path) -> None:
    disk = SafeTensorsDisk(str(tmp_path))
    for key in (b"k", 1, ("a",)):
        with pytest.raises(TypeError, match="str"):
            disk.put(key)
    for value in ("text", 1, {"a": 1}, b"x"):
        with pytest.raises(TypeError, match="files"):
            disk.store(value, False, key="k")
    with pytest.raises(TypeError, match="files"):
        disk.store(io.BytesIO(b"x"), True, key="k")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_deleted_while_being_opened_is_not_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(sha("x"), make_cache(1))
    from_file = torch.UntypedStorage.from_file

    def deleted_before(*args: Any, **options: Any) -> Any:
        store.delete(sha("x"))
        return from_file(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", deleted_before)
    with pytest.raises(CacheNotFoundError):
        store.get(sha("x"), FINGERPRINT, 0.25)
    assert store.stats().n_quarantined == 0


def test_a_blob_that_cannot_be_opened_is_not_reported_as_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, for one: taking that for damage would throw a sound cache away."""
    resource = pytest.importorskip("resource")
    store.put(sha("x"), make_cache(1))
    assert store.check().ok  # opens every connection this thread needs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with pytest.raises(OSError, match="Too many"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(StoreError, match="Too many open files"):
            store.get(sha("x"), FINGERPRINT, 0.25)
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
    assert store.stats().n_quarantined == 0


def test_a_damaged_catalog_is_a_store_error(tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    catalog = tmp_path / "store" / "catalog.sqlite"
    catalog.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(tmp_path / "store")
    assert catalog.read_bytes() == b"not a database" * 1000
