"""Refinement as a setting of the store: remembered, reported, and part of what a cache is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError, FingerprintMismatchError
from kv_memory.settings import MemorySettings
from tests.memories import FERRY, FERRY_QUESTION, LAMP, answerable, open_memory


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory, wide: Any) -> Path:
    path = tmp_path_factory.mktemp("refined") / "store"
    with open_memory(path, wide, refine_steps=2) as memory:
        report = memory.add([("ferry", FERRY), ("lamp", LAMP)])
        assert report.n_refined == report.n_passages == 2
        measured = [info.fidelity for info in memory.store.caches()]
        assert report.fidelity == pytest.approx(sum(f or 0 for f in measured) / 2) and report.fidelity > 0
    return path


def test_rows_and_files_record_steps_and_fidelity(refined: Path, wide: Any) -> None:
    with open_memory(refined, wide) as memory:
        for document_id in ("ferry", "lamp"):
            (info,) = memory.store.caches(document_id)
            (passage,) = memory.document(document_id).passages
            kept = memory.store.get(passage.text_sha256, memory.compressor.fingerprint(), 0.25)
            assert kept.fidelity == info.fidelity is not None
            assert kept.refined_steps == info.refined_steps in {0, 1, 2}
            assert "|refine:2:" in info.method


def test_refinement_is_remembered_and_refined_caches_answer(refined: Path, wide: Any) -> None:
    with open_memory(refined, wide) as memory:
        assert memory.settings.refine_steps == 2 and memory.compressor.refine is not None
        assert answerable(memory, FERRY_QUESTION) == ["ferry"]
        assert memory.add([("ferry", FERRY)]).unchanged == ["ferry"]


def test_refined_caches_do_not_match_without_refinement(refined: Path, wide: Any) -> None:
    with open_memory(refined, wide, refine_steps=0) as memory:
        assert memory.compressor.refine is None
        with pytest.raises(FingerprintMismatchError, match="refine:2"):
            memory.ask(FERRY_QUESTION, top_k=1)


def test_unrefined_caches_have_no_fidelity(memory: KVMemory) -> None:
    assert {(info.refined_steps, info.fidelity) for info in memory.store.caches()} == {(0, None)}
    report = memory.add(("new", "A text that nobody refined."))
    assert (report.n_refined, report.fidelity) == (0, None)


def test_refinement_settings_reach_the_compressor(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, refine_steps=300, min_fidelity=0.5) as memory:
        refine = memory.compressor.refine
        assert refine is not None and (refine.steps, refine.min_fidelity, refine.max_steps) == (300, 0.5, 300)


def test_min_fidelity_alone_uses_the_default_steps() -> None:
    assert MemorySettings.resolve({}, min_fidelity=0.2).refine_steps == 48
    stored = {"refine_steps": 8}
    assert MemorySettings.resolve(stored, min_fidelity=0.2).refine_steps == 8


def test_refine_steps_alone_resets_min_fidelity() -> None:
    stored = {"refine_steps": 8, "min_fidelity": 0.2}
    assert MemorySettings.resolve(stored).min_fidelity == 0.2
    off = MemorySettings.resolve(stored, refine_steps=0)
    assert (off.refine_steps, off.min_fidelity) == (0, None)
    assert MemorySettings.resolve(stored, refine_steps=4).min_fidelity is None


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"refine_steps": -1}, "refine_steps"),
        ({"min_fidelity": 0.0}, "min_fidelity"),
        ({"min_fidelity": float("inf")}, "min_fidelity"),
        ({"refine_steps": 0, "min_fidelity": 0.1}, "min_fidelity"),
    ],
)
def test_contradictory_settings_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MemorySettings.resolve({}, **options)
    assert caught.value.where == where
