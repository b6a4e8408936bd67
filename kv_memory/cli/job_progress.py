"""What a running job shows: a bar on a terminal, a line every few seconds elsewhere, JSON for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from kv_memory.cli.output import Output, factor_text, plain, size_text

if TYPE_CHECKING:
    from kv_memory.jobs.progress import Event, JobEnded

__all__ = ["JobTracker", "count_text", "print_ended", "sources_text"]

_EVERY_S = 5.0
_SHOWN = 5  # sources
_JSON_EVERY_S = 1.0


class JobTracker:
    """Call it with every event; use it as a context manager.

    Args:
        out: Whose notes it writes to; with `as_json`, events are lines of standard output.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._told_s: float | None = None
        self._told = ""
        self._bar: Bar | None = None
        if out.notes.is_terminal and not out.as_json:
            one_line = Column(no_wrap=True)
            self._bar = Bar(
                BarColumn(bar_width=None),  # what is left of the line
                TextColumn("{task.fields[said]}", markup=False, table_column=one_line),
                console=out.notes,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=None, said="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        fields: dict[str, Any] = plain(event)
        is_progress = event.kind == "progress"
        if self._out.as_json:
            if not is_progress or self._is_time(_JSON_EVERY_S):
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
        elif is_progress and self._bar is not None:
            # Without a total it only swings, until it is worth to look at.
            total = None if _is_starting(fields) else fields["total"]
            done = fields["done"] + fields["failed"]
            self._bar.update(self._task, total=total, completed=done, said=_said(fields))
        elif is_progress and (said := _said(fields)) != self._told and self._is_time(_EVERY_S):
            self._told = said
            self._out.note(said)

    def _is_time(self, every_s: float) -> bool:
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < every_s:
            return False
        self._told_s = now_s
        return True


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
