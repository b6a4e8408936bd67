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


def summarise(rows: Sequence[dict[str, Any]], *, paired: bool = True) -> list[dict[str, Any]]:
    """One line per method and keep_ratio.

    Args:
        rows: One for each question.
        paired: Only the documents that all of them have been measured on; else each line is about all that it has.

    Returns:
        The keys of `kv-memory eval --json`. `ci` holds 95% intervals; `retention` is (score - floor) / (ceiling -
        floor) of the main score, F1 where there is one; `prefills` is the time of a document in plain prefills of
        prefix and document.
    """
    groups: dict[tuple[str, float | None], Group] = {}
    for row in rows:
        group = groups.setdefault((row["method"], row["keep_ratio"]), {})
        group.setdefault(row["document"], []).append(row)
    common = set.intersection(*map(set, groups.values())) if groups else set()
    lines = []
    for key, group in sorted(groups.items(), key=_order):
        documents = sorted(common if paired else group)
        if documents:
            lines.append(_line(key, group, groups["full", None], groups["none", None], documents))
    return lines


def _line(
    key: tuple[str, float | None], group: Group, full: Group, none: Group, documents: Sequence[str]
) -> dict[str, Any]:
    """One method at one keep_ratio, over documents that it and the ends of the scale have."""
    # The same samples of the same documents for every method: differences between them are then not those of the draw.
    samples = np.random.default_rng(0).integers(len(documents), size=(N_SAMPLES, len(documents)))
    sums, ceilings, floors = (_sums(each, documents) for each in (group, full, none))
    counts = np.array([len(full[document]) for document in documents], dtype=float)
    first = [group[document][0] for document in documents]
    line: dict[str, Any] = {"task": first[0]["task"], "method": key[0], "keep_ratio": key[1]}
    line["n"] = int(counts.sum())
    line |= {name: None if here is None else float(here.sum() / counts.sum()) for name, here in sums.items()}
    line |= {"accuracy": None, "rouge_l": None, "retention": None}
    line["ci"] = {"kl": _interval(sums["kl"], counts, samples), "score": None, "retention": None}
    score = next((name for name in SCORES if sums[name] is not None), None)
    if score is not None:
        line["ci"]["score"] = _interval(sums[score], counts, samples)
        floor, ceiling = floors[score], ceilings[score]
        if ceiling.sum() != floor.sum():
            line["retention"] = float((sums[score] - floor).sum() / (ceiling - floor).sum())
            line["ci"]["retention"] = _interval(sums[score] - floor, ceiling - floor, samples)
    for name in ("seconds_per_document", "prefills"):
        values = [row[name] for row in first]
        line[name] = None if None in values else float(np.mean(values))
    return line


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
