"""`kv-memory export`: a collection as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting, size_text
from kv_memory.cli.transfer_progress import TransferTracker
from kv_memory.errors import ConfigError

__all__ = ["export"]


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write, a tar; - is standard output.")],
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Write a collection into one file, with its documents, caches and settings.

    kv-memory import reads it into another store, on any machine: what was compressed on a GPU answers on a laptop. An
    interrupted export is gone on with by the same command, unless the collection has changed since.
    """
    with reporting(as_json=as_json) as out:
        piped = str(file) == "-"
        if piped and as_json:
            raise ConfigError(
                "the archive and --json would share the standard output", where="--json", next_step="Name a file."
            )
        out.stopped = "Run the same command again to go on; until then the archive is not complete."
        with open_store(out, store, collection) as opened, TransferTracker(out) as tracker:
            report = opened.export_to(file, on_progress=tracker)
        if as_json:
            out.json(report)
            return
        # Beside an archive on standard output there is no room for words.
        say = out.note if piped else out.line
        say(
            f"Exported {report.n_documents:,} documents and {report.n_blobs:,} caches of collection "
            f"{report.collection}: {size_text(report.size_bytes)}{'' if piped else f', {report.path}'}"
        )
        if report.resumed:
            out.note("An interrupted export was gone on with.")
        if report.changed:
            out.note("The collection was changed meanwhile: every document in the archive is complete, but some that")
            out.note("are new may not be in it. Export again for one state of all of them.")
        if report.damaged:
            out.note(f"{len(report.damaged):,} caches were damaged and are not in it. Next: kv-memory add --stale")
