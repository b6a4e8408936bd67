"""`list`, `show` and `remove`: commands for the documents of a store, by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Place, command
from kv_memory.cli.output import Name, Output, plain, size_text
from kv_memory.documents.loaders import file_id
from kv_memory.errors import ConfigError, DocumentNotFoundError

if TYPE_CHECKING:
    from kv_memory.store import CacheInfo, DocumentRecord, DocumentSummary

_SHOWN = 8


def find_document_id(given: str, ids: Sequence[str]) -> str:
    """The document id that `given` matches.

    Tried in order: an exact id, the path of a file (its id is the absolute path), the end of a path (a file name, or
    `folder/name`), and the beginning of an id.

    Args:
        given: Name as the user typed it.
        ids: Ids of all documents.

    Raises:
        DocumentNotFoundError: No document matches, or several do; the message lists up to 8 of them.
    """
    for exact in (given, _as_path_id(given)):
        if exact in ids:
            return exact
    found = [id_ for id_ in ids if id_.endswith(f"/{given}")] or [id_ for id_ in ids if given and id_.startswith(given)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DocumentNotFoundError(
            f"no document matches {given!r}", where=given, next_step="`kv-memory list` shows all documents."
        )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise DocumentNotFoundError(
        f"{len(found)} documents match: {', '.join(found[:_SHOWN])}{more}",
        where=given,
        next_step="Pass the whole id, or a longer part of it.",
    )


def _as_path_id(given: str) -> str:
    try:
        return file_id(Path(given).expanduser())
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown user or a NUL: not the path of a file
        return given


@command()
def list_documents(*, place: Place, out: Output) -> Any:
    """List the documents."""
    with place.open_store(out) as opened:
        documents = opened.documents()
    rows = [
        (Name(d.id), f"{d.n_passages:,}", f"{d.n_tokens:,}", _text_of(d), f"{d.updated_at:%Y-%m-%d %H:%M}")
        for d in documents
    ]
    if rows:
        out.table(("Document", "Passages", "Tokens", "Text", "Stored (UTC)"), rows, right=("Passages", "Tokens"))
    else:
        out.note("There are no documents yet. Add some: kv-memory add FILE")
    return {"documents": documents}


def _text_of(document: DocumentSummary) -> str:
    if document.n_texts == document.n_passages:
        return "kept"
    return f"{document.n_texts:,} kept" if document.n_texts else "-"


_BEGINNING = 60


@command()
def show(document: str, *, place: Place, out: Output) -> Any:
    """Show a document with its passages and distilled caches.

    Options:
        document (ID): An id, the path or name of a file, or the beginning of an id.
    """
    with place.open_store(out) as opened:
        id_ = find_document_id(document, [summary.id for summary in opened.documents()])
        record, caches = opened.document(id_), opened.caches(id_)
    _print(out, record, caches)
    shown = {**plain(record), "n_tokens": record.n_tokens}
    for passage in shown["passages"]:
        del passage["terms"], passage["vector"]  # for retrieval; they would fill pages
    return {"document": shown, "caches": caches}


def _print(out: Output, record: DocumentRecord, caches: list[CacheInfo]) -> None:
    facts: list[tuple[str, object]] = [("Document", Name(record.id)), ("Source", Name(record.source_uri or "-"))]
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
        out.note("This document has no distilled caches. Make them: kv-memory add --stale")
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


@command()
def remove(documents: list[str] | None = None, *, purge: bool = False, place: Place, out: Output) -> Any:
    """Delete documents with their passages and distilled caches.

    Nothing is deleted unless every name matches exactly one document. The source files are not touched. --purge does
    not reach backups, the log of a PostgreSQL server, old versions in a bucket, or copies on other machines: run
    kv-memory remove --purge without an ID on each of those machines.

    Options:
        documents (ID): Ids, paths or names of files, or beginnings of ids.
        purge: Erase every byte of them from all files of the store: quarantine, index, free pages and logs of
            databases. Without an ID, erase what was removed earlier.
    """
    if not documents and not purge:
        raise ConfigError("no document was given", where="ID", next_step="`kv-memory list` shows the ids.")
    with place.open_store(out) as opened:
        ids = [summary.id for summary in opened.documents()] if documents else []
        chosen = list(dict.fromkeys(find_document_id(name, ids) for name in documents or ()))
        out.stopped = "What was deleted stays deleted; run the same command for the rest."
        if not purge:
            for id_ in chosen:
                opened.delete_document(id_)
                out.line(f"Removed {id_}")
            return {"removed": chosen}
        out.stopped = "What was deleted stays deleted; finish with `kv-memory remove --purge`, without an ID."
        with out.working("Purging"):
            from kv_memory.jobs.ledger import forget_documents

            forget_documents(opened, chosen)
            report = opened.purge(*chosen)
    for id_ in chosen:
        out.line(f"Purged {id_}")
    out.line(f"{size_text(report.freed_bytes)} of caches and leftovers removed; the databases were rewritten.")
    if report.n_blobs_shared:
        out.note(f"{report.n_blobs_shared:,} caches were kept: other collections have the same texts.")
    return {"removed": chosen, "purged": report}
