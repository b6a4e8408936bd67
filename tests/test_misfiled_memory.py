"""A catalog that names sound files of something else: what is asked is answered from the text, not from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import text as sql

from kv_memory import KVMemory
from kv_memory.compress import Compressor
from kv_memory.generate import Generator, Turn
from kv_memory.query import Reference, key_of
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, SETTINGS, answerable, open_memory, wide_backbone
from tests.reference import recorded_inputs


def give_ferry_the_lamps_cache(memory: KVMemory) -> None:
    with memory.store.catalog.write() as session:
        lamp = {"lamp": key_of(LAMP), "ferry": key_of(FERRY)}
        row = session.execute(
            sql("SELECT blob_key, size_bytes FROM distilled_cache WHERE text_sha256 = :lamp"), lamp
        ).one()
        statement = "UPDATE distilled_cache SET blob_key = :key, size_bytes = :size WHERE text_sha256 = :ferry"
        session.execute(sql(statement), {"key": row[0], "size": row[1], **lamp})


def from_text(wide: Any) -> str:
    plain = Compressor(wide, selector="attention").compress(FERRY, keep_ratio=1.0)
    return Generator(wide).generate(FERRY_QUESTION, [plain], settings=SETTINGS).text


def test_a_swapped_row_is_answered_from_the_text(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_text=True) as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
        give_ferry_the_lamps_cache(memory)
        answer = memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
        assert answer.fallbacks == ("ferry",) and answer.text == from_text(wide).strip()
        assert answerable(memory, FERRY_QUESTION, LAMP_QUESTION) == ["ferry", "lamp"]  # it was made again
        memory.gc()
        assert memory.check().ok


def test_the_text_in_the_reference_is_used_if_none_is_stored(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_text=False) as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP)])
        give_ferry_the_lamps_cache(memory)
        reference = Reference(key=key_of(FERRY), text=FERRY)
        reply = memory.reader.reply([Turn("user", FERRY_QUESTION)], [reference], settings=SETTINGS).answer
        assert reply.damaged == (key_of(FERRY),) and reply.text == from_text(wide)


def test_a_prefix_of_another_prompt_is_prefilled_again(memory: KVMemory) -> None:
    """The same number of tokens in the same shape: only its name tells that it is of another prompt."""
    expected = memory.ask(LAMP_QUESTION, settings=SETTINGS).text
    with memory.store.catalog.write() as session:
        done: Any = session.execute(sql("UPDATE prefix SET key = 'of another prompt'"))
        assert done.rowcount == 1
    backbone = wide_backbone()
    with open_memory(memory.path, backbone) as other:
        other.ask(LAMP_QUESTION, settings=SETTINGS)
    with memory.store.catalog.write() as session:
        keys = session.execute(sql("SELECT key FROM prefix ORDER BY id")).scalars().all()
        assert len(keys) == 2
    # The file says under which name it was written, whatever the row says.
    path = memory.store.get_prefix("of another prompt")
    assert path is not None
    before = path.read_bytes()
    other_bytes = before.replace(backbone.prefix_key.encode(), b"0" * len(backbone.prefix_key))
    assert other_bytes != before
    memory.store.put_prefix(backbone.prefix_key, other_bytes)
    fresh = wide_backbone()
    with recorded_inputs(fresh) as inputs, open_memory(memory.path, fresh) as other:
        assert [ids.shape[1] for ids in inputs] == [11]
        assert other.ask(LAMP_QUESTION, settings=SETTINGS).text == expected
