"""`kv-memory remove`: documents out of the store."""

from __future__ import annotations

from typing import Annotated

import typer

from kv_memory.cli.naming import find_document_id
from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting, size_text
from kv_memory.errors import ConfigError

__all__ = ["remove"]


def remove(
    documents: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Ids, paths or names of files, or beginnings of ids.")
    ] = None,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Leave no byte of them in any file of the store: quarantine, index, free pages and logs of databases. "
            "Without an ID, of what was removed before.",
        ),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Delete documents with their passages and distilled caches.

    Nothing is deleted unless every name means exactly one document. The files they came from are not touched. Nor does
    --purge reach backups, the log of a PostgreSQL server, old versions in a bucket, and copies on other machines, where
    kv-memory remove --purge without an ID removes them.
    """
    with reporting(as_json=as_json) as out:
        if not documents and not purge:
            raise ConfigError("no document is named", where="ID", next_step="`kv-memory list` shows the ids.")
        with open_store(out, store, collection) as opened:
            ids = [summary.id for summary in opened.documents()] if documents else []
            chosen = list(dict.fromkeys(find_document_id(name, ids) for name in documents or ()))
            out.stopped = "What was deleted stays deleted; run the same command for the rest."
            if purge:
                out.stopped = "What was deleted stays deleted; end it with `kv-memory remove --purge`, without an ID."
                with out.working("Purging"):
                    report = opened.purge(*chosen)
            else:
                for id_ in chosen:
                    opened.delete_document(id_)
                    if not as_json:
                        out.line(f"Removed {id_}")
        if as_json:
            out.json({"removed": chosen, **({"purged": report} if purge else {})})
        elif purge:
            for id_ in chosen:
                out.line(f"Purged {id_}")
            out.line(f"{size_text(report.freed_bytes)} of caches and leftovers removed; the databases were rewritten.")
            if report.n_blobs_shared:
                out.note(f"{report.n_blobs_shared:,} caches stay: other collections have equal texts.")
