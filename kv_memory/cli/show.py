"""`kv-memory show`: one document with its passages and caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kv_memory.cli.naming import find_document_id
from kv_memory.cli.opening import open_store
from kv_memory.cli.options import DEFAULT_COLLECTION, DEFAULT_STORE, CollectionOption, JsonOption, StoreOption
from kv_memory.cli.output import Output, plain, reporting, size_text

if TYPE_CHECKING:
    from kv_memory.store import CacheInfo, DocumentRecord

__all__ = ["show"]

_BEGINNING = 60


def show(
    document: Annotated[
        str, typer.Argument(metavar="ID", help="An id, the path or name of a file, or the beginning of an id.")
    ],
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Show a document with its passages and distilled caches."""
    with reporting(as_json=as_json) as out:
        with open_store(out, store, collection) as opened:
            id_ = find_document_id(document, [summary.id for summary in opened.documents()])
            record, caches = opened.document(id_), opened.caches(id_)
        if as_json:
            shown = {**plain(record), "n_tokens": record.n_tokens}
            for passage in shown["passages"]:
                del passage["terms"]  # hashes of words, for retrieval, which would fill pages
            out.json({"document": shown, "caches": caches})
        else:
            _print(out, record, caches)


def _print(out: Output, record: DocumentRecord, caches: list[CacheInfo]) -> None:
    facts: list[tuple[str, object]] = [("Document", record.id), ("Source", record.source_uri or "-")]
    facts += [("Stored", f"{record.updated_at:%Y-%m-%d %H:%M} UTC" if record.updated_at else "-")]
    facts += [(str(key), value) for key, value in record.metadata.items()]
    out.table(("", ""), facts)
    out.line()
    rows = []
    for ordinal, passage in enumerate(record.passages):
        rows.append((ordinal, f"{passage.n_tokens:,}", _beginning(passage.text)))
    out.table(("Passage", "Tokens", "Begins with"), rows, right=("Passage", "Tokens"))
    out.line()
    if not caches:
        out.note("It has no distilled caches. Make them: kv-memory add --stale")
        return
    ordinals = {passage.text_sha256: ordinal for ordinal, passage in enumerate(record.passages)}
    cells = [
        (
            ordinals[cache.text_sha256],
            f"{cache.keep_ratio:g}",
            f"{cache.n_kept:,} of {cache.n_tokens:,}",
            cache.method,
            cache.dtype,
            size_text(cache.size_bytes),
            "-" if cache.fidelity is None else f"{cache.fidelity:.3f} after {cache.refined_steps} steps",
        )
        for cache in caches
    ]
    columns = ("Passage", "Keep ratio", "Kept", "Method", "Type", "Size", "Held-out KL")
    out.table(columns, cells, right=("Passage", "Keep ratio", "Kept", "Size"))


def _beginning(text: str | None) -> str:
    if text is None:
        return "(its text is not kept)"
    line = " ".join(text[: 2 * _BEGINNING].split())
    return line if len(line) <= _BEGINNING else f"{line[:_BEGINNING]}…"
