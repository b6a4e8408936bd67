from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import BrokenLineError, ConfigError, DatasetError
from kv_memory.evaluate import Record, Row, aggregate, load_rows, markdown, write_report
from kv_memory.evaluate.question_records import Measured, append_record, load_records
from kv_memory.evaluate.report import kept_text

KEYS = [
    *("task", "method", "keep_ratio", "n", "kl", "nll", "f1", "em", "contains", "accuracy", "rouge_l"),
    *("kl_joined", "retention", "ci", "seconds_per_document", "prefills"),
]


def record(method: str, document: str, *f1: float, ratio: float | None = None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": f"{method}{document}{ratio}",
        "config": f"{method}{ratio}",
        "task": "squad",
        "compress_s": 2.0,
        "prefill_s": 1.0,
        "questions": tuple(Measured(kl=1 - x, nll=2.0, f1=x, em=0.0, contains=0.0) for x in f1),
        **changes,
    }
    return Record(method=method, document=document, keep_ratio=ratio, **values)


def table(n: int = 4) -> list[Record]:
    ids = [str(i) for i in range(n)]
    return [
        *(record("full", i, 0.8, 0.8) for i in ids),
        *(record("none", i, 0.2, 0.2) for i in ids),
        *(record("random", i, 0.5, 0.4, ratio=0.25) for i in ids),
        *(record("random", i, 0.6, 0.8, ratio=0.5) for i in ids),
    ]


def by_name(rows: Any) -> dict[tuple[str, float | None], Row]:
    return {(row.method, row.keep_ratio): row for row in rows}


def test_means_and_retention() -> None:
    rows = aggregate(table())
    assert [(row.method, row.keep_ratio) for row in rows] == [
        ("full", None),
        ("none", None),
        ("random", 0.5),
        ("random", 0.25),
    ]
    assert [row.retention for row in rows] == pytest.approx([1.0, 0.0, 0.5 / 0.6, 0.25 / 0.6])
    assert (rows[3].n, rows[3].n_documents, rows[3].prefills, rows[3].seconds_per_document) == (8, 4, 2.0, 2.0)
    assert rows[3].means["kl"] == pytest.approx(0.55)
    assert rows[3].means["accuracy"] is None


def test_the_share_of_empty_answers_is_a_column_if_there_are_any() -> None:
    said = [Measured(kl=0.1, nll=2.0, f1=0.5, answer=answer) for answer in ("Ida", " ", "", "7.40")]
    rows = aggregate([record("full", "0", questions=tuple(said)), record("none", "0", questions=tuple(said[::3]))])
    assert [row.empty for row in rows] == [0.5, 0.0]
    header, *lines = [line for line in markdown(rows).splitlines() if line.startswith("|")]
    assert "| empty |" in header and "| 0.50 |" in lines[1] and "| 0.00 |" in lines[2]
    assert "| empty |" not in markdown(rows[1:]) and aggregate(table())[0].empty is None


def test_json_rows_have_exactly_the_documented_keys() -> None:
    for row in aggregate(table()):
        data = row.to_dict()
        assert list(data) == KEYS
        assert set(data["ci"]) == {"kl", "score", "retention"}
        json.dumps(data, allow_nan=False)


def test_the_bootstrap_interval_matches_known_data() -> None:
    """Half of 400 documents score 1, half 0: the mean of a resample has a deviation of 0.5 / 20."""
    records = [record("full", f"{i}", float(i % 2)) for i in range(400)]
    (row,) = aggregate(records)
    low, high = row.ci["score"] or (0, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    assert aggregate(records) == [row]
    assert aggregate(records, seed=1)[0].ci != row.ci


def test_the_bootstrap_resamples_whole_documents() -> None:
    """A hundred questions about two documents are two observations: one of the two is drawn twice now and then."""
    records = [record("full", "a", *[1.0] * 50), record("full", "b", *[0.0] * 50)]
    assert aggregate(records)[0].ci["score"] == (0.0, 1.0)


def test_equal_documents_have_a_zero_interval_and_one_document_none() -> None:
    random = by_name(aggregate(table()))["random", 0.25]
    assert random.ci["retention"] == pytest.approx((0.25 / 0.6, 0.25 / 0.6))
    assert set(aggregate(table(1))[0].ci.values()) == {None}


def test_retention_needs_a_floor_below_the_ceiling() -> None:
    flat = [record(name, "a", 0.5) for name in ("full", "none")]
    assert [row.retention for row in aggregate(flat)] == [None, None]
    assert [row.retention for row in aggregate([*flat, record("random", "a", 0.5, ratio=0.5)][1:])] == [None, None]


def test_only_documents_measured_by_all_methods_are_compared() -> None:
    records = [*table(), record("random", "extra", 0.0, 0.0, ratio=0.25), record("full", "more", 0.0, 0.0)]
    assert aggregate(records) == aggregate(table())
    loose = by_name(aggregate(records, paired=False))
    assert (loose["random", 0.25].n, loose["random", 0.5].n, loose["full", None].n) == (10, 8, 10)
    assert loose["random", 0.25].retention == pytest.approx(0.25 / 0.6)  # where there are both ends


def written(folder: Path, records: list[Record]) -> Path:
    for one in records:
        append_record(folder, one)
    return folder


def test_records_round_trip_through_their_file(tmp_path: Path) -> None:
    records = [record("full", "a", 0.5, cell=(512, 0.25), model="m", weights="w"), record("none", "ä\n", 0.25)]
    assert load_records(written(tmp_path, records)) == records


def test_a_table_of_several_folders_and_peers(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", table())
    peers = tmp_path / "peers"
    peers.mkdir()
    rows = [
        {
            "task": "squad",
            "document": str(document),
            "method": method,
            "keep_ratio": ratio,
            "question": question,
            "kl": 0.5,
            "nll": 1.0,
            "f1": 0.5,
            "em": 0.0,
            "contains": None,
            "seconds_per_document": 3.0,
            "prefills": 1.5,
        }
        for document in range(3)
        for method, ratio in (("full", None), ("kvpress:snapkv", 0.25))
        for question in range(2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (peers / "questions.jsonl").write_text(lines + lines.splitlines()[0] + "\n" + lines[:50])
    found = by_name(load_rows([ours, peers]).rows)
    assert {row.n for row in found.values()} == {6}  # the three documents that both have
    assert list(found)[:2] == [("full", None), ("kvpress:full", None)]
    snap = found["kvpress:snapkv", 0.25]
    assert (snap.means["kl"], snap.seconds_per_document, snap.prefills) == (0.5, 3.0, 1.5)
    assert snap.means["contains"] is None
    assert snap.retention == pytest.approx(0.5)


def test_finished_rows_are_loaded_unchanged(tmp_path: Path) -> None:
    rows = aggregate(table())
    (tmp_path / "summary.jsonl").write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    loaded = load_rows([tmp_path / "summary.jsonl"]).rows
    assert [row.to_dict() for row in loaded] == [row.to_dict() for row in rows]


def test_adapters_with_the_same_name_need_labels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, [record("full", "1", 1.0), record("adapter", "1", 0.5, ratio=0.25, config=name)])
    with pytest.raises(ConfigError, match="two different results have the name 'adapter'"):
        load_rows([tmp_path / "a", tmp_path / "b"])
    loaded = load_rows([f"old={tmp_path / 'a'}", f"new={tmp_path / 'b'}"])
    assert [row.method for row in loaded.rows] == ["full", "new:adapter", "old:adapter"]


def test_storage_is_part_of_the_method_name(tmp_path: Path) -> None:
    methods = ["adapter_selection", "adapter+int8", "sink_recent", "adapter", "full", "kvpress:knorm"]
    written(tmp_path, [record(name, "1", 0.5, ratio=None if name == "full" else 0.25) for name in methods])
    assert [row.method for row in load_rows([tmp_path]).rows] == [
        *("full", "sink_recent", "adapter_selection", "adapter", "adapter+int8", "kvpress:knorm")
    ]
    labelled = [row.method for row in load_rows([f"new={tmp_path}"]).rows]
    assert labelled[3:5] == ["new:adapter", "new:adapter+int8"] and labelled[1] == "sink_recent"
    assert len(load_rows([tmp_path], methods=["adapter+int8"]).rows) == 1


def test_the_last_configuration_in_a_folder_wins(tmp_path: Path) -> None:
    old, new = record("full", "1", 0.0, config="old"), record("full", "2", 1.0, config="new")
    assert load_rows([written(tmp_path, [old, new])]).records == (new,)


def test_results_that_are_not_comparable_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", [record("full", "1", 1.0, model="x", weights="1")])
    written(tmp_path / "b", [record("none", "1", 1.0, model="y", weights="2")])
    with pytest.raises(ConfigError, match="results of several models: x, y"):
        load_rows([tmp_path / "a", tmp_path / "b"])
    written(tmp_path / "c", [record("none", "2", 1.0)])
    with pytest.raises(ConfigError, match="no document of squad was measured by all methods"):
        load_rows([tmp_path / "a", tmp_path / "c"])
    assert len(load_rows([tmp_path / "a", tmp_path / "c"], paired=False).rows) == 2


def test_a_path_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no evaluation results found"):
        load_rows([tmp_path])
    (tmp_path / "x.jsonl").write_text('{"task": "squad"}\n')
    with pytest.raises(BrokenLineError, match="line 1"):
        load_rows([tmp_path / "x.jsonl"])


def test_markdown_has_the_columns_that_apply() -> None:
    text = markdown(aggregate(table()))
    head, rule, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert head == "| method | kept | KL | NLL | F1 | EM | contains | retention | s/document | prefills |"
    assert rule.count("---") == 10
    assert "8 questions about 4 documents, the same for every row" in text
    assert lines[2].startswith("| random | 1/2 | 0.300 [0.300, 0.300] | 2.000 | 0.700 |")


@pytest.mark.parametrize(("ratio", "text"), [(None, ""), (1.0, "1"), (1 / 32, "1/32"), (0.3, "0.3"), (1 / 3, "1/3")])
def test_keep_ratios_are_shown_as_fractions(ratio: float | None, text: str) -> None:
    assert kept_text(ratio) == text


def test_a_report_has_tables_and_plots(tmp_path: Path) -> None:
    needles = [
        record(method, f"{length}{depth}", 1.0, ratio=ratio, task="needle", cell=(length, depth))
        for method, ratio in (("full", None), ("random", 0.5))
        for length in (256, 512)
        for depth in (0.0, 1.0)
    ]
    loaded = load_rows([written(tmp_path / "in", [*table(), *needles])])
    files = write_report(loaded, tmp_path / "out")
    names = ["tables.md", "needle_fidelity.png", "squad_fidelity.png", "needle_map.png"]
    assert [file.name for file in files] == names
    assert (tmp_path / "out" / "tables.md").read_text() == markdown(loaded.rows)
    for file in files[1:]:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000


def test_plots_without_matplotlib_name_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'kv-memory\[eval\]'"):
        write_report(load_rows([written(tmp_path / "in", table())]), tmp_path / "out")


def test_figures_are_finite() -> None:
    for row in aggregate(table()):
        assert all(math.isfinite(x) for pair in row.ci.values() if pair for x in pair)
