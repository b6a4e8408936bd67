"""`kv-memory check`: is everything there, and sound?"""

from __future__ import annotations

import typer

from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import FAILED, plain, reporting, size_text

__all__ = ["check"]


def check(
    store: StoreOption = DEFAULT_STORE, collection: CollectionOption = DEFAULT_COLLECTION, as_json: JsonOption = False
) -> None:
    """Hash every stored cache and compare it with the catalog.

    Damaged caches are put into quarantine; questions about their passages are answered from the text, if it is kept,
    until kv-memory add --stale has made them again. Exits with 1 if anything was wrong.
    """
    with reporting(as_json=as_json) as out:
        out.stopped = "Run it again at any time."
        with open_store(out, store, collection) as opened, out.working("Checking"):
            report = opened.check()
        if as_json:
            out.json({**plain(report), "ok": report.ok})
        else:
            rows = [
                ("Sound", f"{report.n_blobs:,} caches, {size_text(report.size_bytes)}"),
                ("Damaged", f"{len(report.damaged):,}{', now in quarantine' if report.damaged else ''}"),
                ("Of another text", f"{len(report.misfiled):,}{', now unknown' if report.misfiled else ''}"),
                ("Missing", f"{len(report.missing):,}"),
                ("Without a document", f"{len(report.orphans) + len(report.unreferenced):,}"),
                ("Leftovers", f"{len(report.strays):,}"),
            ]
            out.table(("", ""), rows)
            if report.damaged or report.misfiled or report.missing:
                out.note("Next: kv-memory gc, then kv-memory add --stale, which makes the lost caches again.")
            elif not report.ok:
                out.note("Nothing is lost. kv-memory gc removes what is left over.")
        if not report.ok:
            raise typer.Exit(FAILED)
