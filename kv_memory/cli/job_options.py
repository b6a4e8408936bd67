"""Options of `kv-memory job run` and `kv-memory job resume`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "EncodingOption",
    "EngineOption",
    "GlobOption",
    "GpusOption",
    "IdFieldOption",
    "MaxAttemptsOption",
    "QueryOption",
    "TextFieldOption",
    "WorkersOption",
]

WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Worker processes, each with a model of its own: as many as there are GPUs; on CPUs they share the cores.",
    ),
]
EngineOption = Annotated[
    str,
    typer.Option("--engine", metavar="NAME", help="local: processes of this machine. ray: actors of a Ray cluster."),
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="N",
        min=0,
        help="With --engine ray: GPUs of each worker; 0.5 for two that share one.  [default: 1 where there are any]",
    ),
]
GlobOption = Annotated[
    str | None,
    typer.Option(
        "--glob",
        metavar="PATTERN",
        help="For folders: which files, e.g. '*.md' or 'reports/**/*.txt'.  [default: those of known types]",
    ),
]
IdFieldOption = Annotated[
    str,
    typer.Option(
        "--id-field",
        metavar="NAME",
        help="Which field or column of a record names it; without one it is named FILE#NUMBER.",
    ),
]
TextFieldOption = Annotated[
    str, typer.Option("--text-field", metavar="NAME", help="Which field or column of a record is its text.")
]
QueryOption = Annotated[
    str | None,
    typer.Option(
        "--query", metavar="SQL", help='For sql: sources, e.g. "SELECT id, text FROM notes"; one row is one document.'
    ),
]
EncodingOption = Annotated[
    str, typer.Option("--encoding", metavar="NAME", help="Of text files without a byte order mark.")
]
MaxAttemptsOption = Annotated[
    int,
    typer.Option(
        "--max-attempts",
        metavar="N",
        min=1,
        help="How many workers may die over one document before it counts as failed.",
    ),
]
