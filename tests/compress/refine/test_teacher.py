"""The teacher decodes and predicts behind several documents as behind each of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor
from kv_memory.compress.refine.batching import Row, batch_rows
from kv_memory.compress.refine.teacher import Teacher, stop_ids
from kv_memory.config import DecodeSettings
from kv_memory.generate import Generator, compose
from tests.reference import assert_close, letters, shared_backbone

NAMES = ["llama", "gemma2", "gemma3", "phi3_longrope"]
DOCUMENTS = [letters(40, seed=1), letters(25, seed=2)]
QUESTIONS = ["why so", letters(14, seed=3), "who"]
ROOM = 60


def plain(backbone: Any, text: str) -> Any:
    return Compressor(backbone, selector="sink_recent").compress_ids(backbone.encode(text), keep_ratio=1)


def rows_of(backbone: Any, *, n_wanted: int = 0, documents: int = 2) -> list[Row]:
    asked = [backbone.encode_question(question) for question in QUESTIONS]
    return [Row(d, tuple(ids), len(ids) - n_wanted) for d in range(documents) for ids in asked]


@pytest.mark.parametrize("max_entries", [1, 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_teacher_decodes_the_same_tokens_as_the_generator(name: str, max_entries: int) -> None:
    backbone = shared_backbone(name)
    texts = DOCUMENTS if max_entries > 1 and name != "phi3_longrope" else DOCUMENTS[:1]
    teacher = Teacher(backbone, [backbone.encode(text) for text in texts], room=ROOM, max_entries=max_entries)
    rows = rows_of(backbone, documents=len(texts))
    found = teacher.decode(rows, most=8, ends=stop_ids(backbone), as_answers=True)
    caches = [plain(backbone, text) for text in texts]
    for row, text in zip(rows, found, strict=True):
        question = QUESTIONS[rows.index(row) % len(QUESTIONS)]
        wanted = Generator(backbone).generate(
            question, [caches[row.document]], settings=DecodeSettings(max_new_tokens=8)
        )
        assert tuple(text) == wanted.token_ids


@pytest.mark.parametrize("max_entries", [1, 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_teacher_logits_equal_those_of_the_full_cache(name: str, max_entries: int) -> None:
    backbone = shared_backbone(name)
    teacher = Teacher(backbone, [backbone.encode(DOCUMENTS[0])], room=ROOM, max_entries=max_entries)
    rows = rows_of(backbone, n_wanted=4, documents=1)
    cache = plain(backbone, DOCUMENTS[0])
    found = dict(teacher.logits(rows))
    for row, logits in ((rows[index], found[index]) for index in range(len(rows))):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            every = backbone.logits(ids, compose(backbone, [cache], n_question=ids.shape[1]), every=True)[0]
        assert_close(logits, every[row.n_given - 1 : -1])


def test_seeded_sampling_does_not_depend_on_the_batch() -> None:
    backbone = shared_backbone("llama")
    ids = [backbone.encode(text) for text in DOCUMENTS]
    rows = rows_of(backbone)
    together = Teacher(backbone, ids, room=ROOM, max_entries=10_000)
    alone = Teacher(backbone, ids[:1], room=ROOM, max_entries=1)
    seeds = list(range(len(rows)))
    options: dict[str, Any] = {"most": 8, "ends": set(), "temperature": 1.0}
    first = together.decode(rows, seeds=seeds, **options)
    assert first == together.decode(rows, seeds=seeds, **options)
    assert first[:3] == alone.decode(rows[:3], seeds=seeds[:3], **options)
    assert first != together.decode(rows, seeds=[seed + 1 for seed in seeds], **options)
    assert len({tuple(text) for text in first}) == len(rows), "every row drew the same"


def test_batches_cover_all_rows_and_group_similar_lengths() -> None:
    rows = [Row(0, tuple(range(n)), 1) for n in (5, 40, 6, 41, 7, 60, 5)]
    batches = batch_rows(shared_backbone("llama"), rows, [50], at_once=3, max_tokens=90)
    assert sorted(i for batch in batches for i in batch.index) == list(range(7))
    for batch in batches:
        lengths = [len(rows[i].ids) for i in batch.index]
        assert batch.lengths.tolist() == lengths and len(lengths) <= 3
        assert max(lengths) <= 1.5 * min(lengths) and max(lengths) * len(lengths) <= 90
        assert batch.wanted.sum(1).tolist() == [rows[i].n_wanted for i in batch.index]
        assert batch.wanted[:, 0].all() and not batch.wanted[range(len(lengths)), [n - 1 for n in lengths]].any()
