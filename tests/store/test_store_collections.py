"""Collections of one store do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import FINGERPRINT, OTHER, document, equal, held, make_cache, samples_of, sha

from kv_memory.errors import KVMemoryError
from kv_memory.retrieval.retriever import Retriever
from kv_memory.store import Store, export_collection, import_archive


@pytest.fixture(params=["sqlite-disk", pytest.param("postgres-folder", marks=pytest.mark.postgres)])
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, place: Callable[[str], dict[str, Any]]
) -> Iterator[tuple[Store, Store]]:
    """Two collections of one store with equal ids, texts and caches, and something of its own each."""
    where = place(request.param)
    with (
        Store.open(tmp_path / "pair", collection="one", **where) as one,
        Store.open(tmp_path / "pair", collection="two", **where) as two,
    ):
        for store in (one, two):
            name = store.collection
            store.put(sha("both"), make_cache(1))
            store.put(sha(name), make_cache(2 if name == "one" else 3))
            store.put_document(document("same", "both", metadata={"of": name}))
            store.put_document(document(f"id of {name}", name))
            store.put_prefix("same", b"prefix")
            store.put_prefix(f"of {name}", name.encode())
        yield one, two


LOOKUPS: dict[str, Callable[[Store], object]] = {
    "documents": lambda store: [(d.id, d.metadata) for d in store.documents()],
    "document": lambda store: store.document("same").metadata,
    "has_document": lambda store: [store.has_document(id_) for id_ in ("same", "id of one", "id of two")],
    "passages": lambda store: [(p.document_id, p.text, p.metadata) for p in store.passages()],
    "passage": lambda store: store.passage("same", 0).metadata,
    "text": lambda store: [store.text(sha(text)) for text in ("both", "one", "two")],
    "has": lambda store: [store.has(sha(text), FINGERPRINT, 0.25) for text in ("both", "one", "two")],
    "missing": lambda store: [(p.document_id, p.metadata) for p in store.missing(OTHER, 0.25)],
    "caches": lambda store: [c.text_sha256 for c in store.caches()],
    "caches of a document": lambda store: [c.text_sha256 for c in store.caches("same")],
    "stats": lambda store: (store.stats().n_documents, store.stats().n_passages, store.stats().n_caches),
    "settings": lambda store: store.settings(),
    "prefix": lambda store: [store.get_prefix(key) is not None for key in ("same", "of one", "of two")],
    "unreferenced": lambda store: store.check().unreferenced,
    "index": lambda store: [(h.document_id, h.metadata) for h in Retriever(store).retrieve("both one two", top_k=9)],
}
EXPECTED: dict[str, Callable[[str], object]] = {
    "documents": lambda name: [(f"id of {name}", {}), ("same", {"of": name})],
    "document": lambda name: {"of": name},
    "has_document": lambda name: [True, name == "one", name == "two"],
    "passages": lambda name: [(f"id of {name}", name, {}), ("same", "both", {"of": name})],
    "passage": lambda name: {"of": name},
    "text": lambda name: ["both", "one" if name == "one" else None, "two" if name == "two" else None],
    "has": lambda name: [True, name == "one", name == "two"],
    "missing": lambda name: [(f"id of {name}", {}), ("same", {"of": name})],
    "caches": lambda name: [sha("both"), sha(name)],
    "caches of a document": lambda name: [sha("both")],
    "stats": lambda name: (2, 2, 2),
    "settings": lambda name: {},
    "prefix": lambda name: [True, name == "one", name == "two"],
    "unreferenced": lambda name: (),
    "index": lambda name: [(f"id of {name}", {}), ("same", {"of": name})],
}


def assert_whole(store: Store) -> None:
    for name, look in LOOKUPS.items():
        found = look(store)
        expected = EXPECTED[name](store.collection)
        assert (sorted(found, key=str) if name == "index" else found) == expected, name  # type: ignore[call-overload]
    assert equal(store.get(sha("both"), FINGERPRINT, 0.25), make_cache(1))
    prefix = store.get_prefix("same")
    assert prefix is not None and prefix.read_bytes() == b"prefix"
    report = store.check()
    assert report.ok, report


@pytest.mark.parametrize("name", ["one", "two"])
def test_collections_with_equal_texts_stay_separate(pair: tuple[Store, Store], name: str) -> None:
    store = pair[name == "two"]
    assert_whole(store)
    theirs = "two" if name == "one" else "one"
    for look in (
        lambda: store.document(f"id of {theirs}"),
        lambda: store.passage(f"id of {theirs}", 0),
        lambda: store.caches(f"id of {theirs}"),
        lambda: store.get(sha(theirs), FINGERPRINT, 0.25),
        lambda: store.delete_document(f"id of {theirs}"),
        lambda: store.purge(f"id of {theirs}"),
        lambda: store.pin(f"id of {theirs}"),
    ):
        with pytest.raises(KVMemoryError, match="no d"):
            look()
    assert store.delete(sha(theirs)) == 0
    assert_whole(pair[name == "one"])


CHANGES: dict[str, Callable[[Store, Path], object]] = {
    "delete_document": lambda store, _: store.delete_document("same"),
    "purge": lambda store, _: store.purge("same"),
    "purge all": lambda store, _: store.purge(*(d.id for d in store.documents())),
    "purge none": lambda store, _: store.purge(),
    "delete": lambda store, _: store.delete(sha("both")),
    "replace": lambda store, _: store.put_document(document("same", "other", metadata={"of": "nobody"})),
    "waiting, then gc": lambda store, _: (store.put(sha("waiting"), make_cache(9)), store.gc()),
    "unreferenced, then gc": lambda store, _: (store.put_document(document("same")), store.gc()),
    "settings": lambda store, _: store.update_settings({"model": "mine"}),
    "prefix": lambda store, _: store.put_prefix("same", b"another"),
    "pin": lambda store, _: store.pin("same"),
    "budget": lambda store, _: store.set_limits(type(store.limits())(max_size_bytes=1)),
    "import": lambda store, path: import_other(store, path),
}


def import_other(store: Store, path: Path) -> None:
    with Store.open(path / "elsewhere") as elsewhere:
        elsewhere.put(sha("theirs"), make_cache(33))
        elsewhere.put_document(document("same", "theirs"))
        elsewhere.put_prefix("same", b"theirs")
        export_collection(elsewhere, path / "theirs.tar")
    import_archive(path / "theirs.tar", store, on_conflict="replace")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_one_collection_leaves_the_other_unchanged(
    pair: tuple[Store, Store], tmp_path: Path, change: str
) -> None:
    one, two = pair
    before = two.revision, two.caches(), two.limits()
    CHANGES[change](one, tmp_path)
    assert (two.revision, two.caches(), two.limits()) == before
    assert_whole(two)


def test_a_purged_text_stays_in_another_collection(pair: tuple[Store, Store]) -> None:
    report = pair[0].purge("same")
    assert (report.n_blobs, report.n_blobs_shared) == (0, 1)
    assert pair[0].caches() == [c for c in pair[0].caches() if c.text_sha256 == sha("one")]
    report = pair[1].purge("same")
    assert (report.n_blobs, report.n_blobs_shared) == (1, 0)
    assert held(pair[0].path, samples_of("both", make_cache(1).to_bytes(), sha("both").encode())) == set()


def test_an_export_holds_one_collection(pair: tuple[Store, Store], tmp_path: Path) -> None:
    export_collection(pair[0], tmp_path / "one.tar")
    assert b"two" not in (tmp_path / "one.tar").read_bytes()
