"""Report: tables in Markdown, and the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kv_memory.errors import DatasetError
from kv_memory.evaluate.aggregate import Interval, Row, table_of
from kv_memory.evaluate.plots import plot_fidelity, plot_needle
from kv_memory.evaluate.question_records import METRICS
from kv_memory.evaluate.saved_rows import Loaded

_NAMES = {"kl": "KL", "nll": "NLL", "f1": "F1", "em": "EM", "rouge_l": "ROUGE-L", "kl_joined": "KL to joined"}


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
