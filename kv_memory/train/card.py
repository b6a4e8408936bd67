"""The model card of a trained adapter: model, data, settings, cost and results."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import built_in
from kv_memory.train.settings import TrainSettings
from kv_memory.train.state import TrainReport

__all__ = ["machine", "write_card"]


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
        f"- Model: {name}, weights `{backbone.weights_sha256[:16]}`, {_dtype(backbone.dtype)}",
        *([f"- Started from: {begun_from}"] if begun_from else []),
        f"- Data: {report.n_examples:,} examples: {'; '.join(_data_line(known, licence) for known, licence in data)}",
        f"- Steps: {report.best_step:,} of {report.n_steps:,} ({settings.warmup_steps:,} of warm-up), "
        f"{report.n_tokens:,} tokens processed",
        f"- Time: {_time(report.elapsed_s)} on {machine(backbone)}",
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


def machine(backbone: Backbone) -> str:
    """Processor or GPU, and the version of torch."""
    if backbone.device.type == "cuda":
        what = torch.cuda.get_device_name(backbone.device)
    else:
        what = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{what}, torch {torch.__version__}"


def _results(report: TrainReport) -> list[str]:
    if report.evaluation is None:
        return ["It was not evaluated during training; `kv-memory eval` measures it."]
    ratios = sorted(report.evaluation.kl, reverse=True)
    rows = [("this adapter", report.evaluation.kl)]
    if report.baseline is not None:
        rows.append(("reconstruction attention (no training)", dict(report.baseline)))
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


def _data_line(name: str, licence: str | None) -> str:
    return f"{name} ({licence or 'licence: set by its owner'})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
