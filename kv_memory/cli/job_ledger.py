"""`kv-memory job list`, `show` and `cancel`: commands on the ledger, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Place, command
from kv_memory.cli.output import Name, Output, plain, size_rows
from kv_memory.cli.progress import count_text, sources_text
from kv_memory.settings import KEEP_NAMES

if TYPE_CHECKING:
    from kv_memory.jobs import Counts, Job

_SHOWN = 20


@command()
def list_jobs(*, place: Place, out: Output) -> Any:
    """List the jobs of the collection, the newest first.

    A job is interrupted if no process runs it any more; `kv-memory job resume` resumes it.
    """
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        found = [(job, ledger.counts(job)) for job in ledger.jobs()]
        rows = [
            (
                Name(job.name),
                job.state,
                f"{counts.done:,}",
                f"{counts.open:,}{'' if job.discovered else '+'}",
                f"{counts.failed:,}",
                f"{job.created_at:%Y-%m-%d %H:%M}",
                sources_text(_names(job)),
            )
            for job, counts in found
        ]
        if rows:
            columns = ("Job", "State", "Done", "Left", "Failed", "Started (UTC)", "Sources")
            out.table(columns, rows, right=("Done", "Left", "Failed"))
        else:
            out.line("No jobs. `kv-memory job run SOURCE...` starts one.")
        return {"jobs": [_plain(job, counts) for job, counts in found]}


@command()
def show_job(name: str, *, failed: bool = False, place: Place, out: Output) -> Any:
    """Show the progress of a job, its failed documents with their errors, and what was lost of others.

    Options:
        name (NAME): Name of the job; `kv-memory job list` shows all names.
        failed: List every failed document and every note, not only the first 20.
    """
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        job = ledger.job(name)
        counts = ledger.counts(job)
        broken = ledger.failed(job, limit=None if failed or out.as_json else _SHOWN)
        noted = ledger.noted(job, limit=None if failed or out.as_json else _SHOWN)
        memory = job.settings.memory
        rows = [
            ("Job", f"{job.name}, {job.state}"),
            ("Sources", sources_text(_names(job))),
            ("Model", f"{memory.get('model')}, {_kept_text(memory)}"),
            (
                "Documents",
                f"{counts.done:,} done, {counts.running:,} in progress, {counts.pending:,}"
                f"{'' if job.discovered else '+'} to do, {counts.failed:,} failed, {counts.cancelled:,} cancelled",
            ),
        ]
        if counts.n_passages:
            rows += [("Tokens", f"{counts.n_tokens:,} in {count_text(counts.n_passages, 'passage')}")]
            rows += size_rows(counts.full_kv_bytes, counts.cache_bytes)
        rows.append(("Started", f"{job.created_at:%Y-%m-%d %H:%M:%S} UTC"))
        if job.finished_at is not None:
            rows.append(("Ended", f"{job.finished_at:%Y-%m-%d %H:%M:%S} UTC"))
        if job.n_unchanged or job.n_deleted:
            rows.append(("Sync", f"{job.n_unchanged:,} unchanged, {job.n_deleted:,} deleted"))
        out.table(("", ""), rows)
        for entry in broken:
            where = entry.error.get("where")
            told = f" [{where}]" if where and where != entry.document_id else ""
            out.line(f"Failed: {entry.document_id}: {entry.error.get('what')}{told}", style="yellow")
            if entry.error.get("next_step"):
                out.line(f"  {entry.error['next_step']}")
        if len(broken) < counts.failed:
            out.line(f"... and {counts.failed - len(broken):,} more; --failed lists them all.")
        for document in noted:
            for note in document.notes:
                out.line(f"Note: {note} [{document.document_id}]", style="yellow")
        if len(noted) < counts.noted:
            out.line(f"... and notes on {counts.noted - len(noted):,} more documents; --failed lists them all.")
        if job.state == "interrupted":
            out.line(f"`kv-memory job resume {job.name}` resumes it.")
        elif job.state == "done" and broken:
            out.line(f"`kv-memory job resume {job.name} --retry-failed` retries the failed documents.")
        return {**_plain(job, counts), "failed_documents": broken, "noted_documents": noted, "settings": job.settings}


@command()
def cancel(name: str, *, place: Place, out: Output) -> Any:
    """Cancel a job permanently. Documents in progress are finished, and completed ones stay.

    Options:
        name (NAME): Name of the job; `kv-memory job list` shows all names.
    """
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        job = ledger.job(name)
        n = ledger.cancel(job)
        out.line(f"Cancelled {job.name}; {count_text(n, 'document')} left out.")
        return {"job": job.name, "cancelled": n}


def _names(job: Job) -> list[str]:
    from kv_memory.jobs.sources import name_of

    return [name_of(spec) for spec in job.sources["items"]]


def _plain(job: Job, counts: Counts) -> dict[str, Any]:
    shown = (
        "state",
        "collection",
        "discovered",
        "n_deleted",
        "n_unchanged",
        "fingerprint",
        "created_at",
        "finished_at",
    )
    return {
        **{"job": job.name, "sources": _names(job), **{name: getattr(job, name) for name in shown}},
        **{name: value for name, value in plain(counts).items() if not name.endswith("_bytes") or "_kv" in name},
        **{name: getattr(counts, name) for name in ("cache_bytes", "done", "total")},
    }


def _kept_text(memory: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {memory[name]}" for name in KEEP_NAMES if memory.get(name) is not None)
