"""The log of a run, as JSON lines consistent with the checkpoints, and its plot."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

__all__ = ["TrainLog", "plot_log"]

logger = logging.getLogger(__name__)


class TrainLog:
    """A file of JSON lines, each with a `step`: the number of steps done when the line was written.

    Lines for steps have `stage loss parts lr grad_norm n_tokens elapsed_s keep_ratio`; other lines have an `event`.

    Args:
        path: Path of the file, created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **record: Any) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            # NaN is not valid JSON, and the line that reports it should be readable everywhere.
            file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All complete lines; a line cut off by a kill is skipped."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
        return found

    def truncate(self, step: int) -> None:
        """Drop the lines after `step`, so that a run resumed there logs no step twice."""
        kept = [record for record in self.records() if record["step"] <= step]
        scratch = self._path.with_name(self._path.name + ".tmp")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(scratch, self._path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


def plot_log(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw loss, learning rate and evaluation over the steps.

    Args:
        records: Lines of a log.
        path: Path of the plot, a `.png` or `.svg` file.

    Returns:
        True if the plot was drawn; False without matplotlib (with a warning), and without steps.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # rejected: pyplot, which has windows and global state
    except ImportError:
        logger.warning("no plot: matplotlib is not installed (pip install 'kv-memory[train]')")
        return False
    steps = [record for record in records if "loss" in record and isinstance(record["loss"], int | float)]
    if not steps:
        return False
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
    return True


def _smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over a window that ends at each value: a fiftieth of all steps, at least 5."""
    window = max(5, len(values) // 50)
    windows = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in windows]
