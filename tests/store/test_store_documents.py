from __future__ import annotations

import os
import stat
import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select
from store_samples import FINGERPRINT, blob_files, document, equal, make_cache, sha

from kv_memory.errors import ConfigError, DocumentNotFoundError, StoreError, UnreadableDocumentError
from kv_memory.store import PassageRecord, Store
from kv_memory.store.sql.schema import PassageRow


def test_a_document_is_returned_unchanged(store: Store) -> None:
    before = datetime.now(UTC)
    record = document(
        "a", "first", "zw\u00e9i\n", source_uri="file:///a.txt", metadata={"tags": ["x"], "n": 1}, passage_tokens=256
    )
    store.put_document(record)
    found = store.document("a")
    assert found.created_at is not None and found.updated_at is not None
    assert before <= found.created_at <= found.updated_at <= datetime.now(UTC)
    assert found.created_at.tzinfo is UTC
    assert found.passages == record.passages
    assert (found.id, found.content_sha256, found.source_uri) == ("a", record.content_sha256, "file:///a.txt")
    assert (found.metadata, found.passage_tokens, found.n_tokens) == ({"tags": ["x"], "n": 1}, 256, 10)


def test_a_passage_without_its_text_is_returned_unchanged(store: Store) -> None:
    terms = {"0" * 16: 2, "1" * 16: 1}
    bare = PassageRecord(text=None, n_tokens=3, text_sha256=sha("x"), terms=terms)
    unfindable = PassageRecord(text=None, n_tokens=1, text_sha256=sha("y"))
    record = document("a", "kept", passages=(bare, PassageRecord(text="kept", n_tokens=4), unfindable))
    store.put_document(record)
    store.put_document(document("b"))
    assert store.document("a").passages == record.passages
    assert [(s.id, s.n_passages, s.n_texts, s.n_tokens) for s in store.documents()] == [("a", 3, 1, 8), ("b", 0, 0, 0)]
    assert [(p.text, p.text_sha256, p.terms) for p in store.passages()] == [
        (None, sha("x"), terms),
        ("kept", sha("kept"), None),
        (None, sha("y"), None),
    ]
    assert (store.text(sha("x")), store.text(sha("kept"))) == (None, "kept")
    store.put_document(document("c", "x"))  # the same text, kept
    assert store.text(sha("x")) == "x" and store.passage("a", 0).text is None
    with store.catalog.read() as session:  # SQL's NULL, not JSON's
        n_terms = select(func.count()).where(PassageRow.terms.is_not(None))
        assert session.scalar(n_terms) == 1


def test_a_passage_needs_a_text_or_its_hash() -> None:
    with pytest.raises(ConfigError, match="hash"):
        PassageRecord(text=None, n_tokens=1)
    assert PassageRecord(text="x", n_tokens=1).text_sha256 == sha("x")


def test_database_errors_do_not_contain_texts(store: Store) -> None:
    with pytest.raises(StoreError) as caught, store.catalog.write() as session:
        session.execute(
            insert(PassageRow),
            [{"document_pk": 10**6, "ordinal": 0, "text": "a secret", "text_sha256": "0" * 64, "n_tokens": 1}],
        )
    told = "".join(traceback.format_exception(caught.value))
    assert "secret" not in told.replace('"a secret"', "")  # the line above is in the traceback


def test_ids_are_ordered_by_code_points_in_every_catalog(store: Store) -> None:
    ids = ["B", "a", "a b", "a-b", "ab", "z", "\u00e4", "\U0001f600"]
    for id_ in reversed(ids):
        store.put_document(document(id_, id_))
    assert [found.id for found in store.documents()] == ids == [passage.text for passage in store.passages()]


def test_a_nul_character_is_refused_by_every_catalog(store: Store) -> None:
    for record in (document("a", "x\0"), document("a\0", "x"), document("a", "x", source_uri="\0")):
        with pytest.raises(UnreadableDocumentError, match="NUL"):
            store.put_document(record)
    assert store.documents() == [] and store.revision == 0


def test_listing_is_ordered_by_id_and_counts_passages(store: Store) -> None:
    store.put_document(document("b", "one", "three"))
    store.put_document(document("a"))
    listed = store.documents()
    assert [(s.id, s.n_passages, s.n_tokens) for s in listed] == [("a", 0, 0), ("b", 2, 8)]
    assert store.has_document("a")
    assert not store.has_document("c")


def test_passages_are_ordered_by_document_and_ordinal(store: Store) -> None:
    store.put_document(document("b", "b0", metadata={"k": 1}))
    store.put_document(document("a", *(f"a{i}" for i in range(12))))
    found = store.passages()
    assert [p.text for p in found] == [*(f"a{i}" for i in range(12)), "b0"]
    assert [p.ordinal for p in found[:12]] == list(range(12))
    assert found[-1].metadata == {"k": 1}
    assert found[-1].text_sha256 == sha("b0")
    assert store.passage("a", 11) == found[11]


def test_unknown_ids_are_not_found(store: Store) -> None:
    store.put_document(document("a", "x"))
    with pytest.raises(DocumentNotFoundError, match="'b'"):
        store.document("b")
    with pytest.raises(DocumentNotFoundError, match="'b'"):
        store.delete_document("b")
    with pytest.raises(DocumentNotFoundError, match="no passage 1"):
        store.passage("a", 1)
    with pytest.raises(DocumentNotFoundError, match="'b'"):
        store.caches("b")


def test_replacing_keeps_the_creation_date_and_caches_still_needed(store: Store) -> None:
    store.put_document(document("a", "old", "kept", "shared"))
    store.put_document(document("b", "shared"))
    for seed, text in enumerate(["old", "kept", "shared", "waiting"]):
        store.put(sha(text), make_cache(seed))
    first = store.document("a")
    store.put_document(document("a", "new", "kept"))
    second = store.document("a")
    assert [p.text for p in second.passages] == ["new", "kept"]
    assert second.created_at == first.created_at
    assert second.updated_at is not None and first.updated_at is not None and second.updated_at > first.updated_at
    # "waiting" belongs to a document that an `add` in another process has not put yet.
    assert {c.text_sha256 for c in store.caches()} == {sha("kept"), sha("shared"), sha("waiting")}
    assert len(blob_files(store)) == 3
    assert [p.text for p in store.missing(FINGERPRINT, 0.25)] == ["new"]


def test_deleting_removes_caches_that_no_other_document_needs(store: Store) -> None:
    store.put_document(document("a", "own", "shared"))
    store.put_document(document("b", "shared"))
    store.put(sha("own"), make_cache(1))
    store.put(sha("shared"), make_cache(2))
    store.delete_document("a")
    assert [d.id for d in store.documents()] == ["b"]
    assert [c.text_sha256 for c in store.caches()] == [sha("shared")]
    assert len(blob_files(store)) == 1
    assert store.check().ok


def test_a_document_of_many_passages_can_be_replaced(store: Store) -> None:
    # More texts than SQLite allows variables in one statement of an old build.
    store.put_document(document("a", *(f"old {i}" for i in range(1200))))
    store.put(sha("old 1199"), make_cache(1))
    store.put_document(document("a", *(f"new {i}" for i in range(1200))))
    assert store.caches() == []
    assert len(store.passages()) == 1200


def test_the_revision_changes_with_the_passages_only(store: Store) -> None:
    seen = [store.revision]
    store.put_document(document("a", "x"))
    seen.append(store.revision)
    store.put_document(document("a", "y"))
    seen.append(store.revision)
    store.delete_document("a")
    seen.append(store.revision)
    assert len(set(seen)) == 4
    store.put(sha("y"), make_cache(1))
    store.update_settings({"a": 1})
    assert store.revision == seen[-1]


def test_a_failed_put_changes_nothing(store: Store) -> None:
    store.put_document(document("a", "x"))
    revision = store.revision
    with pytest.raises(ConfigError, match="JSON"):
        store.put_document(document("a", "y", metadata={"when": datetime.now(UTC)}))
    with pytest.raises(UnreadableDocumentError, match="UTF-8"):
        store.put_document(
            document("a", "y").__class__(
                id="a", content_sha256="0" * 64, passages=(PassageRecord(text="\ud800", n_tokens=1),)
            )
        )
    assert store.document("a").passages[0].text == "x"
    assert store.revision == revision


def test_settings_are_merged_and_kept(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        assert store.settings() == {}
        store.update_settings({"keep_ratio": 0.25, "model": "m"})
        store.update_settings({"keep_ratio": 0.5})
        with pytest.raises(ConfigError, match="JSON"):
            store.update_settings({"bad": object()})
    with Store.open(tmp_path, create=False) as store:
        assert store.settings() == {"keep_ratio": 0.5, "model": "m"}


def test_collections_do_not_see_each_other(tmp_path: Path) -> None:
    with Store.open(tmp_path, collection="one") as one, Store.open(tmp_path, collection="two") as two:
        one.put_document(document("a", "x"))
        one.put(sha("x"), make_cache(1))
        one.put_prefix("p", b"prefix")
        one.update_settings({"k": 1})
        assert (two.documents(), two.passages(), two.caches(), two.settings()) == ([], [], [], {})
        assert two.get_prefix("p") is None
        assert not two.has(sha("x"), FINGERPRINT, 0.25)
        two.put_document(document("a", "x"))
        assert [p.document_id for p in two.missing(FINGERPRINT, 0.25)] == ["a"]
        revision = one.revision
        two.delete_document("a")
        assert one.has_document("a")
        assert one.has(sha("x"), FINGERPRINT, 0.25)
        assert one.revision == revision


def test_opening_without_create_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store in this folder") as caught:
        Store.open(tmp_path / "none", create=False)
    assert caught.value.next_step is not None and "kv-memory add" in caught.value.next_step
    assert not (tmp_path / "none").exists()
    Store.open(tmp_path / "some", collection="here").close()
    with pytest.raises(StoreError, match=r"no collection 'there'; it has here"):
        Store.open(tmp_path / "some", collection="there", create=False)
    with pytest.raises(ConfigError, match="name"):
        Store.open(tmp_path / "some", collection="")


def test_the_folder_is_private(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("POSIX modes")
    with Store.open(tmp_path / "store") as store:
        for folder in (store.path, store.path / "blobs", store.path / "quarantine"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_a_path_that_diskcache_would_expand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", "gone")
    with pytest.raises(StoreError, match="environment variable"):
        Store.open(tmp_path / "$ELSEWHERE")
    assert list(tmp_path.iterdir()) == []
    with Store.open(tmp_path / "$UNSET_VARIABLE") as store:
        store.put(sha("x"), make_cache(1))
        assert len(blob_files(store)) == 1


def test_a_store_can_be_opened_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "c")
    with Store.open(tmp_path / "link" / "store") as store:
        store.put(sha("x"), make_cache(1))
        assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
        assert store.check().ok
        store.delete(sha("x"))
        assert blob_files(store) == []
        assert store.check().ok
