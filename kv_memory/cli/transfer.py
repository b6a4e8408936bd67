"""`export` and `import`: commands that write a collection to one file, and load it into another store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from kv_memory.cli.options import DEFAULT_STORE, Place, StoreOption, command
from kv_memory.cli.output import Output, size_text
from kv_memory.cli.progress import track_transfer
from kv_memory.config import check_choice
from kv_memory.errors import ConfigError


@command()
def export(file: Path, *, place: Place, out: Output) -> Any:
    """Write a collection into one file, with its documents, caches and settings.

    kv-memory import loads it into another store, on any machine: caches made on a GPU can be used on a laptop.

    Options:
        file (FILE): Tar archive to write.
    """
    if str(file) == "-":
        raise ConfigError("an archive is not written to a pipe", where="FILE", next_step="Pass a file name.")
    with place.open_store(out) as opened, track_transfer(out) as tracker:
        from kv_memory.store import export_collection

        report = export_collection(opened, file, on_progress=tracker)
    out.line(
        f"Exported {report.n_documents:,} documents and {report.n_caches:,} caches of collection "
        f"{report.collection}: {size_text(report.size_bytes)}, {report.path}"
    )
    if report.changed:
        out.note("The collection changed during the export: every document in the archive is complete, but some")
        out.note("new ones may be missing. Export again for a consistent state.")
    if report.damaged:
        out.note(f"{len(report.damaged):,} caches were damaged and are not in the archive. Next: kv-memory add --stale")
    return report


@command()
def import_file(
    file: Path,
    *,
    collection: str | None = None,
    on_conflict: str = "refuse",
    store: StoreOption = DEFAULT_STORE,
    out: Output,
) -> Any:
    """Import a collection from a file; store and collection are created if they do not exist.

    The file is verified before anything is changed. What exists already is skipped, so the same command resumes an
    interrupted import. Documents and caches are trusted like a model: import only files whose origin you know.

    Options:
        file (FILE): Archive of kv-memory export.
        collection (NAME): Collection to import into.  [default: the archive's]
        on_conflict (CHOICE): For documents that exist with another text: refuse the archive, skip them, or replace
            them.
    """
    out.stopped = "What was imported stays; run the same command to import the rest."
    with out.working("Starting"):
        from kv_memory.store import OnConflict, Store, copy_collection, open_archive

    check_choice(on_conflict, OnConflict, where="--on-conflict")
    with track_transfer(out) as tracker, open_archive(file, on_progress=tracker) as archive:
        name = archive.collection if collection is None else collection
        with Store.open(store, collection=name) as opened:
            report = copy_collection(archive, opened, on_conflict=cast("OnConflict", on_conflict), on_progress=tracker)
    out.line(
        f"Imported into collection {report.collection}: {report.n_added:,} documents added, {report.n_replaced:,} "
        f"replaced, {report.n_unchanged:,} unchanged, {len(report.conflicts):,} left unchanged"
    )
    out.line(
        f"{report.n_caches:,} new caches ({size_text(report.size_bytes)}), {report.n_caches_present:,} already present"
    )
    if report.n_evicted:
        out.note(f"{report.n_evicted:,} caches were evicted to stay within the size limit.")
    return report
