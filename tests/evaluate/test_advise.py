"""Advice on documents of one's own."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from kv_memory.documents import Document, split_passages
from kv_memory.errors import ConfigError, DatasetError, UnreadableDocumentError
from kv_memory.evaluate import Advice, AdviceRow, Criteria, EvalProgress, advise
from kv_memory.evaluate.advise import _draw, _rows
from kv_memory.evaluate.question_records import Measured, Record
from kv_memory.evaluate.recommend import add_command, recommend
from kv_memory.memory import KVMemory
from kv_memory.settings import MemorySettings
from tests.conftest import make_backbone
from tests.evaluate.conftest import prose, write

SETTINGS = MemorySettings(model="tiny", selector="attention", passage_tokens=128, storage="int8", keep_ratio=0.5)


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for seed in range(3):
        write(folder / f"{seed}.txt", "\n\n".join(prose(seed + i, 2) for i in range(3)))
    return folder


def ask(backbone: Any, source: Any, **options: Any) -> Advice:
    return advise(
        source, **{"backbone": backbone, "settings": SETTINGS, "keep_ratios": [1.0, 0.25], "n_passages": 2, **options}
    )


@pytest.fixture(scope="module")
def advice(roomy: Any, docs: Path) -> Advice:
    return ask(roomy, docs)


def test_every_ratio_is_measured_on_the_same_passages_and_questions(advice: Advice) -> None:
    all_kept, quarter = advice.rows
    assert (all_kept.keep_ratio, quarter.keep_ratio) == (1.0, 0.25)
    assert all_kept.n_passages == quarter.n_passages == 2
    assert 2 <= all_kept.n_questions == quarter.n_questions <= 8
    assert all_kept.method == quarter.method == "attention+int8"
    assert 0 <= all_kept.kl < quarter.kl  # int8 rounds
    assert all_kept.same >= quarter.same
    assert all_kept.full_bytes == quarter.full_bytes
    assert 2 < all_kept.factor < 4 < quarter.factor < 16  # int8 of float32, with scales and positions
    assert quarter.kl_ci is not None and quarter.kl_ci[0] <= quarter.kl <= quarter.kl_ci[1]
    assert quarter.prefills > 0 and quarter.seconds > 0
    assert advice.complete and advice.n_documents == 3


def test_the_same_seed_gives_the_same_advice(roomy: Any, docs: Path, advice: Advice, tmp_path: Path) -> None:
    seen: list[EvalProgress] = []
    shutil.copytree(docs, tmp_path / "copy")
    again = ask(roomy, tmp_path / "copy", on_progress=seen.append)

    def figures(of: Advice) -> list[AdviceRow]:
        return [dataclasses.replace(row, seconds=0.0, prefills=0.0) for row in of.rows]

    assert figures(again) == figures(advice)
    assert again.recommendation.command == advice.recommendation.command.replace(str(docs), str(tmp_path / "copy"))
    assert len(seen) >= 6 and (seen[-1].n_done, seen[-1].n_total) == (5, 6)


def test_sizes_match_add_and_one_passage_is_too_little_data(roomy: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "The ferry to Skarholm leaves at 7.40 from pier 4 every morning.")
    advice = ask(roomy, tmp_path / "a.txt", keep_ratios=[0.25])
    (row,) = advice.rows
    names = ("selector", "passage_tokens", "storage")
    options = {name: getattr(SETTINGS, name) for name in names}
    with KVMemory.open(tmp_path / "store", model=roomy, keep_ratio=0.25, **options) as memory:
        report = memory.add(tmp_path / "a.txt")
    assert (row.n_passages, row.size_bytes) == (report.n_passages, report.cache_bytes) == (1, report.cache_bytes)
    assert row.full_bytes == report.full_kv_bytes
    assert row.kl_ci is None
    found = advice.recommendation
    assert not found.enough and found.keep_ratio == SETTINGS.keep_ratio
    assert found.reason.startswith(f"too little data: questions {row.n_questions}, passages 1")


def test_passages_are_cut_like_add_and_drawn_from_all_documents(roomy: Any) -> None:
    documents = [Document(id=f"{i}", text="\n\n".join(prose(i + k, 2) for k in range(1 + i))) for i in range(4)]
    drawn = list(_draw(roomy, documents, 128, 0))
    assert {document.id for document, _ in drawn[:4]} == {"0", "1", "2", "3"}  # one of each before any comes again
    cut = [split_passages(d.text, max_tokens=128, count_tokens=roomy.count_tokens) for d in documents]
    every = {passage for passages in cut for passage in passages}
    assert len(drawn) == len(every) and {passage for _, passage in drawn} == every  # texts that come twice, once
    assert list(_draw(roomy, documents, 128, 0)) == drawn != list(_draw(roomy, documents, 128, 1))


def record(method: str, keep_ratio: float | None, answers: list[str]) -> Record:
    questions = tuple(Measured(kl=0.1, nll=1.0, answer=answer) for answer in answers)
    return Record(
        key="", config="", task="advise", document="d", method=method, keep_ratio=keep_ratio, questions=questions
    )


def test_two_empty_answers_do_not_count_as_the_same() -> None:
    assert _rows([], 12) == ()
    full = record("full", None, ["Pier 4.", "the oil", "", " .\n"])
    (row,) = _rows([[full, record("attention+int8", 0.25, ["pier 4", "whale", "", ""])]], 12)
    assert (row.same, row.n_questions) == (0.25, 4)


def row_of(keep_ratio: float, kl: float, same: float, *, n_questions: int = 20) -> AdviceRow:
    return AdviceRow(
        keep_ratio=keep_ratio,
        method="matched",
        n_passages=5,
        n_questions=n_questions,
        size_bytes=1000 * keep_ratio,
        full_bytes=2000,
        kl=kl,
        kl_ci=None,
        same=same,
        seconds=1.0,
        prefills=3.0,
    )


ROWS = [row_of(1 / 2, 0.01, 0.95), row_of(1 / 4, 0.05, 0.9), row_of(1 / 8, 0.09, 0.7), row_of(1 / 16, 0.4, 0.5)]


@pytest.mark.parametrize(
    ("criteria", "keep_ratio", "meets", "said"),
    [
        (
            Criteria(),
            1 / 4,
            True,
            "(1/4: KL 0.050, 90% the same); the next smaller one misses a criterion (1/8: KL 0.090, 70%",
        ),
        (
            Criteria(min_same=0.7),
            1 / 8,
            True,
            "the smallest measured keep_ratio with a KL of at most 0.1 and at least 70%",
        ),
        (Criteria(max_kl=1, min_same=0), 1 / 16, True, "(1/16: KL 0.400, 50% the same)"),
        (Criteria(max_kl=0.02), 1 / 2, True, "1/2: KL 0.010"),
        (Criteria(max_kl=0.001), 1 / 2, False, "no measured keep_ratio has a KL of at most 0.001"),
        (Criteria(min_same=0.99), 1 / 2, False, "the closest is 1/2: KL 0.010, 95% the same"),
    ],
)
def test_the_smallest_keep_ratio_that_meets_the_criteria_is_recommended(
    criteria: Criteria, keep_ratio: float, meets: bool, said: str
) -> None:
    found = recommend(ROWS, criteria=criteria, settings=SETTINGS, what=["docs"])
    assert (found.keep_ratio, found.meets, found.enough) == (keep_ratio, meets, True)
    assert said in found.reason
    assert f"kv-memory add docs --keep-ratio {keep_ratio} " in found.command


def test_with_few_questions_nothing_below_the_default_is_recommended() -> None:
    few = [row_of(1 / 2, 0.01, 1.0, n_questions=11), row_of(1 / 8, 0.01, 1.0, n_questions=11)]
    found = recommend(few, criteria=Criteria(), settings=SETTINGS, what=["docs"])
    assert (found.keep_ratio, found.meets, found.enough) == (0.5, True, False)
    found = recommend([], criteria=Criteria(), settings=SETTINGS, what=["docs"])
    assert (found.keep_ratio, found.meets, found.enough) == (0.5, False, False)
    assert "questions 0" in found.reason and "nothing was measured" in found.reason


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": "smollm2"},
        {"model": "smollm2", "adapter": "none"},
        {"model": "smollm2", "selector": "attention", "storage": "auto"},
        {"model": "smollm2", "selector": "combined"},
        {"model": "my models/x", "adapter": "an adapter", "passage_tokens": 300, "prompt": "passage"},
        {"model": "m", "passage_tokens": None, "selector": "sink_recent", "storage": "int8"},
    ],
)
def test_the_recommended_command_reproduces_the_measured_settings(given: dict[str, Any]) -> None:
    settings = MemorySettings.resolve({}, **given)
    words = shlex.split(add_command(settings, 0.125, ["my docs"]))
    assert words[:3] == ["kv-memory", "add", "my docs"]
    options = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[3::2], words[4::2], strict=True)
    }
    assert MemorySettings.resolve({}, **options) == dataclasses.replace(settings, keep_ratio=0.125)


def test_a_time_limit_returns_the_results_so_far(roomy: Any, docs: Path) -> None:
    advice = ask(roomy, docs, time_limit_s=1e-9)
    assert (advice.rows, advice.complete, advice.recommendation.enough) == ((), False, False)


def test_unreadable_documents_are_skipped(roomy: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "The lamp burned whale oil.")
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    advice = ask(roomy, tmp_path, keep_ratios=[0.5])
    assert [Path(error.where or "").name for error in advice.errors] == ["b.txt"]
    assert "--skip-errors" in advice.recommendation.command
    with pytest.raises(UnreadableDocumentError, match="no such file or folder"):
        ask(roomy, tmp_path / "nothing")


def test_passages_that_leave_no_room_for_questions_are_an_error(docs: Path) -> None:
    narrow = make_backbone(max_position_embeddings=260)
    with pytest.raises(DatasetError, match="no passage leaves room"):
        ask(narrow, docs)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"n_passages": 0}, "n_passages"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"keep_ratios": []}, "keep_ratio"),
        ({"keep_ratios": [2]}, "keep_ratio"),
    ],
)
def test_settings_out_of_range_are_refused(roomy: Any, docs: Path, options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(roomy, docs, **options)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "criteria", [{"max_kl": 0}, {"max_kl": float("nan")}, {"min_same": 1.5}, {"min_same": float("nan")}]
)
def test_criteria_out_of_range_are_refused(criteria: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Criteria(**criteria)
