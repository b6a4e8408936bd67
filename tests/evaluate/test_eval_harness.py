from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory.compress import Adapter, Compressor
from kv_memory.errors import BrokenLineError, ConfigError, DatasetError
from kv_memory.evaluate import METHODS, EvalProgress, Evaluation, TaskSettings, evaluate, load_rows, scoring
from kv_memory.evaluate.cases import encode_query
from kv_memory.evaluate.measure import Bench
from kv_memory.evaluate.methods import RandomSelector, make_methods
from kv_memory.evaluate.scoring import PrefilledQuestions
from kv_memory.evaluate.tasks import find_task
from tests.memories import FERRY, wide_backbone

CHEAP = ["full", "none", "random", "sink_recent"]


def run(backbone: Any, data: Path, task: str = "squad", **options: Any) -> Evaluation:
    settings = {"data": data, "n_documents": 2, **options.pop("settings", {})}
    options = {"methods": ["full", "none"], "keep_ratios": [0.25], **options}
    return evaluate(task, backbone=backbone, settings=TaskSettings(**settings), **options)


def means(result: Evaluation, metric: str) -> dict[tuple[str, float | None], float | None]:
    return {(row.method, row.keep_ratio): row.means[metric] for row in result.rows}


def test_full_has_zero_kl_and_compression_raises_it(roomy: Any, data: Path) -> None:
    result = run(
        roomy,
        data,
        methods=["none", "reconstruction", "full", "attention", "random"],
        keep_ratios=[0.25, 1.0],
        generate=False,
    )
    kl = means(result, "kl")
    assert list(kl) == [  # the order is that of METHODS, whatever was asked for
        ("full", None),
        ("none", None),
        *((name, ratio) for name in ("random", "attention", "reconstruction") for ratio in (1.0, 0.25)),
    ]
    assert kl["full", None] == 0
    for name in ("random", "attention", "reconstruction"):
        assert kl[name, 1.0] == pytest.approx(0, abs=1e-5)  # everything kept is the plain cache
        assert (kl[name, 0.25] or 0) > 1e-3
    assert (kl["none", None] or 0) > 1e-3
    rows = {(row.method, row.keep_ratio): row for row in result.rows}
    assert rows["full", None].means["nll"] == pytest.approx(rows["reconstruction", 1.0].means["nll"], abs=1e-4)
    assert rows["none", None].seconds_per_document is None
    assert (rows["reconstruction", 0.25].prefills or 0) > 0
    assert {row.n_documents for row in result.rows} == {2}


def test_int8_weights_are_measured_against_plain_ones(roomy: Any, data: Path, tmp_path: Path) -> None:
    quick = wide_backbone()
    quick = type(quick)(quick.model, quick.tokenizer, prompt=quick.prompt, name=quick.name, weights="int8")
    methods = ["full", "none", "attention"]
    plain, int8 = (run(one, data, methods=methods, generate=False, out=tmp_path) for one in (roomy, quick))
    assert [row.method for row in int8.rows] == ["attention@int8", "full@int8", "none@int8"]
    kl = means(plain, "kl") | means(int8, "kl")
    assert kl["full", None] == 0
    assert 0 < (kl["full@int8", None] or 0) < (kl["none@int8", None] or 0)
    assert kl["attention@int8", 0.25] == pytest.approx(kl["attention", 0.25], rel=0.5)


def test_each_task_reports_its_own_metrics(roomy: Any, data: Path) -> None:
    applies = {
        "squad": {"f1", "em", "contains"},
        "quality": {"accuracy"},
        "squality": {"rouge_l"},
        "needle": {"contains"},
        "spans": set(),
    }
    needle = {"lengths": (300,), "depths": (0.5,), "n_needles": 1}
    for task, names in applies.items():
        settings = {**needle, "corpus": (str(data / "needle"),), "n_documents": 1}
        (row,) = run(roomy, data, task, methods=["full"], settings=settings).rows
        measured = {name for name, value in row.means.items() if value is not None}
        assert measured == {"kl", "nll"} | names, task


def test_the_most_likely_choice_is_the_answer(roomy: Any, data: Path) -> None:
    """Against the likelihoods of the plain model, choice by choice."""
    expected = []
    for case in find_task("quality").cases(roomy, TaskSettings(data=data)):
        encoded = encode_query(roomy, case.queries[0])
        head = [*roomy.prefix_ids, *roomy.encode_document(case.text), *encoded.prompt]
        losses = []
        for choice in encoded.choices:
            ids = torch.tensor([[*head, *choice]])
            logits = roomy.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[len(head) - 1 : -1], ids[0, len(head) :]).item())
        expected.append(float(losses.index(min(losses)) == case.queries[0].correct))
    result = run(roomy, data, "quality", methods=["full"])
    assert [record.questions[0].accuracy for record in result.records] == expected


def test_agreeing_answers_skip_decoding_and_equal_decoded_ones(
    roomy: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = PrefilledQuestions.decode

    def counting(asked: PrefilledQuestions, rows: Any, settings: Any) -> list[str]:
        decoded.append(len(rows))
        return real(asked, rows, settings)

    monkeypatch.setattr(PrefilledQuestions, "decode", counting)
    quick = run(roomy, data, methods=["full", "random"], keep_ratios=[0.9])
    n_all = sum(len(record.questions) for record in quick.records)
    assert sum(decoded) < n_all
    monkeypatch.setattr(scoring, "_agrees", lambda *_: False)
    decoded.clear()
    slow = run(roomy, data, methods=["full", "random"], keep_ratios=[0.9])
    assert sum(decoded) == n_all
    assert [[q.answer for q in r.questions] for r in quick.records] == [
        [q.answer for q in r.questions] for r in slow.records
    ]


def test_without_generation_only_kl_and_nll_are_measured(roomy: Any, data: Path) -> None:
    row = run(roomy, data, methods=["full"], generate=False).rows[0]
    assert row.means["kl"] == 0
    assert row.means["nll"] is not None
    assert row.means["f1"] is row.means["em"] is row.means["contains"] is None


def test_a_second_run_measures_nothing_again(
    roomy: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(roomy, data, methods=CHEAP, out=tmp_path, generate=False)
    lines = (tmp_path / "examples.jsonl").read_bytes()
    assert lines.count(b"\n") == 2 * len(CHEAP)
    monkeypatch.setattr(Bench, "run", lambda *_, **__: pytest.fail("measured again"))
    seen: list[EvalProgress] = []
    again = run(roomy, data, methods=CHEAP, out=tmp_path, generate=False, on_progress=seen.append)
    assert (tmp_path / "examples.jsonl").read_bytes() == lines
    assert again.rows == first.rows
    assert [(p.n_done, p.n_measured, p.n_total) for p in seen] == [(8, 0, 8)]


def test_a_truncated_last_line_is_dropped_and_measured_again(roomy: Any, data: Path, tmp_path: Path) -> None:
    first = run(roomy, data, out=tmp_path, generate=False)
    path = tmp_path / "examples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    seen: list[EvalProgress] = []
    again = run(roomy, data, out=tmp_path, generate=False, on_progress=seen.append)
    assert seen[-1].n_measured == 1
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4
    assert all(json.loads(line)["task"] == "squad" for line in lines)
    assert [row.means for row in again.rows] == [row.means for row in first.rows]


def test_a_broken_line_is_reported_with_its_number(roomy: Any, data: Path, tmp_path: Path) -> None:
    run(roomy, data, out=tmp_path, generate=False)
    path = tmp_path / "examples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"key": 1}\n', *lines[2:]]))
    with pytest.raises(BrokenLineError) as caught:
        run(roomy, data, out=tmp_path, generate=False)
    assert caught.value.where == f"{path}, line 2"


def test_a_changed_setting_is_measured_again(roomy: Any, data: Path, tmp_path: Path) -> None:
    """A changed setting is measured anew; one that changes nothing for a method is not."""

    def n(**options: Any) -> int:
        settings = {"n_documents": 1, **options.pop("settings", {})}
        run(roomy, data, out=tmp_path, settings=settings, **{"generate": False, **options})
        return (tmp_path / "examples.jsonl").read_bytes().count(b"\n")

    assert n(methods=["random"]) == 1
    assert n(methods=["random"], keep_ratios=[0.5]) == 2
    assert n(methods=["random"], settings={"seed": 1}) == 3
    assert n(methods=["random"], layout="packed") == 4
    assert n(methods=["random"], generate=True) == 5
    assert n(methods=["sink_recent"]) == 6
    assert n(methods=["sink_recent"], settings={"seed": 1}) == 6
    assert n(methods=["sink_recent"], settings={"n_documents": 2}) == 7


def test_caches_can_be_stored_and_loaded_before_questions(roomy: Any, data: Path, tmp_path: Path) -> None:
    methods = ["full", "none", "random"]
    plain = run(roomy, data, methods=methods, out=tmp_path)
    seen: list[str] = []
    stored = run(
        roomy, data, methods=methods, storage="int8", out=tmp_path, on_progress=lambda p: seen.append(p.method)
    )
    assert set(seen) == {"random+int8"}  # ceiling and floor are as they were, and known
    before, after = means(plain, "kl"), means(stored, "kl")
    assert list(after) == [("full", None), ("none", None), ("random+int8", 0.25)]
    assert after["full", None] == 0 and after["none", None] == before["none", None]
    assert after["random+int8", 0.25] != before["random", 0.25]
    assert after["random+int8", 0.25] == pytest.approx(before["random", 0.25], rel=0.1)
    # All of them stand in one table, and each is found again.
    names = [(row.method, row.keep_ratio) for row in load_rows([tmp_path]).rows]
    assert names == [("full", None), ("none", None), ("random", 0.25), ("random+int8", 0.25)]
    n_lines = (tmp_path / "examples.jsonl").read_bytes().count(b"\n")
    again = run(roomy, data, methods=methods, storage="int8", out=tmp_path)
    assert (tmp_path / "examples.jsonl").read_bytes().count(b"\n") == n_lines == 8
    assert again.rows == stored.rows


def test_a_time_limit_stops_early_and_the_next_call_resumes(roomy: Any, data: Path, tmp_path: Path) -> None:
    first = run(roomy, data, out=tmp_path, generate=False, time_limit_s=1e-9)
    assert (first.complete, first.rows, first.n_documents) == (False, (), 2)
    second = run(roomy, data, out=tmp_path, generate=False, time_limit_s=600)
    assert second.complete
    assert len(second.records) == 4


def test_random_selection_is_deterministic_and_differs_between_heads(roomy: Any) -> None:
    def positions(seed: int) -> Any:
        return Compressor(roomy, selector=RandomSelector(seed=seed)).compress(FERRY, keep_ratio=0.5).positions

    assert positions(0).equal(positions(0))
    assert not positions(0).equal(positions(1))
    rows = positions(0).flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)


def test_default_methods_depend_on_the_adapter() -> None:
    backbone = wide_backbone()
    assert [method.name for method in make_methods(None, backbone)] == [
        name for name in METHODS if not name.startswith(("adapter", "matched_")) and name != "combined"
    ]
    adapter = Adapter.create(backbone, rank=2, zero_init=False)
    methods = make_methods(None, backbone, adapter=adapter)
    run = tuple(name for name in METHODS if not name.startswith("matched_"))
    assert tuple(method.name for method in methods) == tuple(name for name in run if name != "combined")
    with pytest.raises(ConfigError, match="routes whole documents"):
        make_methods(["combined"], backbone, adapter=adapter)
    adapter.detach()
    adapter = Adapter.create(backbone, rank=2, scorer="layer", routed="document", zero_init=False)
    methods = make_methods(None, backbone, adapter=adapter)
    assert tuple(method.name for method in methods) == run
    assert len({method.digest for method in methods}) == len(run)
    (started,) = make_methods(["refined"], backbone, adapter=adapter, refine_from="reconstruction")
    assert started.digest != methods[-1].digest
    adapter.detach()
    adapter = Adapter.create(backbone, rank=2, restore_tokens=2)
    names = {method.name for method in make_methods(None, backbone, adapter=adapter)}
    assert set(run) - names == {"adapter_selection", "combined", "refined"}  # without a scorer


def test_the_adapter_with_and_without_its_lora(data: Path) -> None:
    backbone = wide_backbone()
    adapter = Adapter.create(backbone, rank=2, zero_init=False)
    result = run(
        backbone, data, methods=["full", "adapter_selection", "adapter"], adapter=adapter, settings={"n_documents": 1}
    )
    kl = means(result, "kl")
    assert kl["full", None] == 0  # the adapter acts on nothing else
    assert kl["adapter", 0.25] != kl["adapter_selection", 0.25]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "sqaud"}, "unknown task 'sqaud'"),
        ({"methods": ["fool"]}, "unknown method 'fool'"),
        ({"methods": []}, "no method is given"),
        ({"methods": ["adapter"]}, "method 'adapter' needs an adapter"),
        ({"methods": ["refined"], "refine_from": "adapter"}, "method 'refined' needs an adapter"),
        ({"methods": ["refined"], "refine_from": "luck"}, "unknown refine_from 'luck'"),
        ({"methods": ["random"], "keep_ratios": [0.0]}, r"keep_ratio must lie in \(0, 1\]"),
        ({"methods": ["random"], "keep_ratios": []}, "no keep_ratio is given"),
        ({"layout": "loose"}, "unknown layout 'loose'"),
        ({"rank_bias": 1}, "rank_bias must be a number, 0 or less"),
        ({"storage": "int4"}, "unknown storage 'int4'"),
        ({"time_limit_s": 0}, "time limit must be above 0"),
    ],
)
def test_invalid_arguments_are_refused(roomy: Any, data: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(roomy, data, **options)


def test_a_missing_data_set_is_an_error(roomy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KV_MEMORY_DATA", raising=False)
    with pytest.raises(DatasetError):
        run(roomy, tmp_path, "quality")
