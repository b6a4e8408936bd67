from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kv_memory.errors import ConfigError, DocumentNotFoundError
from kv_memory.retrieval.hashed_terms import terms_of
from kv_memory.retrieval.retriever import Hit, Retriever
from kv_memory.store import StoredPassage


def passage(document_id: str, text: str, ordinal: int = 0) -> StoredPassage:
    digest = hashlib.sha256(text.encode()).hexdigest()
    title = {"title": document_id}
    return StoredPassage(
        document_id=document_id, ordinal=ordinal, text=text, text_sha256=digest, n_tokens=1, metadata=title
    )


class Shelf:
    """A collection in memory that counts how often all of its passages are asked for."""

    def __init__(self, found: Sequence[StoredPassage]) -> None:
        self.found = list(found)
        self.revision = 1
        self.index_folder = Path()
        self.n_reads = 0

    def passages(self) -> Sequence[StoredPassage]:
        self.n_reads += 1
        return self.found

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {passage.document_id: passage.metadata for passage in self.found}

    def passage(self, document_id: str, ordinal: int) -> StoredPassage:
        for passage in self.found:
            if (passage.document_id, passage.ordinal) == (document_id, ordinal):
                return passage
        raise DocumentNotFoundError(f"no {document_id}")

    def open(self, folder: Path, *, revision: int = 1) -> Retriever:
        """The index in a folder, loaded or built."""
        self.index_folder, self.revision = folder, revision
        collection: Any = self
        index = Retriever(collection)
        index.retrieve("", top_k=1)
        return index


TEXTS = {
    "nats": "The nats-server speaks JetStream, which stores messages in streams.",
    "http": "HTTP/2 multiplexes requests over one connection.",
    "lang": "C is a language. R is another.",
    "zh": "黑猫坐在垫子上。",
    "th": "แมวนั่งบนเสื่อ",
    "ru": "Кошка сидит на коврике.",
    "cook": "Simmer the onions slowly, then add the tomatoes to the stream of oil.",
    "marks": "?! ...",
}


@pytest.fixture
def shelf() -> Shelf:
    return Shelf([passage(name, text) for name, text in TEXTS.items()])


def ids(hits: Sequence[Hit]) -> list[str]:
    return [hit.document_id for hit in hits]


# Finding


@pytest.mark.parametrize(
    ("question", "best"),
    [
        ("what does nats-server do", "nats"),
        ("jetstream", "nats"),
        ("Jet-Stream?", "nats"),
        ("nats server", "nats"),
        ("HTTP/2", "http"),
        ("http 2", "http"),
        ("C", "lang"),
        ("r", "lang"),
        ("猫", "zh"),
        ("垫子", "zh"),
        ("แมว", "th"),
        ("КОШКА", "ru"),
        ("onions", "cook"),
    ],
)
def test_retrieves_the_best_passage_first(tmp_path, shelf, question, best):
    hits = shelf.open(tmp_path).retrieve(question, top_k=3)
    assert hits[0].document_id == best
    assert hits[0].score > 0
    assert (hits[0].text, hits[0].metadata) == (TEXTS[best], {"title": best})
    assert hits[0].text_sha256 == hashlib.sha256(TEXTS[best].encode()).hexdigest()


@pytest.mark.parametrize("question", ["", "?!", " \n", "\U0001f600", "unheard", "\ud800"])
def test_question_without_shared_words_finds_nothing(tmp_path, shelf, question):
    assert shelf.open(tmp_path).retrieve(question, top_k=5) == []


def test_passages_without_a_shared_word_are_left_out_for_any_top_k(tmp_path, shelf):
    hits = shelf.open(tmp_path).retrieve("stream", top_k=1000)
    assert set(ids(hits)) == {"nats", "cook"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_ties_are_ordered_by_document_id_and_ordinal(tmp_path):
    texts = ["same", "same other words", "same same same other"]
    found = [passage(f"d{i:02}", texts[(i * 7 + j) % 3], j) for i in range(40) for j in range(12)]
    random.Random(0).shuffle(found)
    hits = Shelf(found).open(tmp_path).retrieve("same", top_k=400)
    assert len({hit.score for hit in hits}) == 3
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.document_id, hit.ordinal))


def test_a_rare_word_counts_more_than_a_common_one(tmp_path):
    texts = ["common common common", "common words", "common rare", "common things", "other things"]
    shelf = Shelf([passage(f"d{i}", text) for i, text in enumerate(texts)])
    assert shelf.open(tmp_path).retrieve("common rare", top_k=1)[0].document_id == "d2"


@pytest.mark.parametrize("texts", [[], ["?!", "..."]])
def test_index_without_words_works_and_is_saved(tmp_path, texts):
    shelf = Shelf([passage(f"d{i}", text) for i, text in enumerate(texts)])
    for _ in range(2):
        index = shelf.open(tmp_path)
        assert index.retrieve("anything", top_k=3) == []
    assert shelf.n_reads == 1


def test_deleted_or_changed_passages_are_skipped(tmp_path):
    shelf = Shelf([passage(name, f"{'word ' * n}end") for n, name in ((3, "a"), (2, "b"), (1, "c"))])
    index = shelf.open(tmp_path)
    assert ids(index.retrieve("word", top_k=3)) == ["a", "b", "c"]
    shelf.found = [passage("b", "changed"), shelf.found[2]]
    assert ids(index.retrieve("word", top_k=1)) == ["c"]


@pytest.mark.parametrize("top_k", [0, -1])
def test_invalid_top_k_is_refused(tmp_path, shelf, top_k):
    with pytest.raises(ConfigError, match="top_k"):
        shelf.open(tmp_path).retrieve("word", top_k=top_k)


def test_threads_get_the_same_hits(tmp_path, shelf):
    index = shelf.open(tmp_path)
    expected = index.retrieve("streams of messages", top_k=5)
    found: list[bool] = []
    threads = [
        Thread(
            target=lambda: found.extend(index.retrieve("streams of messages", top_k=5) == expected for _ in range(50))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


# Without texts

QUESTIONS = (
    "stream",
    "nats-server HTTP/2 stream",
    "猫",
    "the of to",
    "what does the C language say of oil?",
    "C C oil",
)


def without_text(kept: StoredPassage) -> StoredPassage:
    """The same passage as the store has it without its text."""
    return replace(kept, text=None, terms=terms_of(kept.text or ""))


def scored(hits: Sequence[Hit]) -> list[tuple[str, int, float]]:
    return [(hit.document_id, hit.ordinal, hit.score) for hit in hits]


@pytest.mark.parametrize("n_without", [1, 4, len(TEXTS)])
def test_the_ranking_is_the_same_without_texts(tmp_path, shelf, n_without):
    rest = Shelf([without_text(p) if i < n_without else p for i, p in enumerate(shelf.found)])
    index, expected = rest.open(tmp_path / "without"), shelf.open(tmp_path / "with")
    again = rest.open(tmp_path / "without")
    for question in QUESTIONS:
        hits = expected.retrieve(question, top_k=9)
        assert scored(index.retrieve(question, top_k=9)) == scored(again.retrieve(question, top_k=9)) == scored(hits)
    assert rest.n_reads == 1
    assert {h.text for h in index.retrieve("stream", top_k=9)} <= {None, *TEXTS.values()}


def test_the_ranking_of_many_passages_is_the_same_without_texts(tmp_path):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(60)]
    shelf = Shelf([passage(f"d{i:03}", " ".join(draw.choices(words, k=draw.randint(1, 90)))) for i in range(300)])
    rest = Shelf([*map(without_text, shelf.found)])
    index, expected = rest.open(tmp_path / "without"), shelf.open(tmp_path / "with")
    for _ in range(5):
        question = " ".join(draw.choices(words, k=6))
        assert scored(index.retrieve(question, top_k=300)) == scored(expected.retrieve(question, top_k=300))


def test_the_index_contains_no_words(tmp_path, shelf):
    shelf.open(tmp_path)
    stored = (tmp_path / "bm25.index").read_bytes().lower()
    for word in (b"jetstream", b"onions", b"multiplexes", b"tomatoes"):
        assert word not in stored


def test_passage_with_neither_text_nor_terms_is_never_found(tmp_path, shelf):
    shelf.found[0] = replace(shelf.found[0], text=None, text_sha256="0" * 64)
    assert ids(shelf.open(tmp_path).retrieve("stream JetStream", top_k=9)) == ["cook"]


# Keeping


def test_a_second_open_loads_the_same_index_without_the_passages(tmp_path, shelf):
    first = shelf.open(tmp_path / "new" / "folder")
    second = shelf.open(tmp_path / "new" / "folder")
    assert shelf.n_reads == 1
    for question in ("stream", "nats-server HTTP/2", "猫", "the of to"):
        assert second.retrieve(question, top_k=9) == first.retrieve(question, top_k=9)


def test_index_is_rebuilt_for_another_revision(tmp_path, shelf):
    shelf.open(tmp_path, revision=1)
    shelf.found.append(passage("new", "zebra"))
    assert shelf.open(tmp_path, revision=1).retrieve("zebra", top_k=1) == []
    assert ids(shelf.open(tmp_path, revision=2).retrieve("zebra", top_k=1)) == ["new"]
    assert shelf.n_reads == 2


def test_the_file_is_the_same_in_every_process(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom test_bm25 import passage, Shelf, TEXTS\n"
        "Shelf([passage(n, t) for n, t in TEXTS.items()]).open(Path(sys.argv[2]))\n"
    )
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / seed)]
        subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, timeout=60)
    assert (tmp_path / "1" / "bm25.index").read_bytes() == (tmp_path / "2" / "bm25.index").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
        lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],
        lambda raw: b"no index at all\n" + raw,
        # With a digest that fits, as another program might write it.
        lambda raw: hashlib.sha256(b"no tensors").hexdigest().encode() + b"\n" + b"no tensors",
        lambda raw: hashlib.sha256(b"").hexdigest().encode() + b"\n",
    ],
)
def test_damaged_index_is_rebuilt(tmp_path, shelf, damage, caplog):
    expected = shelf.open(tmp_path).retrieve("stream", top_k=5)
    path = tmp_path / "bm25.index"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert shelf.open(tmp_path).retrieve("stream", top_k=5) == expected
    assert shelf.n_reads == 2
    assert "will be rebuilt" in caplog.text
    assert path.read_bytes() == whole


def test_index_that_cannot_be_saved_still_works(tmp_path, shelf, caplog):
    (tmp_path / "file").write_text("in the way")
    index = shelf.open(tmp_path / "file")
    assert ids(index.retrieve("onions", top_k=1)) == ["cook"]
    assert "cannot be saved" in caplog.text


def test_folder_in_place_of_the_index_file_is_tolerated(tmp_path, shelf):
    (tmp_path / "bm25.index").mkdir()
    assert ids(shelf.open(tmp_path).retrieve("onions", top_k=1)) == ["cook"]
    assert [p.name for p in tmp_path.iterdir()] == ["bm25.index"]  # no temporary file is left


def test_nothing_is_printed_or_logged_and_no_file_is_left(tmp_path, shelf, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    shelf.open(tmp_path).retrieve("stream", top_k=5)
    shelf.open(tmp_path).retrieve("stream", top_k=5)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert [p.name for p in tmp_path.iterdir()] == ["bm25.index"]


def test_old_temporary_files_of_crashes_are_removed(tmp_path, shelf):
    old, new = tmp_path / "bm25.indexold.tmp", tmp_path / "bm25.indexnew.tmp"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    shelf.open(tmp_path)
    assert not old.exists()
    assert new.exists()


WRITE_FOR_EVER = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_bm25 import passage, Shelf
shelf = Shelf([passage(f"d{i}", f"word{i} " * 20) for i in range(300)])
shelf.open(Path(sys.argv[2]), revision=0)
print("ready", flush=True)
revision = 0
while True:
    revision += 1
    shelf.open(Path(sys.argv[2]), revision=revision)
"""


def test_killed_writer_leaves_a_complete_index_or_none(tmp_path, caplog):
    shelf = Shelf([passage("mine", "onions")])
    for delay_s in (0.02, 0.11):
        arguments = [sys.executable, "-c", WRITE_FOR_EVER, str(Path(__file__).parent), str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        digest, _, body = (tmp_path / "bm25.index").read_bytes().partition(b"\n")
        assert digest == hashlib.sha256(body).hexdigest().encode()
    assert ids(shelf.open(tmp_path, revision=-1).retrieve("onions", top_k=1)) == ["mine"]
    assert caplog.records == []


def test_saved_index_of_5000_passages_opens_within_a_second(tmp_path):
    draw = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    shelf = Shelf([passage(f"d{i:04}", " ".join(draw.choices(words, k=60))) for i in range(5000)])
    shelf.open(tmp_path)
    started = time.process_time()  # of the processor: others may be at work on the machine
    index = shelf.open(tmp_path)
    assert time.process_time() - started < 1
    assert shelf.n_reads == 1
    assert len(index.retrieve("word7", top_k=5)) == 5
