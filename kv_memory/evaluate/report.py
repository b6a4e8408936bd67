"""Report: tables in Markdown, plots drawn with matplotlib without a display, and the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError, DatasetError
from kv_memory.evaluate.aggregate import Interval, Row, order, score_of, table_of
from kv_memory.evaluate.question_records import METRICS, Record
from kv_memory.evaluate.saved_rows import Loaded

_NAMES = {"kl": "KL", "nll": "NLL", "f1": "F1", "em": "EM", "rouge_l": "ROUGE-L", "kl_joined": "KL to joined"}
_DPI = 120


def markdown(rows: Sequence[Row]) -> str:
    """Tables in Markdown, one for each task; columns without information are left out."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        header, *lines = cells(own)
        rule = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
        parts.append(f"### {task}\n\n{_about(own)}\n\n{table}\n")
    return "\n".join(parts)


def _about(rows: Sequence[Row]) -> str:
    sizes = {(row.n, row.n_documents) for row in rows}
    if len(sizes) > 1:
        return "Rows cover different documents; n is the number of questions. 95% intervals in brackets."
    n, n_documents = sizes.pop()
    documents = f" about {n_documents:,} document{'s' * (n_documents != 1)}" if n_documents else ""
    questions = f"{n:,} question{'s' * (n != 1)}{documents}"
    return f"{questions}, the same for every row. 95% intervals in brackets, from a bootstrap over documents."


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table of one task as text: a header and a line for each row; columns without information are left out."""
    table: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.group):
        values = [row.group.get(name, "") for row in rows]
        table[name] = [f"{value:,}" if isinstance(value, int) else value for value in values]
    table["method"] = [row.method for row in rows]
    table["kept"] = [kept_text(row.keep_ratio) for row in rows]
    if len({row.n for row in rows}) > 1:
        table["n"] = [str(row.n) for row in rows]
    for name in METRICS:
        if any(row.means.get(name) is not None for row in rows):
            pairs = [row.ci.get("kl") if name == "kl" else None for row in rows]
            figures = [_figure(row.means.get(name), pair) for row, pair in zip(rows, pairs, strict=True)]
            table[_NAMES.get(name, name)] = figures
    if any(row.empty for row in rows):
        table["empty"] = [_figure(row.empty, digits=2) for row in rows]
    if any(row.retention is not None for row in rows):
        table["retention"] = [_figure(row.retention, row.ci.get("retention"), digits=2) for row in rows]
    table["s/document"] = [_figure(row.seconds_per_document) for row in rows]
    table["prefills"] = [_figure(row.prefills, digits=1) for row in rows]
    return [list(table), *map(list, zip(*table.values(), strict=True))]


def kept_text(keep_ratio: float | None) -> str:
    """A keep_ratio for people: `1/8` if it is one over a whole number."""
    if keep_ratio is None:
        return ""
    below = round(1 / keep_ratio)
    return f"1/{below}" if below > 1 and abs(1 / below - keep_ratio) < 1e-9 else f"{keep_ratio:g}"


def _figure(value: float | None, pair: Interval | None = None, *, digits: int = 3) -> str:
    if value is None:
        return ""
    interval = f" [{pair[0]:.{digits}f}, {pair[1]:.{digits}f}]" if pair is not None else ""
    return f"{value:.{digits}f}{interval}"


def _canvas(width: float, height: float) -> Any:
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
    """
    score = score_of(rows[0].task)
    measures = ["kl", *([score] if score and any(row.score is not None for row in rows) else [])]
    figure = _canvas(5.5 * len(measures), 4)
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
    panel.set_ylabel("KL to the full cache (nats)" if measure == "kl" else _NAMES.get(measure, measure))
    panel.grid(alpha=0.3)


def plot_needle(records: Sequence[Record], path: Path) -> Path:
    """Plot the share of answers that contain the needle, by length and depth, from records that have a cell.

    If answers were not decoded, it is the needle's NLL.
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
    figure = _canvas(2.6 * per_line + 1, 2.4 * lines)
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


def write_report(loaded: Loaded, to: Path | str) -> list[Path]:
    """Write `tables.md` and the plots into a folder, and return the files written.

    The plots are `TASK_fidelity.png` for each task, or for each of its groups, and `needle_map.png` for needle.

    Raises:
        ConfigError: The package matplotlib is missing.
        DatasetError: The folder cannot be written to.
    """
    folder = Path(to)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / "tables.md"
        table.write_text(markdown(loaded.rows), encoding="utf-8")
        files = [table]
        for table_name in dict.fromkeys(table_of(row) for row in loaded.rows):
            own = [row for row in loaded.rows if table_of(row) == table_name]
            if any(row.keep_ratio is not None for row in own):
                name = "_".join([table_name[0], *(f"{key}_{value}" for key, value in table_name[1])])
                files.append(plot_fidelity(own, folder / f"{name}_fidelity.png"))
        cells = [record for record in loaded.records if record.cell is not None]
        if cells:
            files.append(plot_needle(cells, folder / "needle_map.png"))
    except OSError as error:
        raise DatasetError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return files
