"""`kv-memory add`: adds documents to the store."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Changes, EncodingOption, Place, command, pairs_of
from kv_memory.cli.output import FAILED, Output, plain, size_rows, size_text
from kv_memory.cli.progress import count_text, track_add
from kv_memory.errors import ConfigError
from kv_memory.settings import KEEP_NAMES

if TYPE_CHECKING:
    from kv_memory.documents import DocumentLike, ReadResult
    from kv_memory.ingest.pipeline import AddPlan, AddReport
    from kv_memory.memory import KVMemory

_SHOWN = 5


@command()
def add(
    paths: list[str] | None = None,
    *,
    id_: str | None = None,
    stale: bool = False,
    changes: Changes,
    encoding: EncodingOption = "utf-8",
    skip_errors: bool = False,
    metadata: list[str] | None = None,
    place: Place,
    out: Output,
) -> Any:
    """Compress documents into distilled caches, and store those.

    Unchanged documents are skipped, and changed ones replaced. After Ctrl-C, the same command resumes where it stopped.

    Options:
        paths (PATH): Files and folders; - reads one text from stdin.
        id_ (ID): Id of the text read from stdin.
        stale: Also compress stored passages that have no cache under these settings.
        skip_errors: Skip what cannot be read, instead of failing before any work.
        metadata (KEY=VALUE): Stored with each document; repeatable.
    """
    if not paths and not stale:
        raise ConfigError("nothing to add", where="PATH", next_step="Name files or folders, or pass --stale.")
    extra = dict(pairs_of(metadata or (), option="--metadata"))
    # Documents are checked before a store is created and a model loaded: a typo should fail at once.
    read = _read(paths or [], id_, extra, encoding, skip_errors) if paths else None
    plans: list[AddPlan] = []
    with place.open_memory(out, create=bool(paths), **changes) as memory:
        n_before = memory.stats().n_caches
        try:
            report = _add(out, memory, read, plans, stale=stale, encoding=encoding)
        except KeyboardInterrupt:
            found = memory.stats()
            passages = count_text(max(0, found.n_caches - n_before), "passage")
            out.stopped = (
                f"{count_text(found.n_documents, 'document')}, and the {passages} compressed so far, are stored; "
                "run the same command to resume."
            )
            raise
        settings = memory.settings
    _print(out, report)
    if report.errors and not (report.added or report.replaced or report.unchanged):
        out.code = FAILED
    factor = report.full_kv_bytes / report.cache_bytes if report.cache_bytes else None
    of_text = report.cache_bytes / report.text_bytes if report.text_bytes else None
    done = {**plain(report), "factor": factor, "bytes_per_text_byte": of_text, "planned": plans}
    return {**done, **{name: getattr(settings, name) for name in KEEP_NAMES}}


def _read(paths: Sequence[str], id_: str | None, extra: dict[str, str], encoding: str, skip_errors: bool) -> ReadResult:
    from kv_memory.documents import read_documents
    from kv_memory.documents.decoding import Decoded, check_encoding, decode_text

    if id_ is not None and "-" not in paths:
        raise ConfigError(
            "--id needs a text from stdin, but `-` is not among the paths", where="--id", next_step="Add `-` as a path."
        )
    sources: list[DocumentLike] = []
    stdin = Decoded("")
    for path in paths:
        if path != "-":
            sources.append(Path(path))
            continue
        stdin = decode_text(sys.stdin.buffer.read(), encoding=check_encoding(encoding), where="stdin")
        sources.append(stdin.text if id_ is None else (id_, stdin.text))
    read = read_documents(sources, encoding=encoding, on_error="skip" if skip_errors else "raise")
    documents = [
        dataclasses.replace(
            document,
            metadata={**document.metadata, **extra},
            notes=stdin.notes if document.text == stdin.text else document.notes,
        )
        for document in read.documents
    ]
    return dataclasses.replace(read, documents=tuple(documents))


def _add(
    out: Output, memory: KVMemory, read: ReadResult | None, plans: list[AddPlan], *, stale: bool, encoding: str
) -> AddReport:
    """Add the documents that were read, then compress stale passages; returns one report of both."""

    def on_plan(plan: AddPlan) -> None:
        plans.append(plan)
        out.note(
            f"{count_text(plan.n_passages, 'passage')} of {count_text(plan.n_documents, 'document')} to compress, "
            f"{plan.n_tokens:,} tokens: about {size_text(plan.cache_bytes)} on disk for "
            f"{size_text(plan.text_bytes)} of text ({plan.cache_bytes / plan.text_bytes:,.0f}x)."
        )

    report: AddReport | None = None
    if read is not None:
        with track_add(out) as tracker:
            pipeline = memory.pipeline(on_plan=on_plan, on_progress=tracker)
            report = pipeline.add(read.documents, errors=read.errors, skipped=read.skipped)
    if not stale and report is not None:
        return report
    with track_add(out) as tracker:
        fresh = memory.pipeline(on_plan=on_plan, on_progress=tracker).refresh(encoding=encoding)
    if report is None:
        return fresh
    names = {field.name for field in dataclasses.fields(report)} - {"fidelity"}
    sums = {name: getattr(report, name) + getattr(fresh, name) for name in names}
    done = {*report.added, *report.replaced}
    sums["replaced"] = report.replaced + [id_ for id_ in fresh.replaced if id_ not in done]
    sums["unchanged"] = [id_ for id_ in fresh.unchanged if id_ not in done]
    return dataclasses.replace(report, fidelity=_mean_fidelity(report, fresh), **sums)


def _mean_fidelity(*reports: AddReport) -> float | None:
    measured = [(report.n_refined, report.fidelity) for report in reports if report.fidelity is not None]
    return sum(n * fidelity for n, fidelity in measured) / sum(n for n, _ in measured) if measured else None


def _print(out: Output, report: AddReport) -> None:
    """Print the documents, tokens and sizes of a report."""
    for error in report.errors[:_SHOWN]:
        out.note(f"Left out: {error.what} [{error.where}]", style="yellow")
    if len(report.errors) > _SHOWN:
        out.note(f"Left out: {len(report.errors) - _SHOWN} more; --json lists them all.", style="yellow")
    for note in report.notes[:_SHOWN]:
        out.note(f"Note: {note}", style="yellow")
    if len(report.notes) > _SHOWN:
        out.note(f"{len(report.notes) - _SHOWN} more notes; --json lists them all.", style="yellow")
    if report.skipped:
        out.note(f"{len(report.skipped)} hidden files or files of unknown type were skipped.")
    counts = (
        f"{len(report.added)} added, {len(report.replaced)} replaced, {len(report.unchanged)} unchanged, "
        f"{len(report.errors)} failed"
    )
    rows = [("Documents", counts)]
    if report.n_passages:
        speed = report.n_tokens / max(report.elapsed_s, 1e-9)
        rows += [("Tokens", f"{report.n_tokens:,} in {report.n_passages:,} passages, {speed:,.0f} tokens/s")]
        rows += size_rows(report.full_kv_bytes, report.cache_bytes)
        rows += [
            ("Text", f"{size_text(report.text_bytes)}; on disk {report.cache_bytes / report.text_bytes:,.0f}x that")
        ]
    if report.fidelity is not None:
        rows.append(("Refined", f"{report.n_refined:,} passages, KL to the full cache {report.fidelity:.3f} nats"))
    out.table(("", ""), rows)
