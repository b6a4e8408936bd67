"""Budgets of tokens and bytes in a store: what is added, found again, asked, and remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kv_memory import ConfigError, Conversation, KVMemory, Reference, Turn
from kv_memory.cache.keep import Keep
from kv_memory.documents import Document
from kv_memory.errors import CacheNotFoundError, FingerprintMismatchError
from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.query import key_of
from tests.memories import (
    FERRY,
    FERRY_QUESTION,
    LAMP,
    LAMP_QUESTION,
    LONG,
    SETTINGS,
    answerable,
    blob_of,
    open_memory,
    wide_backbone,
)
from tests.reference import recorded_inputs

BUDGETS: list[dict[str, Any]] = [{"keep_tokens": 20}, {"max_bytes": 20_000}]
DOCUMENTS = [("ferry", FERRY), ("lamp", LAMP), ("long", LONG)]


def open_with(path: Path, backbone: Any, **options: Any) -> KVMemory:
    return open_memory(path, backbone, **{"keep_ratio": None, **options})


@pytest.mark.parametrize("budget", BUDGETS)
def test_caches_stay_within_the_budget_and_are_found_after_reopening(
    tmp_path: Path, wide: Any, budget: dict[str, Any]
) -> None:
    with open_with(tmp_path / "store", wide, **budget) as memory:
        assert memory.add(DOCUMENTS).added == ["ferry", "lamp", "long"]
        caches = memory.store.caches()
        assert len({cache.n_tokens for cache in caches}) > 2 < len({cache.keep_ratio for cache in caches})
        for cache in caches:
            assert cache.n_kept <= 20 if "keep_tokens" in budget else cache.size_bytes <= 20_000
        assert max(cache.n_kept for cache in caches) == 20 or max(cache.size_bytes for cache in caches) > 17_000
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
    with KVMemory.open(tmp_path / "store", model=wide) as memory, recorded_inputs(wide) as inputs:
        assert memory.settings.keep == Keep(**budget)
        again = memory.add(DOCUMENTS)
        assert (again.unchanged, again.n_passages) == (["ferry", "lamp", "long"], 0)
        assert memory.refresh().n_passages == 0 and inputs == []
        assert [cache.blob_key for cache in memory.store.caches()] == [cache.blob_key for cache in caches]
        assert memory.store.missing(memory.compressor.fingerprint(), memory.settings.keep) == []


def test_documents_below_the_budget_are_kept_whole(tmp_path: Path, wide: Any) -> None:
    for number, budget in enumerate([{"keep_tokens": 5000}, {"max_bytes": 10**7}]):
        with open_with(tmp_path / str(number), wide, **budget) as memory:
            memory.add(DOCUMENTS)
            assert {cache.keep_ratio for cache in memory.store.caches()} == {1.0}
            assert answerable(memory, FERRY_QUESTION) == ["ferry"]


def test_a_store_can_switch_from_ratio_to_budgets_and_back(tmp_path: Path, wide: Any) -> None:
    path = tmp_path / "store"
    with open_memory(path, wide, keep_ratio=0.25) as memory:
        memory.add(("ferry", FERRY))
    for options, n_passages in (({"keep_tokens": 9}, 1), ({"max_bytes": 19_000}, 1), ({"keep_ratio": 0.25}, 0)):
        with open_memory(path, wide, **{"keep_ratio": None, **options}) as memory:
            report = memory.add(("ferry", FERRY))
            assert report.n_passages == n_passages  # what was made once is there
            assert answerable(memory, FERRY_QUESTION) == ["ferry"]
            stored = memory.store.settings()
            kept = {name: stored[name] for name in ("keep_ratio", "keep_tokens", "max_bytes")}
            assert {name: value for name, value in kept.items() if value is not None} == options
    with open_with(path, wide, keep_tokens=9) as memory:
        assert memory.add(("ferry", FERRY)).unchanged == ["ferry"]
        assert len(memory.store.caches()) == 3


def test_refresh_makes_the_caches_of_a_new_budget(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_text=True) as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
    with open_with(tmp_path / "store", wide, keep_tokens=9) as memory:
        assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).keep_ratios == (0.25,)
        missing = memory.store.missing(memory.compressor.fingerprint(), memory.settings.keep)
        assert [passage.document_id for passage in missing] == ["ferry", "lamp"]
        assert memory.refresh().replaced == ["ferry", "lamp"]
        assert memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).n_cached_tokens == 11 + 9
        assert memory.reader.has(FERRY) and memory.reader.sound(FERRY)
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        with pytest.raises(CacheNotFoundError, match=r"no distilled cache \["):
            memory.reader.check("A text of no document.")
    mismatch = pytest.raises(FingerprintMismatchError, match="architecture is llama in the cache, qwen2 loaded")
    with open_with(tmp_path / "store", wide_backbone("qwen2"), keep_tokens=9) as other, mismatch:
        other.ask(FERRY_QUESTION)


def test_a_damaged_cache_is_recreated_within_the_budget(tmp_path: Path, wide: Any) -> None:
    with open_with(tmp_path / "store", wide, max_bytes=20_000, storage="int8", keep_text=True) as memory:
        memory.add(("lamp", LAMP))
        before = memory.store.caches()
        path = blob_of(memory, "lamp")
        path.write_bytes(path.read_bytes()[:-1])
        assert memory.ask(LAMP_QUESTION, settings=SETTINGS).text
        (again,) = memory.store.caches()
        assert (again.blob_key, again.keep_ratio) == (before[0].blob_key, before[0].keep_ratio)
        assert answerable(memory, LAMP_QUESTION) == ["lamp"]


def test_storage_decides_how_many_entries_fit(tmp_path: Path, wide: Any) -> None:
    kept = {}
    for storage in ("auto", "bfloat16", "int8"):
        with open_with(tmp_path / storage, wide, max_bytes=20_000, storage=storage, passage_tokens=None) as memory:
            memory.add(("long", LONG))
            (cache,) = memory.store.caches()
            kept[storage] = cache.n_kept
            assert 17_000 < cache.size_bytes <= 20_000 and cache.n_kept < cache.n_tokens
    assert 1.8 * kept["auto"] < kept["bfloat16"] < kept["int8"]


def test_a_budget_that_is_too_small_creates_no_store(tmp_path: Path, wide: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        open_with(tmp_path / "store", wide, max_bytes=1000)
    assert caught.value.next_step is not None and not (tmp_path / "store").exists()
    smallest = int(caught.value.next_step.split()[1])
    with open_with(tmp_path / "store", wide, max_bytes=smallest) as memory:
        memory.add(("ferry", FERRY))
        assert [(cache.n_kept, cache.size_bytes <= smallest) for cache in memory.store.caches()] == [(1, True)]
    with open_with(tmp_path / "store", wide, max_bytes=smallest - 1) as memory:
        with pytest.raises(ConfigError, match="max_bytes"):
            memory.add(("lamp", LAMP))
        assert [summary.id for summary in memory.documents()] == ["ferry"]
        assert memory.store.settings()["max_bytes"] == smallest
    with pytest.raises(ConfigError, match="keep_ratio and max_bytes exclude each other"):
        open_memory(tmp_path / "other", wide, keep_ratio=0.5, max_bytes=10**6)


def test_passages_compressed_in_one_batch_keep_their_own_ratios(tmp_path: Path, wide: Any) -> None:
    with open_with(tmp_path / "alone", wide, keep_tokens=20) as memory, open_with(tmp_path / "b", wide) as other:
        memory.add(("long", LONG))
        pipeline = IngestPipeline(other.store, memory.compressor, memory.settings, batch_size=4)
        assert pipeline.add([Document(id="long", text=LONG)]).n_passages == len(memory.store.caches()) > 4
        ratios = {cache.text_sha256: cache.keep_ratio for cache in memory.store.caches()}
        assert {cache.text_sha256: cache.keep_ratio for cache in other.store.caches()} == ratios
        assert pipeline.add([Document(id="long", text=LONG)]).unchanged == ["long"]


def test_collections_and_conversations_can_have_their_own_budgets(memory: KVMemory) -> None:
    few = memory.in_collection("tenant", keep_tokens=7)
    few.add(("ferry", FERRY))
    assert few is memory.in_collection("tenant", keep_tokens=7) is not memory.in_collection("tenant")
    assert [cache.n_kept for cache in few.store.caches()] == [7]
    (cache,) = few.store.caches()
    found = [Reference(key=key_of(FERRY), keep_ratio=cache.keep_ratio, collection="tenant")]
    turns = [Turn("user", "What is my dog called?")]
    assert memory.reader.reply(turns, found, settings=SETTINGS).answer.n_cached_tokens == 11 + 7

    old = Conversation(memory, "alice", keep_tokens=9)
    old.add([Turn("user", "My dog is called Biscuit.")])
    old.add([Turn("user", "I drink green tea, and my sister drinks black coffee.")])
    for question in ("dog", "tea"):
        (reference,) = old.recall(question)
        assert reference == Reference.parse(str(reference)) and reference.keep_ratio not in (None, 0.25)
        assert memory.reader.reply(turns, [reference], settings=SETTINGS).answer.n_cached_tokens == 11 + 9


@pytest.mark.parametrize("later", [{"keep_ratio": 0.125}, {"keep_tokens": 9}, {"max_bytes": 60_000}])
def test_adding_at_another_amount_leaves_everything_answerable(
    tmp_path: Path, wide: Any, later: dict[str, Any]
) -> None:
    def asked(memory: KVMemory) -> tuple[float, ...]:
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]
        both = memory.ask(f"{FERRY_QUESTION} {LAMP_QUESTION}", top_k=2, settings=SETTINGS)
        assert len(both.sources) == 2 and not both.fallbacks
        kept = {info.text_sha256: info.n_kept for info in memory.store.caches()}
        assert both.n_cached_tokens == 11 + sum(kept[source.text_sha256] for source in both.sources)
        return both.keep_ratios

    with open_memory(tmp_path / "store", wide, keep_ratio=0.25, keep_text=True) as memory:
        memory.add(("ferry", FERRY))
    with open_memory(tmp_path / "store", wide, **{"keep_ratio": None, **later}) as memory:
        memory.add(("lamp", LAMP))
        assert 0.25 in asked(memory) and len(set(asked(memory))) == 2
    with KVMemory.open(tmp_path / "store", model=wide) as memory:
        assert 0.25 in asked(memory)
        # The preferred amount wins where both are stored.
        memory.refresh()
        assert len(memory.store.caches("ferry")) == 2
        (ratio,) = memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).keep_ratios
        assert ratio != 0.25
        with open_memory(tmp_path / "store", wide, keep_ratio=0.25) as first:
            assert first.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS).keep_ratios == (0.25,)
