"""Caches that stay composed in memory: the same answers, within the limit, and never of a document that has gone."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory import KVMemory
from kv_memory.compress import Compressor, Reconstruction
from kv_memory.errors import CacheNotFoundError, ConfigError, CorruptCacheError
from kv_memory.generate import Generator
from kv_memory.lazy_compressor import default_hot_size_bytes
from kv_memory.model.hot import HotCaches
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, SETTINGS, blob_of, open_memory, wide_backbone
from tests.query_samples import ASKED, reference
from tests.reference import letters, shared_backbone

COMPOSE = sys.modules["kv_memory.generate.compose"]  # the package has a function of this name


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of documents of each composition."""
    counted: list[int] = []
    assemble = COMPOSE._assemble

    def count(backbone: Any, caches: Any, *args: Any) -> Any:
        counted.append(len(caches))
        return assemble(backbone, caches, *args)

    monkeypatch.setattr(COMPOSE, "_assemble", count)
    return counted


def two_documents(path: Path, **options: Any) -> KVMemory:
    memory = open_memory(path, wide_backbone(), **options)
    memory.add([("ferry", FERRY), ("lamp", LAMP)])
    age(memory)
    return memory


def age(memory: KVMemory) -> None:
    """Let the files look at rest: one that is younger than 50 ms is hashed and loaded each time."""
    for file in (memory.path / "blobs").rglob("*.val"):
        os.utime(file, ns=(time.time_ns() - 10**9,) * 2)
    time.sleep(0.06)  # the time of the change itself


@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_the_second_question_about_a_document_composes_nothing(
    tmp_path: Path, composed: list[int], storage: str
) -> None:
    with two_documents(tmp_path, storage=storage) as memory:
        questions = [FERRY_QUESTION, LAMP_QUESTION, "Which ferry, and where does it leave?", FERRY_QUESTION]
        hot = [memory.ask(question, top_k=1, settings=SETTINGS).token_ids for question in questions]
        assert composed == [1, 1]
        assert 0 < memory.backbone.hot.size_bytes <= default_hot_size_bytes()
        memory.backbone.hot.limit(0)
        assert memory.backbone.hot.size_bytes == 0
        assert [memory.ask(question, top_k=1, settings=SETTINGS).token_ids for question in questions] == hot
        assert composed == [1] * 6


def test_a_removed_or_replaced_document_is_not_answered_from_memory(tmp_path: Path, composed: list[int]) -> None:
    with two_documents(tmp_path) as memory:
        other = FERRY.replace("pier 4", "pier 5")
        assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).sources[0].text_sha256 == key_of(FERRY)
        memory.add([("ferry", other)])
        assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).sources[0].text_sha256 == key_of(other)
        assert composed == [1, 1]
        with pytest.raises(CacheNotFoundError):
            memory.reader.reply(ASKED, [reference(FERRY)])
        memory.remove("ferry")
        assert all(hit.document_id == "lamp" for hit in memory.ask(FERRY_QUESTION, settings=SETTINGS).sources)


def test_damage_is_found_although_the_cache_is_in_memory(tmp_path: Path, composed: list[int]) -> None:
    with two_documents(tmp_path, keep_text=False) as memory:
        for _ in range(2):
            memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS)
        file = blob_of(memory, "ferry")
        good = file.read_bytes()
        with file.open("r+b") as handle:  # in place: the mapped tensors change too
            handle.seek(-40, 2)
            handle.write(bytes(20))
        with pytest.raises(CorruptCacheError):
            memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS)
        # The same bytes again: neither the damaged tensors nor what was composed of them is used for them.
        memory.add([("ferry", FERRY)])
        assert blob_of(memory, "ferry").read_bytes() == good
        age(memory)
        composed.clear()
        answers = [memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS).answer for _ in range(2)]
        assert composed == [1]
        memory.backbone.hot.limit(0)
        cold = memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS).answer
        assert answers[0].token_ids == answers[1].token_ids == cold.token_ids


def test_questions_at_once_about_one_document_do_not_share_its_room(tmp_path: Path, composed: list[int]) -> None:
    with two_documents(tmp_path) as memory:
        questions = [FERRY_QUESTION, "Which ferry leaves, and from which pier does it leave?"]
        alone = [memory.ask(question, top_k=1, settings=SETTINGS).token_ids for question in questions]
        assert composed == [1]
        streams = [memory.stream(question, top_k=1, settings=SETTINGS) for question in questions]
        for _ in zip(*(stream.each_token() for stream in streams), strict=False):
            pass
        assert [stream.answer.token_ids for stream in streams] == alone
        assert composed == [1, 1]  # the second one had its own


def test_threads_get_the_answers_of_one(tmp_path: Path) -> None:
    with two_documents(tmp_path, hot_size_bytes=200_000) as memory:
        asked = [(q, k) for q in (FERRY_QUESTION, LAMP_QUESTION, "When did the lamp leave the pier?") for k in (1, 2)]
        alone = {one: memory.ask(one[0], top_k=one[1], settings=SETTINGS).token_ids for one in asked}
        many = random.Random(0).choices(asked, k=40)
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda one: memory.ask(one[0], top_k=one[1], settings=SETTINGS), many))
        assert [answer.token_ids for answer in answers] == [alone[one] for one in many]
        assert memory.backbone.hot.size_bytes <= 200_000


def stored(name: str = "llama", n: int = 4) -> tuple[Any, list[Any]]:
    """A model, and caches as they come from a store."""
    backbone = shared_backbone(name)
    compressor = Compressor(backbone, selector=Reconstruction(part_tokens=32))
    made = [compressor.compress(letters(34, seed=seed), keep_ratio=0.25) for seed in range(n)]
    return backbone, [replace(cache, text_sha256=str(index) * 64) for index, cache in enumerate(made)]


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> HotCaches:
    kept = HotCaches()
    for name in ("llama", "phi3_longrope"):
        monkeypatch.setattr(shared_backbone(name), "hot", kept)
    return kept


def test_the_least_recently_used_go_first(hot: HotCaches, composed: list[int]) -> None:
    backbone, caches = stored()
    compose = COMPOSE.compose
    hot.limit(2**30)
    compose(backbone, caches[:1], n_question=5, n_new=3)
    hot.limit(int(2.5 * hot.size_bytes))  # two of them
    for index in (1, 0, 2, 0, 1):
        compose(backbone, [caches[index]], n_question=5, n_new=3)
        assert hot.size_bytes <= hot.limit_bytes
    assert len(composed) == 1 + 3  # 0; 1, not 0, 2, not 0, 1
    compose(backbone, caches, n_question=5, n_new=300)  # larger than the limit: nothing makes way for it
    compose(backbone, [caches[0]], n_question=5, n_new=3)
    assert len(composed) == 5


def test_more_room_or_another_layout_is_composed_anew(hot: HotCaches, composed: list[int]) -> None:
    backbone, caches = stored()
    hot.limit(2**30)
    for n_new, layout in ((3, "source"), (100, "source"), (200, "source"), (150, "source"), (3, "packed")):
        made = COMPOSE.compose(backbone, caches[:2], n_question=5, n_new=n_new, layout=layout)  # type: ignore[arg-type]
        assert made.layers[0]._buffers[0].shape[2] >= made.layer(0)[0].shape[2] + 5 + n_new
        del made
    assert len(composed) == 3  # the room of the first is 128 entries, of the second 256


def test_caches_that_are_not_from_a_store_are_not_kept(hot: HotCaches) -> None:
    backbone, _ = stored()
    hot.limit(2**30)
    made = Compressor(backbone, selector="attention").compress(letters(34), keep_ratio=0.25)
    Generator(backbone).generate("why?", [made], settings=SETTINGS)
    assert hot.size_bytes == 0


def test_keys_that_changed_their_frequencies_are_not_lent_again(hot: HotCaches, composed: list[int]) -> None:
    """Beyond the original window of longrope, an answer rotates the keys of its cache in place."""
    backbone, caches = stored("phi3_longrope", n=2)
    hot.limit(2**30)

    def run(n_steps: int) -> torch.Tensor:
        made = COMPOSE.compose(backbone, caches[:1], n_question=3, n_new=90)
        with torch.no_grad():
            logits = backbone.logits(torch.tensor([[5, 6, 7]]), made)
            for token in range(n_steps):
                backbone.logits(torch.tensor([[token + 3]]), made)
        return logits

    first = run(0)
    gc.collect()
    assert torch.equal(run(0), first) and len(composed) == 1
    run(80)
    assert hot.size_bytes == 0
    gc.collect()
    assert torch.equal(run(0), first) and len(composed) == 2


def test_the_limit_is_checked_and_shared_by_collections(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hot_size_bytes"):
        open_memory(tmp_path / "a", wide_backbone(), hot_size_bytes=-1)
    assert not (tmp_path / "a").exists()
    with open_memory(tmp_path / "b", wide_backbone(), hot_size_bytes=12345) as memory:
        assert memory.in_collection("other").backbone.hot.limit_bytes == 12345
