"""Runs kvpress on a work file and measures what its caches answer.

    python press.py results/work.jsonl --out results                 # all methods
    python press.py results/work.jsonl --out results --summary-only  # the table of the results so far
    python press.py results/work.jsonl --out results --method kvpress:kvzip_plus --keep-ratio 1/8 --n-documents 20

`--out` gets `questions.jsonl`, one line per document, method, keep_ratio and question, to which a later run adds what
is missing; and `summary.jsonl`, one line per method and keep_ratio with the keys of `kv-memory eval --json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Answered, Bench
from metrics import score_answer
from presses import METHODS, Budget, Recipe
from reader import Reader, Reading
from summary import print_table, summarise

Row = dict[str, Any]
TOGETHER = 12  # units of one document that are decoded together; each holds its own copy of what was read
VERSIONS = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}


@dataclass(frozen=True)
class Unit:
    """One document under one method and keep_ratio; `keep_ratio` is None for `full` and `none`."""

    method: str
    keep_ratio: float | None
    n_kept: int
    key: str


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="file written by export.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--method", nargs="+", action="extend", choices=["full", "none", *METHODS], help="default: all")
    parser.add_argument("--keep-ratio", type=ratio, nargs="+", action="extend", help="default: all in the work file")
    parser.add_argument("--n-documents", type=int, help="only this many documents, the first ones")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--device", default="auto", help="a torch device")
    parser.add_argument("--summary-only", action="store_true", help="only summarise; run nothing")
    parser.add_argument("--unpaired", action="store_true", help="each row covers all documents it has")
    args = parser.parse_args()
    args.method = args.method or ["full", "none", *METHODS]

    with args.work.open(encoding="utf-8") as file:
        header, *documents = map(json.loads, file)
    documents = documents[: args.n_documents]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "questions.jsonl"
    # `full` and `none` are the ends of the scale, without which no result can be judged.
    methods = list(dict.fromkeys(["full", "none", *args.method]))
    plans = [(document, list(units(header, document, methods, args.keep_ratio))) for document in documents]
    if not args.summary_only:
        run(args, header, plans, path)
    wanted = {unit.key for _, plan in plans for unit in plan}
    rows = [row for row in read_rows(path) if row["key"] in wanted]
    lines = summarise(rows, paired=not args.unpaired)
    (args.out / "summary.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    print_table(lines)


def ratio(text: str) -> float:
    """A share written as `1/8` or `0.125`."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def units(
    header: dict[str, Any], document: dict[str, Any], methods: list[str], keep_ratios: list[float] | None
) -> Iterator[Unit]:
    """All units to measure on one document, in the order of methods and ratios given."""
    base = {**header, **document, "versions": VERSIONS}
    base.pop("n_kept")
    base.pop("model")  # a location; the hash of the weights identifies the model
    for method in methods:
        recipe = METHODS.get(method)
        known = {float(k): n for k, n in document["n_kept"].items()}
        choices = [(None, 0)] if recipe is None else [(k, known[k]) for k in keep_ratios or known]
        for keep_ratio, n_kept in choices:
            what = {
                **base,
                "method": method,
                "settings": recipe.settings if recipe else "",
                "ratio": keep_ratio,
                "kept": n_kept,
            }
            key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
            yield Unit(method, keep_ratio, n_kept, key)


def read_rows(path: Path) -> list[Row]:
    """The rows of complete units; those that a kill left half written are dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["key"], set()).add(row["question"])
    whole = [row for row in rows if len(found[row["key"]]) == row["n_questions"]]
    return list({(row["key"], row["question"]): row for row in whole}.values())


def run(args: argparse.Namespace, header: dict[str, Any], plans: list[tuple[Any, list[Unit]]], path: Path) -> None:
    """Measure what is not in the file yet."""
    start_s = time.monotonic()
    before = read_rows(path)
    drop_torn(path, before)
    done = {row["key"] for row in before}
    n_all = sum(unit.key not in done for _, plan in plans for unit in plan)
    print(f"{n_all} to measure, {len(done)} already measured", file=sys.stderr)
    if not n_all:
        return
    reader = Reader(header["model"], dtype=header["dtype"], device=args.device)
    n_done = 0
    with path.open("a", encoding="utf-8") as file:
        for number, (document, plan) in enumerate(plans, start=1):
            missing = [unit for unit in plan if unit.key not in done]
            if not missing:
                continue
            bench = Bench(
                reader,
                [*header["prefix_ids"], *document["ids"]],
                document["questions"],
                stop=header["stop"],
                end_ids=header["end_ids"],
                max_new_tokens=header["max_new_tokens"] if header["text_metrics"] else 0,
            )
            for start in range(0, len(missing), TOGETHER):
                if time.monotonic() - start_s > args.time_limit:
                    print(f"time limit: {n_all - n_done} left", file=sys.stderr)
                    return
                units_ = missing[start : start + TOGETHER]
                rows = measure(reader, bench, header, document, units_)
                file.write("".join(f"{json.dumps(row)}\n" for row in rows))
                file.flush()
                n_done += len(units_)
            rate = (time.monotonic() - start_s) / n_done
            left_s = rate * (n_all - n_done)
            print(f"document {number}/{len(plans)}  {n_done}/{n_all}  about {left_s:.0f} s left", file=sys.stderr)


def drop_torn(path: Path, rows: list[Row]) -> None:
    """Leave only complete units in the file, because other programs read it too."""
    whole = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") != whole:
        scratch = path.with_suffix(".part")
        scratch.write_text(whole, encoding="utf-8")
        scratch.replace(path)


def measure(
    reader: Reader, bench: Bench, header: dict[str, Any], document: dict[str, Any], batch: list[Unit]
) -> list[Row]:
    """The rows of some units, one per question of each."""
    readings = [read(reader, bench, header, document, unit) for unit in batch]
    return [
        row
        for unit, reading, answered in zip(batch, readings, bench.measure(readings), strict=True)
        for row in rows_of(
            header, document, unit, answered, None if unit.keep_ratio is None else reading.elapsed_s, bench
        )
    ]


def rows_of(
    header: dict[str, Any],
    document: dict[str, Any],
    unit: Unit,
    answered: list[Answered],
    elapsed_s: float | None,
    bench: Bench,
) -> list[Row]:
    """The rows of one unit, one per question."""
    return [
        {
            "key": unit.key,
            "task": header["task"],
            "document": document["document"],
            "method": unit.method,
            "keep_ratio": unit.keep_ratio,
            "question": index,
            "n_questions": len(answered),
            "kl": one.kl,
            "nll": one.nll,
            **score_answer(one.text, question["references"], header["text_metrics"]),
            "answer": one.text,
            "n_tokens": len(document["ids"]),
            "n_kept": None if elapsed_s is None else unit.n_kept,
            "seconds_per_document": elapsed_s,
            "prefills": None if elapsed_s is None else elapsed_s / bench.full.elapsed_s,
        }
        for index, (one, question) in enumerate(zip(answered, document["questions"], strict=True))
    ]


def read(reader: Reader, bench: Bench, header: dict[str, Any], document: dict[str, Any], unit: Unit) -> Reading:
    """The reading of a document under the unit's method."""
    prefix, ids = header["prefix_ids"], document["ids"]
    if unit.method == "full":
        return bench.full
    if unit.method == "none":
        return reader.read(prefix)
    budget = Budget(n_prefix=len(prefix), n_tokens=len(ids), n_kept=unit.n_kept, tail_ids=tuple(header["tail_ids"]))
    return read_unit(reader, [*prefix, *ids], METHODS[unit.method], budget)


def read_unit(reader: Reader, text: list[int], recipe: Recipe, budget: Budget) -> Reading:
    """Prefix and document under a press, with exactly the entries of the budget."""
    press = recipe.make(budget) if budget.n_kept < budget.n_tokens else None
    reading = reader.read(text, press=press, eager=recipe.eager)
    n_heads = sum(key.shape[1] for key in reading.keys)
    if reading.n_entries != n_heads * (budget.n_prefix + budget.n_kept):
        raise RuntimeError(f"kept {reading.n_entries} entries, not {n_heads} x {budget.n_prefix + budget.n_kept}")
    return reading


if __name__ == "__main__":
    main()
