"""What a run reports: its progress, its result, the plot of its log, and the model card of its adapter."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import built_in
from kv_memory.train.optimizer import Stage
from kv_memory.train.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Progress of a run after a step.

    Attributes:
        step: Number of steps done.
        n_steps: Total number of steps, over both stages.
        stage: `warmup` or `distillation`.
        loss: Loss of this step.
        n_tokens: Number of tokens processed so far, by this and earlier parts of the run.
        elapsed_s: Seconds so far, in this and earlier parts of the run.
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
        step: Number of steps done.
        n_steps: Number of steps planned.
        best_step: Step of the finished adapter: the one with the best evaluation, or the last.
        loss: Mean loss over the last 50 steps; None without steps.
        kl: KL to the full cache of that adapter by keep ratio, in nats per token, on held-out examples; None if nothing
            was evaluated.
        baseline: KL of the reconstruction selector, which needs no training; None if not measured.
        none: KL without any document; None if not measured.
        n_held_out: Number of documents in the evaluation.
        n_examples: Number of training examples.
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
    """Draw losses and evaluations over the steps; nothing without matplotlib (with a warning), or without steps.

    Args:
        records: Lines of a log.
        path: Path of the plot, a `.png` or `.svg` file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # rejected: pyplot, which has windows and global state
    except ImportError:
        logger.warning("no plot: matplotlib is not installed (pip install 'kv-memory[train]')")
        return
    steps = [record for record in records if "loss" in record and isinstance(record["loss"], int | float)]
    if not steps:
        return
    evaluations = [record for record in records if record.get("event") == "evaluation"]
    stages = [(stage, list(group)) for stage, group in groupby(steps, key=lambda record: record["stage"])]
    # The stages have different losses, so each gets its own scale.
    figure = Figure(figsize=(9, 3.2 * (len(stages) + bool(evaluations))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(stages) + bool(evaluations), 1, squeeze=False)[:, 0]
    for panel, (stage, group) in zip(panels, stages, strict=False):
        x = [record["step"] for record in group]
        losses = [record["loss"] for record in group]
        panel.plot(x, losses, color="0.8", linewidth=0.8)
        panel.plot(x, _smoothed(losses), color="C0")
        panel.set_title(f"{stage}: loss, and its mean over the last steps")
        panel.set_xlabel("step")
    if evaluations:
        panel = panels[-1]
        for ratio in evaluations[-1]["kl"]:
            known = [(record["step"], record["kl"][ratio]) for record in evaluations if ratio in record["kl"]]
            panel.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=3, label=f"keep {ratio}")
        panel.set_title("held-out examples: KL to the full cache, nats per token")
        panel.set_xlabel("step")
        panel.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a window that ends at each value: a fiftieth of all steps, at least 5."""
    window = max(5, len(values) // 50)
    windows = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in windows]


def write_card(
    report: TrainReport,
    backbone: Backbone,
    *,
    command: str,
    data: Sequence[tuple[str, str | None]],
    begun_from: str | None = None,
) -> Path:
    """Write `README.md` into the folder of a finished adapter.

    Args:
        report: Report of the training run.
        backbone: Model of the adapter.
        command: Command that reproduces the adapter.
        data: Names of the training sets, each with its licence; None if the licence is unknown.
        begun_from: Adapter that was trained further; None if training started from scratch.

    Returns:
        Path of the model card.
    """
    path = report.adapter / "README.md"
    model = built_in(backbone.name)
    name = model.base_id if model else backbone.name
    settings = report.settings
    sets = [f"{known} ({licence or 'licence: set by its owner'})" for known, licence in data]
    lines = [
        "---",
        f"base_model: {name}",
        "library_name: peft",
        "tags: [kv-memory, kv-distill, kv-cache]",
        "---",
        "",
        f"# KV-Distill adapter for {name}",
        "",
        "A scorer and a LoRA with which kv-memory compresses the key-value cache of a document, after KV-Distill "
        "(Chari, Qin, Van Durme, arXiv 2503.10337). The model that answers is the unmodified base model. To use it: "
        "`kv-memory add notes/ --adapter FOLDER`, or `Adapter.load(folder, backbone)` in Python.",
        "",
        "## Training",
        "",
        f"- Model: {name}, weights `{backbone.weights_sha256[:16]}`, {str(backbone.dtype).removeprefix('torch.')}",
        *([f"- Started from: {begun_from}"] if begun_from else []),
        f"- Data: {report.n_examples:,} examples: {'; '.join(sets)}",
        f"- Steps: {report.best_step:,} of {report.n_steps:,} ({settings.warmup_steps:,} of warm-up), "
        f"{report.n_tokens:,} tokens processed",
        f"- Time: {_time(report.elapsed_s)} on {_machine(backbone)}",
        f"- Command: `{command}`",
        "",
        "Settings that differ from the defaults:",
        "",
        *(_changed(settings) or ["none"]),
        "",
        "## Results",
        "",
        *_results(report),
        "",
        "## Limits",
        "",
        f"- It works only with these weights of {name}; other weights are rejected.",
        f"- Trained on documents of up to {settings.max_tokens:,} tokens and keep ratios of {settings.min_ratio:g} to "
        f"{settings.max_ratio:g}; not tested outside these ranges.",
        "- Compression loses information; names and numbers that no question asked about may be lost first. Compare "
        "with the uncompressed model on your own questions (`kv-memory eval`) before relying on it.",
        "- The training data determine what it keeps: mostly encyclopaedic English in the data sets above, or a single "
        "corpus if it was tuned to one.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _machine(backbone: Backbone) -> str:
    """Processor or GPU, and the version of torch."""
    if backbone.device.type == "cuda":
        what = torch.cuda.get_device_name(backbone.device)
    else:
        what = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{what}, torch {torch.__version__}"


def _results(report: TrainReport) -> list[str]:
    if report.kl is None:
        return ["It was not evaluated during training; `kv-memory eval` measures it."]
    ratios = sorted(report.kl, reverse=True)
    rows = [("this adapter", report.kl)]
    if report.baseline is not None:
        rows.append(("reconstruction attention (no training)", report.baseline))
    lines = [
        f"KL to the full cache on its own answers about {report.n_held_out} held-out documents, nats per token (lower "
        "is better)" + ("" if report.none is None else f"; without any document: {report.none:.3f}") + ".",
        "",
        "| kept | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    return [*lines, *(f"| {name} | " + " | ".join(f"{kl[r]:.3f}" for r in ratios) + " |" for name, kl in rows)]


def _changed(settings: TrainSettings) -> list[str]:
    default = asdict(TrainSettings())
    return [f"- `{name}`: {value}" for name, value in asdict(settings).items() if value != default[name]]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
