"""`kv-memory job list`, `show` and `cancel`: commands on the ledger, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kv_memory.cli.options import Place, command
from kv_memory.cli.output import Output, factor_text, plain, size_text
from kv_memory.cli.progress import count_text, sources_text

if TYPE_CHECKING:
    from kv_memory.jobs import Counts, Job

_SHOWN = 20

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the job; `kv-memory job list` shows all names.")
]


@command()
def list_jobs(*, place: Place, out: Output) -> None:
    """List the jobs of the collection, the newest first.

    A job is interrupted if no process runs it any more; `kv-memory job resume` resumes it.
    """
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        found = [(job, ledger.counts(job)) for job in ledger.jobs()]
        if out.as_json:
            out.json({"jobs": [_plain(job, counts) for job, counts in found]})
            return
        rows = [
            (
                job.name,
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


@command()
def show_job(
    name: NameArgument,
    failed: Annotated[
        bool, typer.Option("--failed", help="List every failed document, not only the first 20.")
    ] = False,
    *,
    place: Place,
    out: Output,
) -> None:
    """Show the progress of a job, and its failed documents with their errors."""
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        job = ledger.job(name)
        counts = ledger.counts(job)
        broken = ledger.failed(job, limit=None if failed or out.as_json else _SHOWN)
        if out.as_json:
            out.json({**_plain(job, counts), "failed_documents": plain(broken), "settings": plain(job.settings)})
            return
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
            smaller = factor_text(counts.full_kv_bytes, counts.cache_bytes)
            rows += [
                ("Tokens", f"{counts.n_tokens:,} in {count_text(counts.n_passages, 'passage')}"),
                ("Distilled", f"{size_text(counts.cache_bytes)}, {smaller}"),
            ]
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
        if job.state == "interrupted":
            out.line(f"`kv-memory job resume {job.name}` resumes it.")
        elif job.state == "done" and broken:
            out.line(f"`kv-memory job resume {job.name} --retry-failed` retries the failed documents.")


@command()
def cancel(name: NameArgument, *, place: Place, out: Output) -> None:
    """Cancel a job permanently. Documents in progress are finished, and completed ones stay."""
    with place.open_store(out) as opened:
        from kv_memory.jobs import Ledger

        ledger = Ledger(opened)
        job = ledger.job(name)
        n = ledger.cancel(job)
        if out.as_json:
            out.json({"job": job.name, "cancelled": n})
        else:
            out.line(f"Cancelled {job.name}; {count_text(n, 'document')} left out.")


def _names(job: Job) -> list[str]:
    from kv_memory.jobs.sources import name_of

    return [name_of(spec) for spec in job.sources["items"]]


def _plain(job: Job, counts: Counts) -> dict[str, Any]:
    return {
        "job": job.name,
        "state": job.state,
        "collection": job.collection,
        "sources": _names(job),
        "discovered": job.discovered,
        **{name: value for name, value in plain(counts).items() if not name.endswith("_bytes") or "_kv" in name},
        "cache_bytes": counts.cache_bytes,
        "done": counts.done,
        "total": counts.total,
        "n_deleted": job.n_deleted,
        "n_unchanged": job.n_unchanged,
        "fingerprint": job.fingerprint,
        "created_at": job.created_at.isoformat(),
        "finished_at": None if job.finished_at is None else job.finished_at.isoformat(),
    }


def _kept_text(memory: Mapping[str, Any]) -> str:
    names = ("keep_ratio", "keep_tokens", "max_bytes")
    return ", ".join(f"{name} {memory[name]}" for name in names if memory.get(name) is not None)
