"""`export` and `import`: commands that write a collection to one file, and read it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kv_memory.cli.open_store import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import Output, reporting, size_text
from kv_memory.cli.progress import TransferTracker
from kv_memory.config import check_choice
from kv_memory.errors import ConfigError

if TYPE_CHECKING:
    from kv_memory.store import ImportReport
    from kv_memory.store.transfer.part_files import OnConflict

__all__ = ["export", "import_archive"]


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Tar archive to write; - is standard output.")],
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Write a collection into one file, with its documents, caches and settings.

    kv-memory import loads it into another store, on any machine: caches made on a GPU can be used on a laptop. The same
    command resumes an interrupted export, unless the collection has changed since.
    """
    with reporting(as_json=as_json) as out:
        piped = str(file) == "-"
        if piped and as_json:
            raise ConfigError(
                "the archive and --json would share the standard output", where="--json", next_step="Pass a file name."
            )
        out.stopped = "Run the same command to resume; until then the archive is incomplete."
        with open_store(out, store, collection) as opened, TransferTracker(out) as tracker:
            report = opened.export_to(file, on_progress=tracker)
        if as_json:
            out.json(report)
            return
        # Standard output may hold the archive; the report then goes to stderr.
        say = out.note if piped else out.line
        say(
            f"Exported {report.n_documents:,} documents and {report.n_blobs:,} caches of collection "
            f"{report.collection}: {size_text(report.size_bytes)}{'' if piped else f', {report.path}'}"
        )
        if report.resumed:
            out.note("Resumed an interrupted export.")
        if report.changed:
            out.note("The collection changed during the export: every document in the archive is complete, but some")
            out.note("new ones may be missing. Export again for a consistent state.")
        if report.damaged:
            out.note(
                f"{len(report.damaged):,} caches were damaged and are not in the archive. Next: kv-memory add --stale"
            )


def import_archive(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Archive of kv-memory export; - is standard input.")],
    collection: Annotated[
        str | None,
        typer.Option("--collection", metavar="NAME", help="Collection to import into.  [default: the archive's]"),
    ] = None,
    on_conflict: Annotated[
        str,
        typer.Option(
            "--on-conflict",
            metavar="CHOICE",
            help="For documents that exist with another text: refuse the archive, skip them, or replace them.",
        ),
    ] = "refuse",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Import a collection from a file; store and collection are created if they do not exist.

    The file is verified before anything is changed. What exists already is skipped, so the same command resumes an
    interrupted import. Documents and caches are trusted like a model: import only files whose origin you know.
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "What was imported stays; run the same command to import the rest."
        with out.working("Starting"):
            from kv_memory.store import Store, open_archive
            from kv_memory.store.transfer.part_files import OnConflict, verify_archive

        check_choice(on_conflict, OnConflict, where="--on-conflict")
        with open_archive(file) as archive, TransferTracker(out) as tracker:
            if archive.can_rewind and not store.expanduser().exists():
                verify_archive(archive, tracker)  # a damaged archive must not leave an empty store behind
                archive.rewind()
            name = archive.header.collection if collection is None else collection
            with Store.open(store, collection=name) as opened:
                report = opened.import_from(archive, on_conflict=cast("OnConflict", on_conflict), on_progress=tracker)
        if as_json:
            out.json(report)
        else:
            _tell(out, report)


def _tell(out: Output, report: ImportReport) -> None:
    out.line(
        f"Imported into collection {report.collection}: {report.n_added:,} documents added, {report.n_replaced:,} "
        f"replaced, {report.n_unchanged:,} unchanged, {len(report.conflicts):,} left unchanged"
    )
    out.line(
        f"{report.n_caches:,} new caches ({size_text(report.size_bytes)}), {report.n_caches_present:,} already present"
    )
    if report.n_evicted:
        out.note(f"{report.n_evicted:,} caches were evicted to stay within the size limit.")
