"""The reports of a run: its progress, its result, the plot of its log, and the model card of its adapter."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import built_in
from kv_memory.train.adapters import Stage
from kv_memory.train.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Progress of a run after a step; `n_steps` is the total number of steps, over both stages.

    `loss` is that of this step. `n_tokens` and `elapsed_s`, in seconds, include earlier parts of the run.
    """

    step: int
    n_steps: int
    stage: Stage
    loss: float
    n_tokens: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Result of a run.

    Attributes:
        adapter: Folder of the finished adapter.
        best_step: Step of the finished adapter: the one with the best evaluation, or the last.
        loss: Mean loss over the last 50 steps; None without steps.
        kl: KL to the full cache of that adapter by keep ratio, in nats per token, on held-out examples; None if nothing
            was evaluated.
        baseline: KL of the reconstruction selector, which needs no training; None if not measured.
        none: KL without any document; None if not measured.
        n_tokens: Number of tokens processed.
        elapsed_s: Seconds of all parts of the run.
        settings: Settings of the run, with the final numbers of steps.
    """

    adapter: Path
    step: int
    n_steps: int
    best_step: int
    loss: float | None
    kl: Mapping[float, float] | None
    baseline: Mapping[float, float] | None
    none: float | None
    n_held_out: int
    n_examples: int
    n_tokens: int
    elapsed_s: float
    settings: TrainSettings


def plot_log(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses and evaluations of a log into a `.png` file; nothing without steps, or without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # rejected: pyplot, which has windows and global state
    except ImportError:
        logger.warning("no plot: matplotlib is not installed (pip install 'kv-memory[train]')")
        return
    steps = [record for record in records if "stage" in record]
    if not steps:
        return
    evaluations = [record for record in records if record.get("event") == "evaluation"]
    stages = [(stage, list(group)) for stage, group in groupby(steps, key=lambda record: record["stage"])]
    # The stages have different losses, so each gets its own scale.
    n_panels = len(stages) + bool(evaluations)
    figure = Figure(figsize=(9, 3.2 * n_panels), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_panels, 1, squeeze=False)[:, 0]
    for panel, (stage, group) in zip(panels, stages, strict=False):
        x = [record["step"] for record in group]
        losses = [record["loss"] for record in group]
        window = max(5, len(x) // 50)
        recent = [losses[max(0, end - window) : end] for end in range(1, len(x) + 1)]
        panel.plot(x, losses, color="0.8", linewidth=0.8)
        panel.plot(x, list(map(fmean, recent)), color="C0")
        panel.set(title=f"{stage}: loss, and its mean over the last steps", xlabel="step")
    if evaluations:
        for ratio in evaluations[-1]["kl"]:
            known = [(record["step"], record["kl"][ratio]) for record in evaluations if ratio in record["kl"]]
            panels[-1].plot(*zip(*known, strict=True), marker="o", markersize=3, label=f"keep {ratio}")
        panels[-1].set(title="held-out examples: KL to the full cache, nats per token", xlabel="step")
        panels[-1].legend()
    figure.savefig(path, dpi=120)


_CARD = """---
base_model: {name}
library_name: peft
tags: [kv-memory, kv-distill, kv-cache]
---

# kv-memory adapter for {name}

{parts} with which kv-memory compresses the key-value cache of a document, after {paper}. \
The model that answers is the unmodified base model. To use it: \
`kv-memory add notes/ --adapter FOLDER`, or `Adapter.load(folder, backbone)` in Python.

## Training

- Model: {name}, weights `{weights}`, {dtype}
{begun_from}- Data: {n_examples:,} examples: {data}
- Steps: {best_step:,} of {n_steps:,} ({s.warmup_steps:,} of warm-up), {n_tokens:,} tokens processed
- Time: {time} on {machine}, torch {torch}
- Command: `{command}`

Settings that differ from the defaults:

{changed}

## Results

{results}

## Limits

- It works only with these weights of {name}; other weights are rejected.
- Trained on documents of up to {s.max_tokens:,} tokens and keep ratios of {s.min_ratio:g} to {s.max_ratio:g}; not \
tested outside these ranges.
- Compression loses information; names and numbers that no question asked about may be lost first. Compare with the \
uncompressed model on your own questions (`kv-memory eval`) before relying on it.
- The training data determine what it keeps: mostly encyclopaedic English in the data sets above, or a single corpus \
if it was tuned to one.
"""


def write_card(
    report: TrainReport,
    backbone: Backbone,
    *,
    command: str,
    data: Sequence[tuple[str, str | None]],
    begun_from: Path | None = None,
) -> Path:
    """Write the model card, `README.md`, into the folder of a finished adapter; return its path.

    `command` reproduces the adapter. `data` are the names of the training sets, each with its licence, None if it is
    unknown. `begun_from` is the adapter that was trained further.
    """
    path, model, hours = report.adapter / "README.md", built_in(backbone.name), report.elapsed_s / 3600
    settings, default = asdict(report.settings), asdict(TrainSettings())
    on_gpu = backbone.device.type == "cuda"
    card = _CARD.format(
        **{field.name: getattr(report, field.name) for field in fields(report)},
        s=report.settings,
        parts="Restore tokens and a LoRA for them" if report.settings.restore_tokens else "A scorer and a LoRA",
        paper="RestoreKV (arXiv 2608.01247)"
        if report.settings.restore_tokens
        else "KV-Distill (Chari, Qin, Van Durme, arXiv 2503.10337)",
        name=model.base_id if model else backbone.name,
        weights=backbone.weights_sha256[:16],
        dtype=str(backbone.dtype).removeprefix("torch."),
        begun_from=f"- Started from: {begun_from}\n" if begun_from else "",
        data="; ".join(f"{known} ({licence or 'licence: set by its owner'})" for known, licence in data),
        time=f"{hours:.1f} h" if hours >= 1.5 else f"{hours * 60:.0f} min",
        machine=torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        torch=torch.__version__,
        command=command,
        changed="\n".join(f"- `{k}`: {v}" for k, v in settings.items() if v != default[k]) or "none",
        results="\n".join(_results(report)),
    )
    path.write_text(card, encoding="utf-8")
    return path


def _results(report: TrainReport) -> list[str]:
    if report.kl is None:
        return ["It was not evaluated during training; `kv-memory eval` measures it."]
    ratios = sorted(report.kl, reverse=True)
    rows = [("this adapter", report.kl)]
    if report.baseline is not None:
        selector = "output errors" if report.settings.restore_tokens else "reconstruction attention"
        rows.append((f"{selector} (no training)", report.baseline))
    lines = [
        f"KL to the full cache on its own answers about {report.n_held_out} held-out documents, nats per token (lower "
        "is better)" + ("" if report.none is None else f"; without any document: {report.none:.3f}") + ".",
        "",
        "| kept | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    return [*lines, *(f"| {name} | " + " | ".join(f"{kl[r]:.3f}" for r in ratios) + " |" for name, kl in rows)]
