"""Answers where a cache is missing or damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.compress import Compressor
from kv_memory.errors import CacheNotFoundError, CorruptCacheError, StoreFullError
from kv_memory.generate import Generator
from kv_memory.query import key_of
from tests.memories import FERRY, FERRY_QUESTION, SETTINGS, blob_of, open_memory
from tests.query_samples import ASKED, SAMPLED, WALRUS, of, reference
from tests.reference import recorded_inputs


def plain(wide: Any, text: str) -> Any:
    return Compressor(wide, selector="attention").compress(text, keep_ratio=1.0)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 0xFF
    path.write_bytes(data)


def test_a_missing_cache_is_an_error(memory: KVMemory, wide: Any) -> None:
    with recorded_inputs(wide) as inputs:
        for call in (
            lambda: memory.reader.reply(ASKED, [reference(FERRY), reference(WALRUS)]),
            lambda: memory.reader.reply(ASKED, [reference(FERRY, keep_ratio=0.5)]),
        ):
            with pytest.raises(CacheNotFoundError) as caught:
                call()
            assert caught.value.next_step
    assert inputs == []


def test_the_text_replaces_a_missing_cache(memory: KVMemory, wide: Any) -> None:
    cache = memory.store.get(key_of(FERRY), memory.compressor.fingerprint(), 0.25)
    expected = Generator(wide).generate(FERRY_QUESTION, [plain(wide, WALRUS), cache], settings=SAMPLED)
    references = [reference(WALRUS, text=WALRUS), reference(FERRY)]
    reply = memory.reader.reply(ASKED, references, settings=SAMPLED).answer
    assert reply.text == expected.text
    assert reply.n_prompt_tokens == len(wide.encode_question(FERRY_QUESTION) + wide.encode_document(WALRUS))
    assert reply.n_cached_tokens == 11 + cache.n_kept
    assert reply.damaged == ()
    assert not memory.reader.has(WALRUS)  # nobody asked for it to be kept


def test_the_text_is_not_prefilled_if_there_is_a_cache(memory: KVMemory) -> None:
    expected = memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS).answer
    assert of(memory.reader.reply(ASKED, [reference(FERRY, text=FERRY)], settings=SETTINGS).answer) == of(expected)


@pytest.mark.parametrize("text", [None, FERRY])
def test_a_damaged_cache_is_replaced_by_its_text_and_recreated(memory: KVMemory, wide: Any, text: str | None) -> None:
    before = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED).answer
    damage(blob_of(memory, "ferry"))
    expected = Generator(wide).generate(FERRY_QUESTION, [plain(wide, FERRY)], settings=SAMPLED)
    with open_memory(memory.path, wide) as other:  # a process that has verified the blob would not hash it again
        reply = other.reader.reply(ASKED, [reference(FERRY, text=text)], settings=SAMPLED).answer
        assert (reply.text, reply.damaged, reply.n_cached_tokens) == (expected.text, (key_of(FERRY),), 11)
        assert reply.n_prompt_tokens == len(wide.encode_question(FERRY_QUESTION) + wide.encode_document(FERRY))
        assert of(other.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED).answer) == of(before)
        assert other.check().ok


def test_a_damaged_cache_of_another_collection_is_recreated(memory: KVMemory, wide: Any) -> None:
    with open_memory(memory.path, wide, collection="tenant", keep_text=True) as tenant:
        tenant.add(("walrus", WALRUS))
        before = tenant.reader.reply(ASKED, [reference(WALRUS)], settings=SAMPLED).answer
        damage(blob_of(tenant, "walrus"))
    given_ = reference(WALRUS, collection="tenant")
    reply = memory.reader.reply(ASKED, [given_], settings=SAMPLED).answer
    expected = Generator(wide).generate(FERRY_QUESTION, [plain(wide, WALRUS)], settings=SAMPLED)
    assert (reply.text, reply.damaged) == (expected.text, (key_of(WALRUS),))
    assert of(memory.reader.reply(ASKED, [given_], settings=SAMPLED).answer) == of(before)
    assert not memory.reader.has(WALRUS)  # it was made again where it belongs


def test_a_damaged_cache_without_any_text_is_an_error(memory: KVMemory, wide: Any) -> None:
    memory.store.put(key_of(WALRUS), memory.compressor.compress(WALRUS, keep_ratio=0.25))
    key = next(info.blob_key for info in memory.store.caches() if info.text_sha256 == key_of(WALRUS))
    damage(next(p for p in (memory.path / "blobs").rglob("*.val") if hashlib.sha256(p.read_bytes()).hexdigest() == key))
    with open_memory(memory.path, wide) as other:
        with pytest.raises(CorruptCacheError):
            other.reader.reply(ASKED, [reference(WALRUS)])
        with pytest.raises(CacheNotFoundError):  # it is in quarantine now
            other.reader.reply(ASKED, [reference(WALRUS)])


def test_a_text_that_does_not_match_its_key_is_not_stored(memory: KVMemory, wide: Any) -> None:
    damage(blob_of(memory, "ferry"))
    with open_memory(memory.path, wide) as other:
        reply = other.reader.reply(ASKED, [reference(FERRY, text=WALRUS)], settings=SAMPLED).answer
        expected = Generator(wide).generate(FERRY_QUESTION, [plain(wide, WALRUS)], settings=SAMPLED)
        assert (reply.text, reply.damaged) == (expected.text, (key_of(FERRY),))
        assert not other.reader.has(FERRY)


def test_a_reply_does_not_fail_on_a_full_disk(memory: KVMemory, wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError("no space left")

    damage(blob_of(memory, "ferry"))
    with open_memory(memory.path, wide) as other:
        monkeypatch.setattr(other.store, "put", full)
        assert other.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS).answer.damaged == (key_of(FERRY),)
