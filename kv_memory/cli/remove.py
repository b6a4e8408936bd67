"""`kv-memory remove`: documents out of the store."""

from __future__ import annotations

from typing import Annotated

import typer

from kv_memory.cli.naming import find_document_id
from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import reporting

__all__ = ["remove"]


def remove(
    documents: Annotated[
        list[str], typer.Argument(metavar="ID", help="Ids, paths or names of files, or beginnings of ids.")
    ],
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Delete documents with their passages and distilled caches.

    Nothing is deleted unless every name means exactly one document. The files they came from are not touched.
    """
    with reporting(as_json=as_json) as out:
        with open_store(out, store, collection) as opened:
            ids = [summary.id for summary in opened.documents()]
            chosen = list(dict.fromkeys(find_document_id(name, ids) for name in documents))
            out.stopped = "What was deleted stays deleted; run the same command for the rest."
            for id_ in chosen:
                opened.delete_document(id_)
                if not as_json:
                    out.line(f"Removed {id_}")
        if as_json:
            out.json({"removed": chosen})
