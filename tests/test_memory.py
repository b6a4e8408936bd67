from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kv_memory import DecodeSettings, KVMemory
from kv_memory.compress import Compressor
from kv_memory.errors import ConfigError, ContextWindowError, DocumentNotFoundError
from kv_memory.generate import Generator
from kv_memory.ingest.pipeline import AddProgress
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    LONG,
    SETTINGS,
    answerable,
    blob_files,
    cache_blobs,
    open_memory,
)
from tests.reference import recorded_inputs

# -- adding ------------------------------------------------------------------------------------------------------------


def test_add_reports_what_it_did(tmp_path: Path, wide: Any) -> None:
    told: list[AddProgress] = []
    with open_memory(tmp_path / "store", wide, keep_ratio=0.5, keep_text=True) as memory:
        report = memory.add([("ferry", FERRY), ("long", LONG)], on_progress=told.append)
        record = memory.document("long")
        assert "".join(p.text for p in record.passages).replace(" ", "") == LONG.replace(" ", "")
        assert all(p.n_tokens <= 64 for p in record.passages)
        stats = memory.stats()
    n_passages = 1 + len(record.passages)
    assert report.added == ["ferry", "long"] and report.replaced == report.unchanged == report.errors == []
    assert report.n_passages == n_passages == len(told) == stats.n_passages == stats.n_caches
    assert report.n_tokens == stats.n_tokens + 6 * n_passages  # the wrappers
    assert report.n_kept == pytest.approx(report.n_tokens / 2, abs=n_passages / 2)
    assert report.full_kv_bytes == report.n_tokens * wide.kv_bytes_per_token
    assert report.cache_bytes == stats.cache_bytes > report.full_kv_bytes / 2
    assert report.elapsed_s > 0
    assert [p.document_id for p in told] == ["ferry"] + ["long"] * (n_passages - 1)
    assert [p.n_documents for p in told] == [0] + [1] * (n_passages - 1)
    assert told[-1].n_tokens == told[-1].n_tokens_total == stats.n_tokens


def test_unchanged_documents_are_not_compressed_again(memory: KVMemory, wide: Any) -> None:
    before = memory.documents(), blob_files(memory)
    with recorded_inputs(wide) as inputs:
        report = memory.add([("lamp", LAMP, {"year": 1921}), ("ferry", FERRY)])
    assert inputs == []
    assert report.unchanged == ["lamp", "ferry"] and report.added == report.replaced == []
    assert (memory.documents(), blob_files(memory)) == before


def test_changed_text_replaces_the_old_text_and_its_caches(memory: KVMemory, wide: Any) -> None:
    old = {info.blob_key for info in memory.store.caches("ferry")}
    with recorded_inputs(wide) as inputs:
        report = memory.add(("ferry", FERRY.replace("7.40", "8.15")))
    assert len(inputs) == 1 and report.replaced == ["ferry"] and report.added == []
    assert "8.15" in memory.document("ferry").passages[0].text
    new = {info.blob_key for info in memory.store.caches()}
    assert not old & new and len(new) == cache_blobs(memory) == 2
    assert memory.check().ok
    assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]


def test_only_changed_passages_of_a_document_are_compressed_again(memory: KVMemory, wide: Any) -> None:
    memory.add(("long", LONG))
    n_passages = len(memory.document("long").passages)
    assert n_passages > 5
    with recorded_inputs(wide) as inputs:
        report = memory.add(("long", LONG.replace("comet", "meteo")))
    assert len(inputs) == report.n_passages == 1
    assert len(memory.store.caches("long")) == len(memory.document("long").passages) == n_passages
    assert cache_blobs(memory) == n_passages + 2


def test_changed_metadata_needs_no_forward_pass(memory: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        report = memory.add(("lamp", LAMP, {"year": 1922}))
    assert inputs == [] and report.replaced == ["lamp"] and report.n_passages == 0
    assert memory.document("lamp").metadata == {"year": 1922}
    assert memory.retrieve(LAMP_QUESTION)[0].metadata == {"year": 1922}
    assert answerable(memory, LAMP_QUESTION) == ["lamp"]


def test_a_text_shared_by_two_documents_is_compressed_once(memory: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        report = memory.add(("copy", FERRY))
    assert inputs == [] and report.added == ["copy"]
    memory.remove("ferry")
    assert answerable(memory, FERRY_QUESTION) == ["copy"]


def test_documents_can_be_kept_unsplit(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, passage_tokens=None, keep_text=True) as memory:
        memory.add(("long", LONG))
        assert [passage.text for passage in memory.document("long").passages] == [LONG]
        assert answerable(memory, "Where is the comet?") == ["long"]
    with open_memory(tmp_path / "store", wide) as memory:  # cut differently, so compressed again
        assert memory.add(("long", LONG)).replaced == ["long"]
        assert len(memory.document("long").passages) == len(memory.store.caches()) > 5


def test_files_and_folders_can_be_added_and_removed(memory: KVMemory, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("A walrus sleeps on the ice.")
    (folder / "b.md").write_text("# Kettle\n\nThe kettle sings.")
    (folder / "c.bin").write_bytes(b"\0\1")
    report = memory.add(folder)
    assert report.added == [(folder / name).as_posix() for name in ("a.txt", "b.md")]
    assert report.skipped == [str(folder / "c.bin")]
    memory.remove(folder / "a.txt")
    assert [d.id for d in memory.documents()] == sorted([(folder / "b.md").as_posix(), "ferry", "lamp"])


def test_invalid_documents_can_be_skipped(memory: KVMemory) -> None:
    report = memory.add([("empty", "  "), ("walrus", "The walrus sleeps.")], on_error="skip")
    assert report.added == ["walrus"]
    assert [type(error).__name__ for error in report.errors] == ["EmptyDocumentError"]


def test_remove_deletes_the_document_and_its_caches(memory: KVMemory) -> None:
    memory.remove("ferry")
    assert [document.id for document in memory.documents()] == ["lamp"]
    assert cache_blobs(memory) == 1
    assert memory.ask(FERRY_QUESTION, settings=SETTINGS).finish_reason == "no_sources" or (
        "ferry" not in {hit.document_id for hit in memory.retrieve(FERRY_QUESTION)}
    )
    for call in (memory.remove, memory.document):
        with pytest.raises(DocumentNotFoundError) as caught:
            call("ferry")
        assert "ferry" in str(caught.value) and caught.value.next_step
    assert answerable(memory, LAMP_QUESTION) == ["lamp"]


# -- asking ------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_from_the_best_passage(memory: KVMemory, wide: Any) -> None:
    answer = memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
    (source,) = answer.sources
    assert (source.document_id, source.ordinal, source.text) == ("ferry", 0, FERRY)
    cache = Compressor(wide, selector="attention").compress(FERRY, keep_ratio=0.25)
    expected = Generator(wide).generate(FERRY_QUESTION, [cache], settings=SETTINGS)
    assert answer.text == expected.text.strip()
    assert (answer.question, answer.finish_reason) == (FERRY_QUESTION, expected.finish_reason)
    assert answer.n_prompt_tokens == len(wide.encode_question(FERRY_QUESTION))
    assert answer.n_cached_tokens == 11 + cache.n_kept
    assert 0 < answer.ttft_s <= answer.total_s
    assert (answer.read_from, answer.fallbacks) == ("caches", ())


def test_every_way_to_ask_gives_the_same_answer(memory: KVMemory) -> None:
    both = f"{FERRY_QUESTION} {LAMP_QUESTION}"
    expected = memory.ask(both, settings=SETTINGS)
    assert len(expected.sources) == 2  # three at most, for a model that is not smollm2
    stream = memory.stream(both, settings=SETTINGS)
    assert stream.sources == expected.sources
    assert "".join(stream).strip() == expected.text == stream.answer.text

    async def ask() -> tuple[str, str]:
        answer = await memory.aask(both, settings=SETTINGS)
        pieces = [piece async for piece in memory.astream(both, settings=SETTINGS)]
        return answer.text, "".join(pieces).strip()

    assert asyncio.run(ask()) == (expected.text, expected.text)


def test_the_answer_of_an_unfinished_stream_is_complete(memory: KVMemory) -> None:
    stream = memory.stream(FERRY_QUESTION, settings=SETTINGS)
    first = next(stream)
    assert stream.answer.text == memory.ask(FERRY_QUESTION, settings=SETTINGS).text
    assert first.strip() in stream.answer.text


async def test_a_cancelled_stream_leaves_the_memory_usable(memory: KVMemory, wide: Any) -> None:
    settings = DecodeSettings(max_new_tokens=40)
    with recorded_inputs(wide) as inputs:
        stream: Any = memory.astream(FERRY_QUESTION, settings=settings)
        await anext(stream)
        await stream.aclose()
    assert len(inputs) < 40
    assert memory.ask(FERRY_QUESTION, settings=SETTINGS).text


def test_ask_many_answers_questions_about_one_document(memory: KVMemory) -> None:
    memory.add(("long", LONG))
    questions = ["Where is the comet?", "And the violin?", "Why?"]
    answers = memory.ask_many(questions, document_id="long", settings=SETTINGS)
    assert [answer.question for answer in answers] == questions
    assert all(len(answer.sources) == len(memory.document("long").passages) for answer in answers)
    (alone,) = memory.ask_many(questions[1:2], document_id="long", settings=SETTINGS)
    assert alone.text == answers[1].text
    with pytest.raises(DocumentNotFoundError):
        memory.ask_many(questions, document_id="nothing")


def test_an_answer_can_be_read_from_the_text(memory: KVMemory, wide: Any) -> None:
    answer = memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS, read_from="text")
    assert (answer.read_from, answer.n_cached_tokens) == ("text", 11)
    assert answer.n_prompt_tokens == len(wide.encode_document(FERRY)) + len(wide.encode_question(FERRY_QUESTION))
    plain = Compressor(wide, selector="attention").compress(FERRY, keep_ratio=1.0)
    assert answer.text == Generator(wide).generate(FERRY_QUESTION, [plain], settings=SETTINGS).text.strip()
    with pytest.raises(ConfigError, match="thin air"):
        memory.ask(FERRY_QUESTION, read_from="thin air")  # type: ignore[arg-type]


def test_a_question_without_sources_gets_an_empty_answer(memory: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        answer = memory.ask("Xylophone?", settings=SETTINGS)
        assert list(memory.stream("Xylophone?", settings=SETTINGS)) == []
    assert (answer.text, answer.sources, answer.finish_reason) == ("", (), "no_sources")
    assert answer.next_step is not None and "words that occur in the documents" in answer.next_step
    assert inputs == []


def test_only_an_empty_answer_has_a_next_step(memory: KVMemory) -> None:
    answer = memory.ask(FERRY_QUESTION, settings=SETTINGS)
    assert answer.text and answer.next_step is None
    stopped = memory.ask(FERRY_QUESTION, settings=replace(SETTINGS, stop=(answer.text[0],)))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    assert stopped.next_step is not None and "the stop string" in stopped.next_step


def test_an_answer_too_long_for_the_window_is_an_error(memory: KVMemory) -> None:
    with pytest.raises(ContextWindowError) as caught:
        memory.ask(FERRY_QUESTION, settings=DecodeSettings(max_new_tokens=4096))
    assert caught.value.next_step is not None and "packed" in caught.value.next_step
