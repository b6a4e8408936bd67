"""Rows per question into one line per method and keep_ratio, with bootstrap intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["print_table", "summarise"]

MEASURES = ("kl", "nll", "f1", "em", "contains")
SCORES = ("f1", "contains")  # the first that was measured is the task's main one
N_SAMPLES = 2000
Group = dict[str, list[dict[str, Any]]]  # rows by document


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per method and keep_ratio, over the documents that all of them have been measured on.

    Returns:
        The keys of `kv-memory eval --json`. `ci` holds 95% intervals; `retention` is (score - floor) / (ceiling -
        floor) of the main score, F1 where there is one; `prefills` is the time of a document in plain prefills of
        prefix and document.
    """
    groups: dict[tuple[str, float | None], Group] = {}
    for row in rows:
        group = groups.setdefault((row["method"], row["keep_ratio"]), {})
        group.setdefault(row["document"], []).append(row)
    common = sorted(set.intersection(*map(set, groups.values()))) if groups else []
    if not common:
        return []
    # The same samples of documents for every method: differences between methods are then not those of the draw.
    samples = np.random.default_rng(0).integers(len(common), size=(N_SAMPLES, len(common)))
    tables = {key: _sums(group, common) for key, group in sorted(groups.items(), key=_order)}
    counts = np.array([len(groups["full", None][document]) for document in common], dtype=float)
    score = next((name for name in SCORES if all(sums[name] is not None for sums in tables.values())), None)
    lines = []
    for (method, keep_ratio), sums in tables.items():
        first = [groups[method, keep_ratio][document][0] for document in common]
        line: dict[str, Any] = {"task": first[0]["task"], "method": method, "keep_ratio": keep_ratio}
        line["n"] = int(counts.sum())
        line |= {name: None if here is None else float(here.sum() / counts.sum()) for name, here in sums.items()}
        line |= {"accuracy": None, "rouge_l": None, "retention": None}
        line["ci"] = {"kl": _interval(sums["kl"], counts, samples), "score": None, "retention": None}
        if score is not None:
            line["ci"]["score"] = _interval(sums[score], counts, samples)
            floor, ceiling = tables["none", None][score], tables["full", None][score]
            if ceiling.sum() != floor.sum():
                line["retention"] = float((sums[score] - floor).sum() / (ceiling - floor).sum())
                line["ci"]["retention"] = _interval(sums[score] - floor, ceiling - floor, samples)
        for name in ("seconds_per_document", "prefills"):
            values = [row[name] for row in first]
            line[name] = None if None in values else float(np.mean(values))
        lines.append(line)
    return lines


def _order(item: tuple[tuple[str, float | None], Any]) -> tuple[bool, str, float]:
    (method, keep_ratio), _ = item
    return keep_ratio is not None, method, -(keep_ratio or 0)


def _sums(group: Group, documents: Sequence[str]) -> dict[str, Any]:
    """Per measure its sums over the questions of each document; None where it was not measured."""
    sums: dict[str, Any] = {}
    for name in MEASURES:
        values = [[row[name] for row in group[document]] for document in documents]
        missing = any(value is None for row in values for value in row)
        sums[name] = None if missing else np.array([sum(row) for row in values], dtype=float)
    return sums


def _interval(above: np.ndarray, below: np.ndarray, samples: np.ndarray) -> list[float] | None:
    """95% interval of a ratio of sums over documents."""
    total = below[samples].sum(1)
    ratios = above[samples].sum(1)[total != 0] / total[total != 0]
    return [float(value) for value in np.percentile(ratios, [2.5, 97.5])] if len(ratios) else None


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """The summary as plain text."""
    print(f"{'method':27} {'kept':>5} {'n':>4} {'KL':>6} {'NLL':>6} {'F1':>6} {'EM':>6} {'ret.':>6} {'prefills':>8}")
    for line in lines:
        kept = "" if line["keep_ratio"] is None else f"1/{1 / line['keep_ratio']:g}"
        figures = [line[name] for name in ("kl", "nll", "f1", "em", "retention")]
        shown = " ".join(f"{'' if value is None else format(value, '.3f'):>6}" for value in figures)
        prefills = "" if line["prefills"] is None else f"{line['prefills']:.1f}"
        print(f"{line['method']:27} {kept:>5} {line['n']:>4} {shown} {prefills:>8}")
