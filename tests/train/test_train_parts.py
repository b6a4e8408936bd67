"""Checkpoints, log, estimate, optimiser and the division of a batch, each alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory.errors import ConfigError, TrainingError
from kv_memory.train.adapters import new_adapter, parameters_of, trainable
from kv_memory.train.batches import Batches, split_batch
from kv_memory.train.checkpoints import SHARD_BYTES, Checkpoint, Checkpoints
from kv_memory.train.estimate import Estimate, fit_steps
from kv_memory.train.json_lines import JsonLines
from kv_memory.train.optimizer import StageOptimizer
from kv_memory.train.settings import RunOptions
from kv_memory.train.train_report import plot_log
from tests.conftest import make_backbone
from tests.train.tiny_runs import SETTINGS, examples, make_trainer


def save(checkpoints: Checkpoints, step: int, *, score: float | None = None, n: int = 3) -> Path:
    def write_adapter(folder: Path) -> None:
        (folder / "a.txt").write_text(str(step))

    made = Checkpoint(state={"step": step, "score": score}, tensors={"x": torch.arange(n) + step})
    return checkpoints.save(made, write_adapter=write_adapter)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, score in ((1, 0.9), (2, 0.2), (3, None), (4, 0.5), (5, 0.4)):
        save(checkpoints, step, score=score)
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == 2
    newest = checkpoints.newest()
    assert newest is not None and newest.state["step"] == 5 and newest.tensors["x"].tolist() == [5, 6, 7]
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.startswith(".")] == []


def test_large_state_is_written_in_files_below_16_mib(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1_100_000,), float(i)) for i in range(9)}  # 4.4 MB each
    checkpoints = Checkpoints(tmp_path)
    checkpoint = Checkpoint(state={"step": 1}, tensors=tensors)
    folder = checkpoints.save(checkpoint, write_adapter=lambda folder: None)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3 and max(file.stat().st_size for file in files) < 16 * 2**20
    newest = checkpoints.newest()
    assert newest is not None
    assert {name: float(tensor[0]) for name, tensor in newest.tensors.items()} == {f"t{i}": float(i) for i in range(9)}
    assert SHARD_BYTES < 16 * 2**20


@pytest.mark.parametrize("damage", ["state", "adapter", "note", "missing"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1), save(checkpoints, 2)
    target = {"state": "state.safetensors", "adapter": "adapter/a.txt", "note": "checkpoint.json"}
    path = checkpoints.folder(2) / target.get(damage, "state.safetensors")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"#")
    newest = checkpoints.newest()
    assert newest is not None and newest.state["step"] == 1
    assert "skipped an unusable checkpoint" in caplog.text
    (checkpoints.folder(1) / "checkpoint.json").write_text("{}")
    with pytest.raises(TrainingError, match="all checkpoints are damaged"):
        checkpoints.newest()


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002/state.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2] and not (tmp_path / ".writing-step-00000002").exists()


def test_a_failed_write_leaves_earlier_checkpoints_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kv_memory.train.checkpoints.save_file", full)
    with pytest.raises(TrainingError, match=r"No space left.*--resume"):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 1


# -- log ---------------------------------------------------------------------------------------------------------------


def test_truncating_the_log_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.records() == []
    for step in range(1, 5):
        log.append({"step": step, "loss": 1 / step, "stage": "warmup"})
    log.append({"step": 4, "event": "evaluation", "kl": {0.25: 0.5}})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log.truncate(3)
    assert [record["step"] for record in log.records()] == [1, 2, 3]
    assert log.records()[2]["loss"] == 1 / 3  # to the last bit
    log.truncate(-1)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_loss_that_is_not_finite_is_written_as_json(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": "nan"}


def test_plot_is_drawn_or_skipped_with_a_warning_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = [
        {"step": step, "stage": "warmup" if step < 10 else "distillation", "loss": 1 / step} for step in range(1, 30)
    ]
    records.append({"step": 29, "event": "evaluation", "kl": {"0.25": 0.3}})
    plot_log(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    plot_log([], tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_log(records, tmp_path / "none.png")
    assert "matplotlib is not installed" in caplog.text and not (tmp_path / "none.png").exists()


# -- learning rates, batches in parts ----------------------------------------------------------------------------------


def test_rates_rise_and_fall_within_a_stage() -> None:
    settings = replace(SETTINGS, warmup_steps=3, steps=20, rise=0.2)
    adapter = new_adapter(make_backbone(), settings)
    optimizer = StageOptimizer(adapter, settings, "distillation")
    rates = [optimizer.step(3 + place)["lora"] / settings.lr_lora for place in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.1
    groups = {group["name"]: group for group in optimizer._optimizer.param_groups}
    assert groups["lora"]["weight_decay"] == 0 and groups["scorer"]["weight_decay"] == settings.weight_decay
    adapter.detach()


def test_each_stage_trains_its_own_parameters_only() -> None:
    adapter = new_adapter(make_backbone(), SETTINGS)
    kinds = {"warmup": {"scorer"}, "distillation": {"scorer", "lora"}}
    for stage, expected in kinds.items():
        chosen = trainable(adapter, SETTINGS, stage)  # type: ignore[arg-type]
        assert {name.split(".")[0] for name in chosen} == expected
        open_ = {name for name, p in parameters_of(adapter).items() if p.requires_grad}
        assert open_ == set(chosen)
    frozen = trainable(adapter, replace(SETTINGS, lr_scorer_distil=0.0), "distillation")
    assert {name.split(".")[0] for name in frozen} == {"lora"}
    base = [p for n, p in adapter.backbone.model.named_parameters() if "lora_" not in n]
    assert base and not any(p.requires_grad for p in base)


def test_parts_of_a_batch_contain_every_row_once(backbone: Any) -> None:
    settings = replace(SETTINGS, batch_documents=3, composition_share=0.7)
    batch = Batches(examples(), backbone, settings).batch(2)
    assert any(len(group) > 1 for group in batch.groups)
    whole = sorted((tuple(batch.documents[i] for i in batch.groups[row.document]), row.ids) for row in batch.rows)
    for n_parts in (1, 2, 4, 64):
        parts = split_batch(batch, n_parts, by_rows=True)
        rows = [(tuple(p.documents[i] for i in p.groups[r.document]), r.ids) for p in parts for r in p.rows]
        assert sorted(rows) == whole
        assert len(parts) == min(n_parts, len(parts)) and all(p.keep_ratio == batch.keep_ratio for p in parts)
    assert len(split_batch(batch, 64, by_rows=True)) == len(batch.rows)
    by_groups = split_batch(batch, 64, by_rows=False)
    assert [len(part.groups) for part in by_groups] == [1, 1, 1]
    assert [d for part in by_groups for d in part.documents] == list(batch.documents)


# -- time and memory ---------------------------------------------------------------------------------------------------


def estimate(**changes: Any) -> Estimate:
    figures: dict[str, Any] = {
        "warmup_step_s": 1.0,
        "step_s": 2.0,
        "warmup_steps": 300,
        "steps": 3000,
        "total_s": 0.0,
        "tokens_per_s": 1.0,
        "peak_memory_bytes": 0,
        "n_parameters": 0,
        "adapter_bytes": 0,
        "checkpoint_bytes": 0,
        "pieces": 1,
    }
    return Estimate(**{**figures, **changes})


@pytest.mark.parametrize("time_limit_s", [60.0, 1000.0, 100_000.0])
@pytest.mark.parametrize(("evaluation_s", "eval_every"), [(0.0, 0), (20.0, 50)])
def test_fitted_steps_stay_within_the_time_limit(time_limit_s: float, evaluation_s: float, eval_every: int) -> None:
    if time_limit_s == 60 and evaluation_s:
        return
    fitted = fit_steps(estimate(), time_limit_s=time_limit_s, evaluation_s=evaluation_s, eval_every=eval_every)
    assert fitted.total_s == fitted.warmup_steps * 1.0 + fitted.steps * 2.0
    taken_s = fitted.total_s + (fitted.steps / eval_every * evaluation_s if eval_every else 0)
    assert 0.8 * (time_limit_s - 2 * evaluation_s) < taken_s <= time_limit_s
    assert fitted.warmup_steps <= 0.15 * time_limit_s and fitted.warmup_steps <= 300


def test_a_time_limit_shorter_than_one_step_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no time for a step"):
        fit_steps(estimate(), time_limit_s=2.0)


def test_an_estimate_has_no_side_effects(tmp_path: Path) -> None:
    settings = replace(SETTINGS, warmup_steps=1, steps=2)
    trainer = make_trainer(tmp_path / "run", settings=settings)
    adapter = trainer._adapter
    before = {name: p.detach().clone() for name, p in parameters_of(adapter).items()}
    found = trainer.estimate(n_steps=1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in parameters_of(adapter).items())
    assert list(tmp_path.iterdir()) == []
    assert found.warmup_step_s > 0 and found.step_s > 0 and found.peak_memory_bytes > 1_000_000
    assert found.total_s == pytest.approx(found.warmup_step_s + 2 * found.step_s)
    report = make_trainer(tmp_path / "run", settings=settings).run()
    files = list((tmp_path / "run/adapter").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == pytest.approx(found.adapter_bytes, abs=8000)  # headers
    states = list((tmp_path / "run/checkpoints").rglob("state*.safetensors"))
    assert sum(f.stat().st_size for f in states) == pytest.approx(found.checkpoint_bytes, abs=24_000)
    assert report.step == 3


def test_steps_fitted_to_a_time_limit_survive_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = estimate(warmup_step_s=0.05, step_s=0.1)
    monkeypatch.setattr("kv_memory.train.trainer.measure", lambda *_, **__: measured)
    options = RunOptions(time_limit_s=0.5, fit_steps=True, checkpoint_every=1)
    first = make_trainer(tmp_path / "run", options=options).run()
    told = json.loads((tmp_path / f"run/checkpoints/step-{first.step:08d}/checkpoint.json").read_text())["settings"]
    assert first.n_steps == told["warmup_steps"] + told["steps"] >= 1  # on a busy machine
    assert told["warmup_steps"] <= 1
    monkeypatch.setattr("kv_memory.train.trainer.measure", pytest.fail)
    again = make_trainer(tmp_path / "run", options=options).run(resume=True)
    assert again.n_steps == first.n_steps and again.step >= first.step


def test_time_limit_stops_the_run_with_checkpoint_and_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, settings = tmp_path / "run", replace(SETTINGS, warmup_steps=1, steps=1)
    stopped = make_trainer(out, settings=settings, options=RunOptions(time_limit_s=1e-3)).run()
    assert stopped.step == 1 and "time limit reached after 1 of 2 steps" in caplog.text
    assert (out / "adapter/kv_distill.json").is_file()
    assert make_trainer(out, settings=settings).run(resume=True).step == 2


@pytest.mark.parametrize(
    "options", [{"checkpoint_every": 0}, {"eval_every": -1}, {"time_limit_s": 0.0}, {"fit_steps": True}]
)
def test_invalid_options_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RunOptions(**options)
