"""Plots: fidelity against keep_ratio, and the heat map of needles. Drawn with matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError
from kv_memory.evaluate.aggregate import Row, order, score_of
from kv_memory.evaluate.question_records import Record

_DPI = 120
_LABELS = {"f1": "F1", "rouge_l": "ROUGE-L", "kl": "KL to the full cache (nats)"}


def _figure(width: float, height: float) -> Any:
    """A figure without a window; `pyplot` was rejected: it keeps figures alive and chooses a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need the package matplotlib", where="report", next_step="pip install 'kv-memory[eval]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_fidelity(rows: Sequence[Row], path: Path) -> Path:
    """Plot KL, and the task's main score where it has one, against keep_ratio, from rows of one task and group.

    Ceiling and floor are lines.

    Raises:
        ConfigError: The package matplotlib is missing.
    """
    score = score_of(rows[0].task)
    measures = ["kl", *([score] if score and any(row.score is not None for row in rows) else [])]
    figure = _figure(5.5 * len(measures), 4)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        _draw(panel, rows, measure)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    about = "".join(f", {name} {value}" for name, value in rows[0].group.items())
    figure.suptitle(f"{rows[0].task}{about}, {rows[0].n} questions")
    figure.savefig(path, dpi=_DPI)
    return path


def _draw(panel: Any, rows: Sequence[Row], measure: str) -> None:
    for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = [row for row in rows if row.method == method and row.means.get(measure) is not None]
        if not own:
            continue
        values = [row.means[measure] for row in own]
        if own[0].keep_ratio is None:
            panel.axhline(values[0], linestyle="--", linewidth=1, color=f"C{index % 10}", label=method)
            continue
        ratios = [row.keep_ratio for row in own]
        marker, line = "os^Dv<>Pp*"[index % 10], "-" if index < 10 else ":"
        panel.plot(ratios, values, marker=marker, linestyle=line, color=f"C{index % 10}", label=method, markersize=4)
        pairs = [pair for row in own if (pair := row.ci.get("kl" if measure == "kl" else "score")) is not None]
        if len(pairs) == len(own):
            low, high = zip(*pairs, strict=True)
            panel.fill_between(ratios, low, high, color=f"C{index % 10}", alpha=0.12, linewidth=0)
    ticks = sorted({row.keep_ratio for row in rows if row.keep_ratio is not None})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"1/{1 / tick:g}" if tick < 1 else "1" for tick in ticks])
    panel.set_xlabel("keep_ratio")
    panel.set_ylabel(_LABELS.get(measure, measure))
    panel.grid(alpha=0.3)


def plot_needle(records: Sequence[Record], path: Path) -> Path:
    """Plot the share of answers that contain the needle, by length and depth, from records that have a cell.

    If answers were not decoded, it is the needle's NLL.

    Raises:
        ConfigError: The package matplotlib is missing.
    """
    found = all(q.contains is not None for record in records for q in record.questions)
    columns: dict[tuple[str, float | None], dict[tuple[int, float], list[float]]] = {}
    for record in records:
        assert record.cell is not None
        cells = columns.setdefault((record.method, record.keep_ratio), {})
        values = [float(q.contains or 0) if found else q.nll for q in record.questions]
        cells.setdefault(record.cell, []).extend(values)
    names = sorted(columns, key=lambda column: order(*column))
    per_line = min(4, len(names))
    lines = -(-len(names) // per_line)
    figure = _figure(2.6 * per_line + 1, 2.4 * lines)
    panels = figure.subplots(lines, per_line, squeeze=False).ravel()
    top = 1.0 if found else max(sum(v) / len(v) for cells in columns.values() for v in cells.values())
    image = None
    for panel, name in zip(panels, names, strict=False):
        image = _heat(panel, columns[name], name, top=top, found=found)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=list(panels), label="found" if found else "NLL of the needle (nats)", shrink=0.7)
    figure.savefig(path, dpi=_DPI)
    return path


def _heat(
    panel: Any, cells: dict[tuple[int, float], list[float]], name: tuple[str, float | None], *, top: float, found: bool
) -> Any:
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    grid = [
        [sum(v) / len(v) if (v := cells.get((length, depth), [])) else float("nan") for length in lengths]
        for depth in depths
    ]
    image = panel.imshow(grid, vmin=0, vmax=top, cmap="RdYlGn" if found else "RdYlGn_r", aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    method, ratio = name
    panel.set_title(method if ratio is None else f"{method} at 1/{1 / ratio:g}", fontsize=8)
    return image
