"""`kv-memory report`: tables and plots from what evaluations kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kv_memory.cli.eval import BY, print_rows
from kv_memory.cli.output import reporting
from kv_memory.cli.sizes import ratio_of

__all__ = ["report"]


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Folders of `eval --out` or of benchmarks/peers. LABEL=FOLDER sets adapters of one name apart.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Write tables.md and the plots here.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="NAME", help="Only this one, by its name in the table; repeatable."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None, typer.Option("--keep-ratio", metavar="SHARE", help="Only this one, e.g. 1/8; repeatable.")
    ] = None,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Use all documents of each row, not only those that all rows have.")
    ] = False,
    by: Annotated[list[str] | None, BY] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, one for each row.")] = False,
) -> None:
    """Make one table from several evaluations, and plot it.

    Rows are compared on the documents that all of them have.
    """
    with reporting(as_json=as_json) as out:
        ratios = [ratio_of(text) for text in keep_ratio or ()] or None
        with out.working("Reading"):
            from kv_memory.evaluate import load_rows, write_report

            files: list[Path] = []
            chosen: dict[str, Any] = {
                "methods": method or None,
                "keep_ratios": ratios,
                "paired": not unpaired,
                "by": by,
            }
            if to is None:
                loaded = load_rows(paths, seed=seed, **chosen)
            else:
                loaded, files = write_report(paths, to, seed=seed, **chosen)
        print_rows(out, loaded.rows)
        for file in files:
            out.note(f"Wrote {file}")
