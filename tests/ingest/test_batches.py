"""Passages that are read several at a time, as on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kv_memory.compress import Adapter, Compressor
from kv_memory.documents import Document
from kv_memory.ingest.pipeline import IngestPipeline
from kv_memory.settings import MemorySettings
from kv_memory.store import Store
from tests.conftest import make_backbone
from tests.memories import LONG
from tests.reference import recorded_inputs

SETTINGS = MemorySettings(keep_ratio=0.25, passage_tokens=64)


@pytest.fixture(scope="module")
def compressor() -> Any:
    backbone = make_backbone(max_position_embeddings=4096)
    backbone.prefix  # noqa: B018 (so that the tests see documents only)
    # One forward pass a batch, for counting.
    return Compressor(backbone, adapter=Adapter.create(backbone, rank=2, scorer="head", first_routed_layer=1))


def pipeline(store: Store, compressor: Any, **options: Any) -> IngestPipeline:
    return IngestPipeline(store, compressor, SETTINGS, **options)


@pytest.mark.parametrize("writer", [False, True])
def test_passages_of_similar_length_are_prefilled_in_batches(tmp_path: Path, compressor: Any, writer: bool) -> None:
    told = []
    with ThreadPoolExecutor(1) as pool, Store.open(tmp_path / "a") as store, Store.open(tmp_path / "b") as other:
        options = {"writer": pool} if writer else {}
        with recorded_inputs(compressor.backbone) as inputs:
            report = pipeline(store, compressor, batch_size=4, on_progress=told.append, **options).add(
                [Document(id="long", text=LONG)]
            )
        alone = pipeline(other, compressor).add([Document(id="long", text=LONG)])
        assert report.added == alone.added == ["long"]
        assert report.n_passages == alone.n_passages == len(store.caches()) > 4
        assert (report.n_tokens, report.n_kept) == (alone.n_tokens, alone.n_kept)
        rows = [ids.shape[0] for ids in inputs]
        assert sum(rows) == report.n_passages and max(rows) == 4
        assert told[-1].n_tokens == told[-1].n_tokens_total and len(told) == len(rows)
        digest = pipeline(store, compressor).fingerprint
        assert store.missing(digest, 0.25) == []
        for mine, theirs in zip(store.passages(), other.passages(), strict=True):
            caches = [s.get(p.text_sha256, digest, 0.25) for s, p in ((store, mine), (other, theirs))]
            assert caches[0].positions.tolist() == caches[1].positions.tolist()
        with recorded_inputs(compressor.backbone) as inputs:
            again = pipeline(store, compressor, batch_size=4).add([Document(id="long", text=LONG)])
        assert again.unchanged == ["long"] and not inputs


def test_passages_with_a_token_budget_are_prefilled_in_batches(tmp_path: Path, compressor: Any) -> None:
    with Store.open(tmp_path / "store") as store:
        made = IngestPipeline(store, compressor, MemorySettings(keep_tokens=20, passage_tokens=64), batch_size=4)
        with recorded_inputs(compressor.backbone) as inputs:
            report = made.add([Document(id="long", text=LONG)])
        assert max(ids.shape[0] for ids in inputs) == 4
        caches = store.caches()
        assert len(caches) == report.n_passages > 4 and len({cache.keep_ratio for cache in caches}) > 2
        assert [cache.n_kept for cache in caches] == [20] * len(caches)
        assert made.add([Document(id="long", text=LONG)]).unchanged == ["long"]


def test_only_missing_passages_are_prefilled(tmp_path: Path, compressor: Any) -> None:
    with Store.open(tmp_path / "store") as store:
        pipeline(store, compressor, batch_size=4).add([Document(id="long", text=LONG)])
        gone = store.passages()[1]
        store.delete(gone.text_sha256)
        with recorded_inputs(compressor.backbone) as inputs:
            report = pipeline(store, compressor, batch_size=4).add([Document(id="long", text=LONG)])
        assert report.n_passages == 1 and [ids.shape[0] for ids in inputs] == [1]


def test_repeated_passage_is_prefilled_once(tmp_path: Path, compressor: Any) -> None:
    paragraph = "The ferry leaves at noon, the lamp burns at night. "
    with Store.open(tmp_path / "store") as store, recorded_inputs(compressor.backbone) as inputs:
        pipeline(store, compressor, batch_size=4).add([Document(id="twice", text=f"{paragraph}\n\n" * 3)])
        texts = [passage.text_sha256 for passage in store.passages()]
        assert len(texts) == 3 and len(set(texts)) == len(store.caches()) == sum(ids.shape[0] for ids in inputs) < 3


def test_passages_are_prefilled_one_by_one_on_cpu(tmp_path: Path, compressor: Any) -> None:
    with Store.open(tmp_path / "store") as store, recorded_inputs(compressor.backbone) as inputs:
        pipeline(store, compressor).add([Document(id="long", text=LONG)])
        assert {ids.shape[0] for ids in inputs} == {1}
