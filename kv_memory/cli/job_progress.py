"""What a running job shows: how far it is, or for machines JSON; and its summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kv_memory.cli.output import Output, factor_text, plain, size_text
from kv_memory.cli.tracking import Tracking

if TYPE_CHECKING:
    from kv_memory.jobs.events import Event, JobEnded

__all__ = ["JobTracker", "count_text", "print_ended", "sources_text"]

_SHOWN = 5  # sources
_JSON_EVERY_S = 1.0


class JobTracker(Tracking):
    """Call it with every event; with `as_json`, events are lines of standard output."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, text="", every_s=_JSON_EVERY_S if out.as_json else 5.0)
        self._told = ""

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        fields: dict[str, Any] = plain(event)
        is_progress = event.kind == "progress"
        if self._out.as_json:
            if not is_progress or self.is_time():
                print(json.dumps({"event": event.kind, **fields}, ensure_ascii=False), flush=True)
            return
        if event.kind == "started":
            verb = "goes on with" if fields["resumed"] else "reads"
            self._out.note(f"Job {event.job} {verb} {sources_text(fields['sources'])}.")
        elif event.kind == "failed":
            error = fields["error"]
            self._out.note(f"Failed: {fields['document_id']}: {error['what']}", style="yellow")
        elif event.kind == "worker_died":
            self._out.note(f"A worker died ({fields['reason']}); another one takes its place.", style="yellow")
        elif is_progress:
            # Without a total the bar only swings, until it is worth to look at.
            said, total = _said(fields), None if _is_starting(fields) else fields["total"]
            if self.show(said, fields["done"] + fields["failed"], total):
                return
            if said != self._told and self.is_time():
                self._told = said
                self._out.note(said)


def sources_text(names: Sequence[str]) -> str:
    """The sources of a job for people: a pattern may stand for hundreds of files."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _is_starting(fields: dict[str, Any]) -> bool:
    """Whether no worker has come to a document yet, of those that are left."""
    left = fields["total"] - fields["done"] - fields["failed"]
    return not fields["in_hand"] and not fields["documents_per_s"] and (left > 0 or not fields["total"])


def _said(fields: dict[str, Any]) -> str:
    """One line: `120/1,000 documents, 3.1/s, 1,240 tokens/s, 4 min 44 s left, 2 failed`."""
    more = "" if fields["discovered"] else "+"
    if not fields["total"]:
        return "Nothing to compress" if fields["discovered"] else "Looking for documents"
    if _is_starting(fields):
        left = fields["total"] - fields["done"] - fields["failed"]
        return f"{count_text(left, 'document', more=more)} to do; the model is being loaded"
    parts = [f"{fields['done'] + fields['failed']:,}/{fields['total']:,}{more} documents"]
    if fields["documents_per_s"]:
        parts.append(f"{fields['documents_per_s']:,.1f}/s")
    if fields["tokens_per_s"]:
        parts.append(f"{fields['tokens_per_s']:,.0f} tokens/s")
    if fields["left_s"]:
        parts.append(f"{_time_text(fields['left_s'])} left")
    if fields["failed"]:
        parts.append(f"{fields['failed']:,} failed")
    return ", ".join(parts)


def count_text(n: int, noun: str, *, more: str = "") -> str:
    """A number of things, e.g. `1 document`, `12 documents`; `more` stands behind a number that may grow."""
    return f"{n:,}{more} {noun if n == 1 and not more else f'{noun}s'}"


def _time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def print_ended(out: Output, ended: JobEnded) -> None:
    """The summary of a job that has ended; as JSON it was the last event already."""
    if out.as_json:
        return
    counts = [f"{ended.added:,} added, {ended.replaced:,} replaced, {ended.unchanged:,} unchanged"]
    counts += [f"{ended.deleted:,} deleted"] if ended.deleted else []
    counts += [f"{ended.failed:,} failed"]
    counts += [f"{ended.cancelled:,} cancelled"] if ended.cancelled else []
    rows = [("Job", f"{ended.job}, {ended.state}"), ("Documents", ", ".join(counts))]
    if ended.n_passages:
        rows += [
            ("Tokens", f"{ended.n_tokens:,} in {count_text(ended.n_passages, 'passage')}"),
            ("Full KV", size_text(ended.full_kv_bytes)),
            ("Distilled", f"{size_text(ended.cache_bytes)}, {factor_text(ended.full_kv_bytes, ended.cache_bytes)}"),
        ]
    rows.append(("Time", _time_text(ended.elapsed_s)))
    out.table(("", ""), rows)
