"""Training of restore tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import pad
from kv_memory.compress.refine.batching import gather_entries
from kv_memory.compress.restore import drop_restore_tokens, prefill_restore_tokens, restore_of
from kv_memory.errors import ConfigError
from kv_memory.train.adapters import fit_settings, new_adapter, parameters_of, trainable
from kv_memory.train.batches import Batch, Batches
from kv_memory.train.evaluation import HeldOut
from kv_memory.train.json_lines import JsonLines
from kv_memory.train.restored import output_selector, restore_scores, restored_entries
from kv_memory.train.settings import RunOptions, TrainSettings, preset
from kv_memory.train.step import distillation_step
from kv_memory.train.train_report import TrainProgress
from tests.conftest import make_backbone
from tests.train.tiny_runs import SETTINGS, examples, make_trainer, tensors_of

M = 2
RESTORE = replace(SETTINGS, restore_tokens=M, warmup_steps=0, answers="teacher", lr_restore=1e-2, composition_share=0.5)


def curve(out: Path) -> list[tuple[int, float, float]]:
    records = JsonLines(out / "log.jsonl").records()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "grad_norm" in r]


def batch_of(adapter: Adapter, *, joined: bool, settings: TrainSettings = RESTORE) -> Batch:
    batches = Batches(examples(), adapter.backbone, settings)
    return next(batch for batch in map(batches.batch, range(50)) if (len(batch.documents) > 1) == joined)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_gradient_reaches_the_restore_tokens_only(name: str, joined: bool) -> None:
    adapter = new_adapter(make_backbone(name), RESTORE)
    parameters = trainable(adapter, RESTORE, "distillation")
    assert {key.split(".")[0] for key in parameters} == {"lora", "restore"}
    batch = replace(batch_of(adapter, joined=joined), keep_ratio=0.2)
    distillation_step(adapter, batch, settings=RESTORE).loss.backward()  # type: ignore[no-untyped-call]
    for key in ("restore.embeddings", "restore.bias"):
        assert parameters[key].grad is not None and float(parameters[key].grad.abs().max()) > 0
    # Those of the queries and outputs of the last layer cannot matter: no layer sees what they make.
    assert sum(p.grad is not None and float(p.grad.abs().max()) > 0 for p in parameters.values()) > 12
    ours = {id(p) for p in parameters.values()}
    assert all(p.grad is None for p in adapter.backbone.model.parameters() if id(p) not in ours)


def test_steps_of_training_bring_the_student_closer() -> None:
    settings = replace(RESTORE, composition_share=0.0)
    adapter = new_adapter(make_backbone(), settings)
    batch = replace(batch_of(adapter, joined=False, settings=settings), keep_ratio=0.1)
    adam = torch.optim.Adam(trainable(adapter, settings, "distillation").values(), lr=1e-2)
    losses = []
    for _ in range(25):
        adam.zero_grad()
        loss = distillation_step(adapter, batch, settings=settings).loss
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("lengths", [(40,), (40, 25, 33)])
def test_entries_are_those_of_documents_with_the_tokens_behind_them(lengths: tuple[int, ...]) -> None:
    """With a budget for all, logits behind the student are those behind document and restore tokens, one by one."""
    adapter = new_adapter(make_backbone(), RESTORE)
    backbone, draw = adapter.backbone, torch.Generator().manual_seed(0)
    restore_of(adapter).bias.data.normal_(generator=draw)
    rows = [torch.randint(3, 250, (n,), generator=draw).tolist() for n in lengths]
    ids, sizes = pad(rows, device="cpu")
    room = output_selector(backbone).extra_tokens + M
    with torch.no_grad():
        cache = backbone.prefixed_cache(ids.shape[1], room=room, batch_size=len(rows))
        backbone.prefill(ids, cache, lengths=sizes if len(rows) > 1 else None)
        scores = restore_scores(adapter, ids, sizes, cache)
        assert scores.shape[-1] == ids.shape[1] + M and torch.isinf(scores).sum() == scores[:, 0, :, 0].numel() * sum(
            max(lengths) - n for n in lengths
        )
        entries = restored_entries(adapter, cache, scores, sizes + M)
        question = torch.randint(3, 250, (1, 7), generator=draw)
        for index, row in enumerate(rows):
            alone = backbone.prefixed_cache(len(row), room=20)
            backbone.prefill(torch.tensor([row]), alone)
            prefill_restore_tokens(adapter, alone)
            bias = torch.nn.functional.pad(restore_of(adapter).bias, (len(row), 0))[:, None]
            wanted = backbone.logits(question, gather_entries(backbone, alone, bias=bias).cache(torch.tensor([0])))
            got = backbone.logits(question, entries.cache(torch.tensor([index])))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_draw_shows_restore_tokens_within_half_of_the_budget() -> None:
    adapter = new_adapter(make_backbone(), RESTORE)
    backbone = adapter.backbone
    ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = backbone.prefixed_cache(40, room=output_selector(backbone).extra_tokens + M)
    n_kept, shown = torch.tensor([6]), set()
    with torch.no_grad():
        backbone.prefill(ids, cache)
        scores = restore_scores(adapter, ids, torch.tensor([40]), cache)
        scores[..., -M:] = -1.0  # none would be kept
        for seed in (*range(20), None):
            entries = restored_entries(adapter, cache, scores, n_kept, seed=seed)
            drop_restore_tokens(adapter, cache)
            seen = torch.stack([where[0, :, -M:] < 2**30 for where in entries.positions])
            assert 0 <= int(seen.sum()) <= seen.numel() and bool((seen.all(-1) == seen.any(-1)).all())
            shown.add(int(seen.sum()))
    assert len(shown) > 3 and 0 in shown


def test_a_resumed_run_gives_the_same_curve(tmp_path: Path) -> None:
    def stop(progress: TrainProgress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    often = RunOptions(checkpoint_every=3)
    make_trainer(tmp_path / "unbroken", settings=RESTORE, options=often).run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "broken", settings=RESTORE, options=often, on_progress=stop).run()
    report = make_trainer(tmp_path / "broken", settings=RESTORE, options=often).run(resume=True)
    assert curve(tmp_path / "broken") == curve(tmp_path / "unbroken") and len(curve(tmp_path / "broken")) == 5
    assert tensors_of(report.adapter) == tensors_of(tmp_path / "unbroken" / "adapter")
    loaded = Adapter.load(report.adapter, make_backbone())
    assert loaded.config.restore_tokens == M and loaded.config.trained_steps == 5
    assert {name.split(".")[0] for name in parameters_of(loaded)} == {"lora", "restore"}


def test_evaluation_compares_with_output_errors() -> None:
    adapter = new_adapter(make_backbone(), RESTORE)
    held_out = HeldOut(examples(3), adapter.backbone, RESTORE, ratios=(0.5, 0.1))
    without, mine = held_out.measure(), held_out.measure(adapter)
    assert all(value > 1e-4 for value in (*without.values(), *mine.values())) and without != mine
    assert held_out.measure(adapter) == mine
    restore_of(adapter).bias.data.fill_(-60.0)  # no restore token is ever chosen
    assert held_out.measure(adapter) == pytest.approx(without, rel=1e-3)


def test_settings_that_contradict_restore_tokens_are_refused() -> None:
    assert preset("restore", restore_tokens=8).restore_tokens == 8
    with pytest.raises(ConfigError, match="no scorer to warm up"):
        TrainSettings(restore_tokens=4)
    adapter = new_adapter(make_backbone(), RESTORE)
    assert fit_settings(preset("restore"), adapter, given={}).restore_tokens == M
    with pytest.raises(ConfigError, match="restore_tokens is 2"):
        fit_settings(preset("restore"), adapter, given={"restore_tokens": 4})
