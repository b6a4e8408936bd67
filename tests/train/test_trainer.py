"""The training loop: two stages, exact resume, log, best checkpoint, divergence, memory that runs out."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kv_memory.compress.adapter import Adapter
from kv_memory.errors import ConfigError, DatasetError, TrainingError
from kv_memory.train import gradients
from kv_memory.train.adapters import fit_settings, new_adapter, trainable
from kv_memory.train.batches import Batches
from kv_memory.train.json_lines import JsonLines
from kv_memory.train.settings import RunOptions
from kv_memory.train.step import StepResult, distillation_step
from kv_memory.train.train_report import TrainProgress
from kv_memory.train.trainer import Trainer, trim_heap
from tests.conftest import make_backbone
from tests.train.tiny_runs import SETTINGS, examples, make_trainer, tensors_of

ROOT = Path(__file__).parents[2]
OFTEN = RunOptions(checkpoint_every=2)


def curve(out: Path) -> list[dict[str, Any]]:
    """What the log says of each step, without the clock."""
    records = [record for record in JsonLines(out / "log.jsonl").records() if "loss" in record]
    return [{name: value for name, value in record.items() if name != "elapsed_s"} for record in records]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 3 + 5 steps."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    make_trainer(out, options=OFTEN).run()
    return out


def test_a_run_warms_up_then_distils_and_writes_an_adapter(unbroken: Path) -> None:
    steps = curve(unbroken)
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert [s["stage"] for s in steps] == ["warmup"] * 3 + ["distillation"] * 5
    assert [sorted(s["lr"]) for s in steps] == [["scorer"]] * 3 + [["lora", "scorer"]] * 5
    rates = [s["lr"]["lora"] for s in steps[3:]]
    assert rates == sorted(rates, reverse=True) and rates[0] == SETTINGS.lr_lora and rates[-1] > 0
    assert len({s["keep_ratio"] for s in steps[3:]}) == 5
    assert all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in steps)
    adapter = Adapter.load(unbroken / "adapter", make_backbone())
    assert adapter.config.trained_steps == 8
    lora = [p for name, p in adapter.peft_model.named_parameters() if "lora_B" in name]
    assert sum(float(p.abs().max()) > 0 for p in lora) >= 10  # B starts at zero
    assert (unbroken / "loss.png").stat().st_size > 1000


def test_warm_up_changes_only_the_scorer(tmp_path: Path) -> None:
    report = make_trainer(tmp_path / "run", settings=replace(SETTINGS, warmup_steps=2, steps=0)).run()
    loaded = Adapter.load(report.adapter, make_backbone())
    assert not any(bool(p.any()) for n, p in loaded.peft_model.named_parameters() if "lora_B" in n)


def test_a_killed_and_resumed_run_is_bit_identical(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.train.tiny_runs import make_trainer\n"
        "from kv_memory.train.settings import RunOptions\n"
        "told = lambda p: (print(p.step, flush=True), p.step == 5 and sys.stdin.read())\n"  # at 5 it waits to be killed
        "make_trainer(Path(sys.argv[1]), options=RunOptions(checkpoint_every=2), on_progress=told).run()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(5)] == ["1", "2", "3", "4", "5"]
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert len(curve(out)) == 5 and not (out / "adapter").exists()
    seen: list[TrainProgress] = []
    report = make_trainer(out, options=OFTEN, on_progress=seen.append).run(resume=True)
    assert [p.step for p in seen] == [5, 6, 7, 8]  # from the checkpoint after step 4
    assert curve(out) == curve(unbroken)
    assert tensors_of(out / "adapter") == tensors_of(unbroken / "adapter")
    assert report.step == 8 and report.n_tokens == curve(unbroken)[-1]["n_tokens"]


def test_a_run_resumed_between_stages_is_the_same(unbroken: Path, tmp_path: Path) -> None:
    def stop_after_warm_up(progress: TrainProgress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(out, options=RunOptions(checkpoint_every=3), on_progress=stop_after_warm_up).run()
    make_trainer(out, options=RunOptions(checkpoint_every=3)).run(resume=True)
    assert curve(out) == curve(unbroken)
    assert tensors_of(out / "adapter") == tensors_of(unbroken / "adapter")


def test_another_seed_gives_another_run(unbroken: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", settings=replace(SETTINGS, seed=1, warmup_steps=1, steps=0)).run()
    assert curve(tmp_path / "run")[0]["loss"] != curve(unbroken)[0]["loss"]


def test_resuming_a_finished_run_trains_no_further(unbroken: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    before = tensors_of(unbroken / "adapter")
    report = make_trainer(unbroken, options=OFTEN, on_progress=seen.append).run(resume=True)
    assert seen == [] and report.step == 8 and tensors_of(unbroken / "adapter") == before


def test_resuming_without_checkpoint_starts_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = make_trainer(tmp_path / "run", settings=replace(SETTINGS, steps=1, warmup_steps=0)).run(resume=True)
    assert report.step == 1 and "starting a new run" in caplog.text


def test_a_folder_with_a_run_is_not_overwritten(unbroken: Path) -> None:
    before = curve(unbroken)
    with pytest.raises(TrainingError, match=r"the folder already contains a run.*--resume"):
        make_trainer(unbroken).run()
    assert curve(unbroken) == before


def test_resuming_with_other_settings_names_each_difference(unbroken: Path) -> None:
    changed = replace(SETTINGS, lr_lora=1e-5, max_ratio=0.5)
    with pytest.raises(TrainingError, match=r"lr_lora was 0\.005 and is 1e-05; max_ratio was 0\.6 and is 0\.5"):
        make_trainer(unbroken, settings=changed).run(resume=True)


def test_resuming_with_other_data_or_model_is_rejected(unbroken: Path) -> None:
    adapter = new_adapter(make_backbone(), SETTINGS)
    with pytest.raises(TrainingError, match="the examples changed"):
        Trainer(adapter, examples(5), settings=SETTINGS, out=unbroken).run(resume=True)
    with pytest.raises(TrainingError, match="the model's weights changed"):
        make_trainer(unbroken, model="qwen2").run(resume=True)


def test_further_training_keeps_the_structure_of_the_adapter(unbroken: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(unbroken / "adapter", make_backbone())
    asked = replace(SETTINGS, rank=16, warmup_steps=0, steps=2)
    with pytest.raises(ConfigError, match="rank is 4"):
        fit_settings(asked, adapter, given={"rank": 16})
    settings = fit_settings(replace(asked, warmup_steps=9), adapter, given={"steps": 2})
    assert settings.warmup_steps == 0  # unless they are given
    assert (settings.rank, settings.alpha, settings.targets, settings.steps) == (4, 8.0, ("q", "k", "v", "o"), 2)
    report = Trainer(adapter, examples(), settings=settings, out=tmp_path / "run").run()
    assert json.loads((report.adapter / "kv_distill.json").read_text())["trained_steps"] == 10


def test_no_examples_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        Trainer(new_adapter(make_backbone(), SETTINGS), [], settings=SETTINGS, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# -- accumulation, memory, divergence ----------------------------------------------------------------------------------


def run_once(out: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    settings = replace(SETTINGS, warmup_steps=1, steps=1, **changes)
    make_trainer(out, settings=settings).run()
    return curve(out), [r for r in JsonLines(out / "log.jsonl").records() if "event" in r]


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return all(math.isclose(x[k], y[k], rel_tol=1e-4) for x, y in zip(a, b, strict=True) for k in ("loss", "grad_norm"))


def test_out_of_memory_halves_the_batch_without_changing_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"batch_documents": 4, "composition_share": 0.0}
    plain, _ = run_once(tmp_path / "plain", **changes)
    sizes: list[int] = []

    def small_gpu(adapter: Adapter, batch: Any, *, settings: Any) -> StepResult:
        sizes.append(len(batch.documents))
        if len(batch.documents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return distillation_step(adapter, batch, settings=settings)

    monkeypatch.setitem(gradients.STEPS, "distillation", small_gpu)  # type: ignore[arg-type]
    halved, events = run_once(tmp_path / "halved", **changes)
    assert sizes == [4, 2, 2]  # refused once; then in two parts
    assert [e["event"] for e in events] == ["out_of_memory"] and events[0]["pieces"] == 2
    assert "out of GPU memory at step 2" in caplog.text and "2 parts" in caplog.text
    assert close(plain, halved)


def test_a_single_document_is_split_by_rows_before_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(adapter: Adapter, batch: Any, *, settings: Any) -> StepResult:
        if len(batch.rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return distillation_step(adapter, batch, settings=settings)

    changes: dict[str, Any] = {"batch_documents": 1, "composition_share": 0.0}
    plain, _ = run_once(tmp_path / "plain", **changes)
    monkeypatch.setitem(gradients.STEPS, "distillation", one_row)  # type: ignore[arg-type]
    limit = 1
    halved, events = run_once(tmp_path / "rows", **changes)
    assert [event["pieces"] for event in events] == [4] and close(plain, halved)
    limit = 0
    with pytest.raises(TrainingError, match=r"cannot be split further.*gradient_checkpointing"):
        run_once(tmp_path / "none", **changes)


def test_accumulation_is_the_mean_of_its_batches() -> None:
    def gradient(accumulate: int, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        settings = replace(SETTINGS, accumulate=accumulate)
        adapter = new_adapter(make_backbone(), settings)
        batches = Batches(examples(), adapter.backbone, settings)
        engine = gradients.Gradients(adapter, batches, settings, Accelerator(cpu=True))
        parameters = trainable(adapter, settings, "distillation")
        figures = engine.compute(step, "distillation", list(parameters.values()))
        return figures["loss"], {name: p.grad for name, p in parameters.items() if p.grad is not None}

    loss, both = gradient(2, 3)
    (first_loss, first), (second_loss, second) = gradient(1, 6), gradient(1, 7)
    assert first_loss != second_loss and loss == pytest.approx((first_loss + second_loss) / 2)
    for name, grad in both.items():
        torch.testing.assert_close(grad, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_done = 0

    def exploding(adapter: Adapter, batch: Any, *, settings: Any) -> StepResult:
        nonlocal n_done
        n_done += 1
        result = distillation_step(adapter, batch, settings=settings)
        return replace(result, loss=result.loss * (math.nan if n_done == 4 else 1.0))

    monkeypatch.setitem(gradients.STEPS, "distillation", exploding)  # type: ignore[arg-type]
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"step 7: the loss is nan.*lower lr_lora") as caught:
        make_trainer(out, options=OFTEN).run()
    assert str(out / "checkpoints/step-00000006/adapter") in str(caught.value)
    Adapter.load(out / "checkpoints/step-00000006/adapter", make_backbone())
    assert not (out / "adapter").exists()
    assert JsonLines(out / "log.jsonl").records()[-1]["loss"] == "nan"


@pytest.mark.slow
def test_two_processes_match_one_with_gradient_accumulation(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.train.tiny_runs import make_trainer\n"
        "from tests.train.tiny_runs import SETTINGS, replace\n"
        "from kv_memory.train import trainer\n"
        "trainer.plot_log = lambda records, path: None\n"
        "make_trainer(Path(sys.argv[1]), settings=replace(SETTINGS, warmup_steps=1, steps=2)).run()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "two")],
            cwd=ROOT,
            env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    make_trainer(tmp_path / "one", settings=replace(SETTINGS, warmup_steps=1, steps=2, accumulate=2)).run()
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [s["n_tokens"] for s in two] == [s["n_tokens"] for s in one] and close(two, one)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_free_heap_memory_is_returned_to_the_system() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    tensors = [torch.ones(16_000) for _ in range(2000)]  # 64 kB each: below what glibc maps apart
    del tensors[::2]  # holes, which shrink no heap
    before = resident_bytes()
    trim_heap()
    assert before - resident_bytes() > 30e6
    assert len(tensors) == 1000
