from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError, DocumentNotFoundError
from kv_memory.retrieval.hashed_terms import terms_of
from tests.memories import wide_backbone

PAGES = {
    "guide": """# Skarholm

The island lies in the north.

## Ferries

### From the mainland

Boats leave at 7.40 and return at 18.00.

## Library

Books are lent for a month.
""",
    "reise": "Die Häuser auf der Insel sind rot gestrichen, und ihre Dächer sind mit Gras gedeckt.",
    "prices": "A ticket costs four crowns. Children travel free. Compressed air costs nothing.",
}


@pytest.fixture(scope="module")
def backbone():
    return wide_backbone()


@pytest.fixture(params=[True, False], ids=["texts", "hashes"])
def memory(request, tmp_path, backbone):
    options = {"passage_tokens": 16, "keep_ratio": 0.5, "selector": "sink_recent", "keep_text": request.param}
    with KVMemory.open(tmp_path / "store", model=backbone, **options) as memory:
        memory.add([(name, text, {"year": 2020 + n, "lang": name[:1]}) for n, (name, text) in enumerate(PAGES.items())])
        yield memory


def found(memory: KVMemory, question: str, **options: object) -> list[str]:
    return list(dict.fromkeys(hit.document_id for hit in memory.retrieve(question, top_k=9, **options)))


def test_forms_of_words_are_found_in_the_language_of_each_document(memory):
    assert found(memory, "compressing") == ["prices"]
    assert found(memory, "ein Haus mit einem Dach") == ["reise"]


def test_a_passage_is_found_by_the_headings_above_it(memory):
    texts = {(p.document_id, p.ordinal): p for p in memory.store.passages()}
    hit = memory.retrieve("ferries from the mainland at 18.00", top_k=1)[0]
    passage = texts[hit.document_id, hit.ordinal]
    assert hit.document_id == "guide"
    last = max(p.ordinal for p in texts.values() if p.document_id == "guide")
    assert memory.retrieve("library month", top_k=1)[0].ordinal == last
    assert (passage.headings == "") == (passage.text is None)


def test_filters_come_before_top_k(memory):
    question = "island ticket costs boats Insel"
    assert len(set(found(memory, question))) == 3
    assert {h.document_id for h in memory.retrieve(question, top_k=1, document_ids=["reise"])} == {"reise"}
    assert set(found(memory, question, filter={"year": [2021, 2022]})) == {"reise", "prices"}
    assert memory.ask(question, top_k=1, filter={"lang": "p"}).sources[0].document_id == "prices"
    assert found(memory, question, document_ids=[]) == []


def test_scores_below_the_least_are_left_out(memory):
    hits = memory.retrieve("ticket island north", top_k=9)
    best = [hit for hit in hits if hit.score == hits[0].score]
    assert len(hits) > len(best)
    assert memory.retrieve("ticket island north", top_k=9, min_score=hits[0].score) == best
    answer = memory.ask("ticket", min_score=1000)
    assert (answer.finish_reason, answer.text) == ("no_sources", "")


def test_what_the_filters_do_not_know_is_an_error(memory):
    with pytest.raises(DocumentNotFoundError, match="nowhere"):
        memory.ask("ticket", document_ids=["nowhere"])
    with pytest.raises(ConfigError, match="Did you mean 'year'"):
        memory.ask("ticket", filter={"yaer": 2020})


def test_metadata_follow_the_documents(memory):
    memory.add([("new", "Another ticket office.", {"place": "pier"})])
    assert found(memory, "ticket", filter={"place": "pier"}) == ["new"]
    memory.remove("new")
    with pytest.raises(ConfigError, match="place"):
        memory.retrieve("ticket", filter={"place": "pier"})


def test_another_language_setting_is_taken_over_without_compressing_again(memory, backbone):
    path = memory.path
    memory.close()
    with KVMemory.open(path, model=backbone, language="none") as again:
        report = again.add([(name, text, {}) for name, text in PAGES.items()])
        assert (sorted(report.replaced), report.n_passages) == (sorted(PAGES), 0)
        assert found(again, "compressing") == []
        assert found(again, "compressed") == ["prices"]
        assert again.add([(name, text, {}) for name, text in PAGES.items()]).unchanged == list(PAGES)


def test_passages_from_before_stems_are_found_by_their_words_until_added_again(memory, backbone):
    path, kept = memory.path, memory.settings.keep_text
    memory.close()
    with closing(sqlite3.connect(path / "catalog.sqlite")) as connection, connection:
        for column in ("language", "headings", "encoder", "vector"):
            connection.execute(f"ALTER TABLE passage DROP COLUMN {column}")
        connection.execute("UPDATE alembic_version SET version_num = '0002'")
        if not kept:  # terms were those of the words
            for id_, document_id in connection.execute(
                "SELECT passage.id, document_id FROM passage JOIN document ON document.id = document_pk"
            ).fetchall():
                words = json.dumps(terms_of(PAGES[document_id]))
                connection.execute("UPDATE passage SET terms = ? WHERE id = ?", (words, id_))
        connection.execute("UPDATE collection SET revision = revision + 1")
    with KVMemory.open(path, model=backbone) as again:
        assert (found(again, "compressed"), found(again, "compressing")) == (["prices"], [])
        report = again.add([(name, text, {}) for name, text in PAGES.items()])
        assert (sorted(report.replaced), report.n_passages) == (sorted(PAGES), 0)
        assert found(again, "compressing") == ["prices"]


def test_an_unknown_language_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="language"):
        KVMemory.open(tmp_path / "store", language="english", load_model=False)


def test_headings_leave_the_store_with_the_texts(memory, backbone):
    path = memory.path
    kept = memory.settings.keep_text
    assert any(p.headings for p in memory.store.passages()) == kept
    memory.close()
    with KVMemory.open(path, model=backbone, keep_text=False) as again:
        again.add([("guide", PAGES["guide"], {})])
        assert not any(p.headings for p in again.store.passages() if p.document_id == "guide")
