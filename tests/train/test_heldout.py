"""Evaluation while training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import ConfigError
from kv_memory.train.adapters import new_adapter
from kv_memory.train.data import hold_out
from kv_memory.train.evaluation import HeldOut
from kv_memory.train.json_lines import JsonLines
from kv_memory.train.settings import RunOptions
from kv_memory.train.trainer import Trainer
from tests.conftest import make_backbone
from tests.train.tiny_runs import SETTINGS, examples, make_trainer, tensors_of


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_kl_is_zero_with_everything_kept_and_grows_with_compression(model: str) -> None:
    adapter = new_adapter(make_backbone(model), SETTINGS)
    held_out = HeldOut(examples(3), adapter.backbone, SETTINGS, ratios=(1.0, 0.5, 0.1))
    found = held_out.measure()
    assert found[1.0] == pytest.approx(0.0, abs=1e-5)
    assert 1e-4 < found[0.5] < found[0.1]
    assert held_out.none() > found[0.5]
    mine = held_out.measure(adapter)
    assert mine[1.0] == pytest.approx(0.0, abs=1e-5) and mine[0.1] > 1e-4


def test_measurements_do_not_depend_on_seed_or_training_ratios() -> None:
    adapter = new_adapter(make_backbone(), SETTINGS)
    changed = replace(SETTINGS, seed=7, min_ratio=0.5, composition_share=0.9, answers="people", batch_documents=3)
    one, two = (HeldOut(examples(3), adapter.backbone, s, ratios=(0.25,)) for s in (SETTINGS, changed))
    assert one.measure(adapter) == two.measure(adapter)
    assert one.measure(adapter) == one.measure(adapter)


def test_examples_without_questions_are_measured_on_their_own_text() -> None:
    adapter = new_adapter(make_backbone(), SETTINGS)
    plain = [replace(example, questions=()) for example in examples(2)]
    found = HeldOut(plain, adapter.backbone, SETTINGS, ratios=(0.25,)).measure(adapter)
    assert found[0.25] > 1e-4


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.5,)])
def test_invalid_ratios_are_rejected(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        HeldOut(examples(1), make_backbone(), SETTINGS, ratios=ratios)


def test_a_run_that_evaluates_ends_with_its_best_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([0.9, 0.2, 0.5, 0.4])

    def measured(self: HeldOut, adapter: Adapter | None = None) -> dict[float, float]:
        return dict.fromkeys(self.ratios, 0.7 if adapter is None else next(figures))

    monkeypatch.setattr(HeldOut, "measure", measured)
    train, kept_out = hold_out(examples(10), 2)
    out = tmp_path / "run"
    options = RunOptions(eval_every=2, eval_ratios=(0.5, 0.25), keep_checkpoints=1, checkpoint_every=1000)
    adapter = new_adapter(make_backbone(), SETTINGS)
    report = Trainer(adapter, train, settings=SETTINGS, out=out, options=options, held_out=kept_out).run()
    assert (report.step, report.best_step, report.n_held_out, report.n_examples) == (8, 4, 2, 8)
    assert report.kl == {0.5: 0.2, 0.25: 0.2}
    assert report.baseline is not None and set(report.baseline) == {0.5, 0.25} and report.none is not None
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    assert tensors_of(out / "adapter") == tensors_of(out / "checkpoints/step-00000004/adapter")
    assert json.loads((out / "adapter/kv_distill.json").read_text())["trained_steps"] == 4
    events = [(r["step"], r["event"]) for r in JsonLines(out / "log.jsonl").records() if "event" in r]
    assert events == [(0, "baseline"), (2, "evaluation"), (4, "evaluation"), (6, "evaluation"), (8, "evaluation")]
    # Resumed, what was measured once is known.
    monkeypatch.setattr(HeldOut, "measure", lambda self, adapter=None: pytest.fail("measured again"))
    again = Trainer(
        new_adapter(make_backbone(), SETTINGS), train, settings=SETTINGS, out=out, options=options, held_out=kept_out
    ).run(resume=True)
    assert again.baseline == report.baseline and again.best_step == 4


def test_without_evaluation_the_last_step_becomes_the_adapter(tmp_path: Path) -> None:
    settings = replace(SETTINGS, warmup_steps=0, steps=2)
    report = make_trainer(tmp_path / "run", settings=settings, held_out=examples(2)).run()
    assert report.best_step == report.step == 2 and report.kl is None and report.n_held_out == 0


def test_held_out_documents_do_not_depend_on_order_or_duplicates() -> None:
    data: list[Any] = examples(10)
    train, kept_out = hold_out(data, 2)
    assert len(kept_out) == 2 and not {e.id for e in kept_out} & {e.id for e in train}
    assert hold_out([*reversed(data), *data], 2)[1] == kept_out
    assert len(hold_out(data, 50)[1]) == 2  # a fifth
    assert hold_out(data[:3], 5) == (data[:3], [])
