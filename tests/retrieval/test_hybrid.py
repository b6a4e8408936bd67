from __future__ import annotations

import copy
import pickle
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError, EncoderError, TransferError
from kv_memory.retrieval.retriever import fused
from kv_memory.store import DocumentRecord, PassageRecord, Store, export_collection, import_archive
from tests.memories import wide_backbone
from tests.retrieval.concepts import Concepts

PAGES = {
    "boats": "The vessel departs at dawn.",
    "fares": "What it costs: four crowns a fare.",
    "homes": "Each building is red. The dawn is red too.",
}
OPTIONS = {"keep_ratio": 0.5, "selector": "sink_recent", "passage_tokens": 256}


@pytest.fixture(scope="module")
def backbone():
    return wide_backbone()


def opened(path, backbone, **options):
    return KVMemory.open(path, model=backbone, **{**OPTIONS, **options})


@pytest.fixture
def encoder():
    return Concepts()


@pytest.fixture(params=[True, False], ids=["texts", "hashes"])
def memory(request, tmp_path, backbone, encoder):
    options = {"retriever": "hybrid", "encoder": encoder, "keep_text": request.param}
    with opened(tmp_path / "store", backbone, **options) as memory:
        memory.add(list(PAGES.items()))
        yield memory


def found(memory, question, **options):
    return [hit.document_id for hit in memory.retrieve(question, top_k=9, **options)]


def encoders(memory):
    return {vector.document_id: vector.encoder for vector in memory.store.vectors()}


def test_a_passage_is_found_without_a_shared_word(memory, backbone):
    assert found(memory, "ferry")[0] == "boats"
    assert memory.ask("boat", top_k=1).sources[0].document_id == "boats"
    by_word = KVMemory.open(memory.path, model=backbone, retriever="bm25", encoder="none", **OPTIONS)
    with by_word:
        assert found(by_word, "ferry") == []


def test_scores_say_what_they_are(memory, backbone, encoder):
    best = memory.retrieve("vessel at dawn", top_k=1)[0]
    assert (best.document_id, best.score) == ("boats", 1)
    path = memory.path
    memory.close()
    with opened(path, backbone, retriever="embedding", encoder=encoder) as by_vector:
        hits = by_vector.retrieve("building", top_k=3)
        assert hits[0].document_id == "homes" and 0.99 < hits[0].score <= 1.001
        assert [hit.document_id for hit in by_vector.retrieve("building", top_k=3, min_score=0.9)] == ["homes"]


def test_filters_come_before_ranks(memory):
    assert found(memory, "ferry", document_ids=["homes", "fares"]) == found(memory, "ferry")[1:]
    assert memory.retrieve("dawn", document_ids=["homes"])[0].score == pytest.approx(1)


def test_vectors_come_and_go_with_their_documents(memory, encoder):
    assert encoders(memory) == dict.fromkeys(PAGES, "concepts")
    n_texts = len(encoder.texts)
    assert memory.add(list(PAGES.items())).unchanged == list(PAGES)
    memory.add([("boats", "A library of books.")])
    assert len(encoder.texts) == n_texts + 1
    assert found(memory, "volume")[0] == "boats"
    memory.remove("boats")
    assert set(encoders(memory)) == {"fares", "homes"}
    assert "boats" not in found(memory, "volume")


def test_passages_that_are_extended_keep_their_vectors(memory, encoder):
    memory.add_passages("talk", ["We took the boat.", "It was late."])
    n_texts = len(encoder.texts)
    memory.add_passages("talk", ["The ticket was dear."], extend=True)
    assert len(encoder.texts) == n_texts + 1
    assert memory.retrieve("price", top_k=2)[0].ordinal in {0, 2}
    assert {(v.encoder, v.vector is None) for v in memory.store.vectors()} == {("concepts", False)}


def test_vectors_of_another_encoder_are_an_error_that_names_the_way(memory, backbone, encoder):
    path, kept = memory.path, memory.settings.keep_text
    memory.close()
    other = Concepts("other")
    with opened(path, backbone, encoder=other) as again:
        with pytest.raises(EncoderError, match=r"3 of 3 passages.*'concepts'.*other.*add --stale"):
            again.ask("ferry")
        report = again.refresh()
        if kept:
            assert sorted(report.replaced) == sorted(PAGES) and report.n_passages == 0
            assert set(encoders(again).values()) == {"other"}
        else:
            assert [error.where for error in report.errors] == sorted(PAGES)
            assert again.add(list(PAGES.items())).n_passages == 0  # vectors only: the caches are there
        assert found(again, "ferry")[0] == "boats"
        assert again.refresh().unchanged == sorted(PAGES)


def test_an_encoder_that_is_not_passed_is_an_error(memory, backbone):
    path = memory.path
    memory.close()
    with opened(path, backbone) as again:
        assert (again.settings.retriever, again.settings.encoder) == ("hybrid", "concepts")
        for act in (lambda: again.ask("ferry"), lambda: again.add(["new"])):
            with pytest.raises(EncoderError, match="'concepts' is not built in"):
                act()
    with opened(path, backbone, retriever="bm25") as again:
        assert found(again, "vessel") == ["boats"]


def test_an_encoder_that_fails_stores_no_document(tmp_path, backbone):
    def broken(texts):
        raise OSError("gone")

    with opened(tmp_path / "store", backbone, encoder=broken) as memory:
        with pytest.raises(EncoderError, match="gone"):
            memory.add([("a", "The ferry.")])
        assert memory.documents() == []


def test_vectors_travel_with_archives(memory, tmp_path, backbone, encoder):
    export_collection(memory.store, tmp_path / "all.kvmemory")
    with Store.open(tmp_path / "copy") as copy_:
        import_archive(tmp_path / "all.kvmemory", copy_)
        assert copy_.vectors() == memory.store.vectors()
    with opened(tmp_path / "copy", backbone, encoder=encoder) as again:
        assert found(again, "ferry") == found(memory, "ferry")


@pytest.mark.parametrize("vector", [b"", b"\0", np.array([np.nan], "<f2").tobytes(), None])
def test_malformed_vectors_in_an_archive_are_refused(tmp_path, vector):
    with Store.open(tmp_path / "store") as store:
        passage = PassageRecord(text="a", n_tokens=1, encoder="e", vector=vector)
        store.put_document(DocumentRecord(id="a", content_sha256="0" * 64, passages=(passage,)))
        export_collection(store, tmp_path / "bad.kvmemory")
    with Store.open(tmp_path / "copy") as copy_, pytest.raises(TransferError, match="vector"):
        import_archive(tmp_path / "bad.kvmemory", copy_)


def test_collections_share_the_encoder(memory, encoder):
    other = memory.in_collection("other")
    other.add([("x", "The boat.")])
    assert other.encoder is memory.encoder
    assert found(other, "ferry") == ["x"]


def test_copies_of_a_memory_bring_the_encoder(memory):
    again = copy.copy(memory)
    with again:
        assert again.encoder is not None and again.encoder.name == "concepts"
    assert pickle.loads(pickle.dumps(memory)).encoder.name == "concepts"


def test_no_vector_without_an_encoder(tmp_path, backbone):
    with opened(tmp_path / "store", backbone) as memory:
        memory.add(["The ferry."])
        assert memory.encoder is None
        with closing(sqlite3.connect(memory.path / "catalog.sqlite")) as connection:
            assert connection.execute("SELECT encoder, vector FROM passage").fetchall() == [("", None)]


@pytest.mark.parametrize(
    "options", [{"retriever": "vectors"}, {"retriever": "hybrid", "encoder": "none"}, {"encoder": 7}]
)
def test_settings_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"encoder|retriever"):
        KVMemory.open(tmp_path / "store", load_model=False, **options)


def test_scores_are_fused():
    by_word, by_vector = np.array([4.0, 3.0, 1.0, -np.inf, -np.inf]), np.array([-0.1, 0.8, 0.2, 0.4, -0.2])
    assert fused([by_word, by_vector]).tolist() == [0.5, 0.875, 0.25, 0.25, -np.inf]
    assert fused([by_word, np.full(5, -np.inf)])[0] == 0.5
    assert fused([np.zeros(0), np.zeros(0)]).tolist() == []
