"""Progress of long commands: a bar on a terminal, occasional lines elsewhere, JSON events for a job."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from kv_memory.cli.output import Output, factor_text, plain, printable, size_text, time_text

if TYPE_CHECKING:
    from kv_memory.evaluate import EvalProgress
    from kv_memory.ingest.pipeline import AddProgress
    from kv_memory.jobs.events import Event, JobEnded
    from kv_memory.store import TransferProgress
    from kv_memory.train import TrainProgress


class _Figures(ProgressColumn):
    """Done, total, and speed in a unit; `bytes` are shown as sizes."""

    def __init__(self, unit: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.speed or (task.completed / task.elapsed if task.elapsed else 0.0)
        if self._unit == "bytes":
            done = size_text(round(task.completed)) + (f"/{size_text(round(task.total))}" if task.total else "")
            return Text(f"{done}, {size_text(round(speed))}/s" if speed else done)
        text = f"{task.completed:,.0f}/{task.total or 0:,.0f} {self._unit}"
        return Text(f"{text}, {speed:,.0f} {self._unit}/s" if speed and self._unit == "tokens" else text)


class Tracker:
    """A bar on a terminal, and a line now and then elsewhere.

    Most long commands have a subclass, which takes the command's progress and says what `show` shows.

    Args:
        out: Output to write notes to.
        unit: Unit of what is counted; without one, text alone is shown.
        every_s: Minimum time between lines in seconds, where there is no terminal.
    """

    def __init__(self, out: Output, *, unit: str = "", every_s: float = 5.0) -> None:
        self._out, self._every_s, self._told_s = out, every_s, -math.inf
        self._figures = _Figures(unit) if unit else None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),  # fills the rest of the line
            *((self._figures, TimeRemainingColumn(compact=True)) if self._figures else ()),
            console=out.notes,
            transient=True,
            expand=True,
            speed_estimate_period=120.0,  # long, because documents and methods differ
            disable=out.as_json or not out.notes.is_terminal,
        )
        self._bar.add_task("", total=None)
        (self._task,) = self._bar.tasks

    def __enter__(self) -> Self:
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def show(self, text: str, n_done: float, n_total: float | None) -> bool:
        """Show the number of things done of all (None if unknown) and what is being done; True if as a line."""
        task = self._task
        self._bar.update(task.id, description=printable(text), completed=n_done, total=n_total)
        if not self._bar.disable or not self.is_time():
            return False
        left = f", {task.time_remaining:,.0f} s left" if self._figures and task.time_remaining else ""
        self._out.note(f"{self._figures.render(task)}, {text}{left}" if self._figures else text)
        return True

    def is_time(self) -> bool:
        """Whether a line is due; if so, the next one is due later."""
        now_s = time.monotonic()
        if now_s - self._told_s < self._every_s:
            return False
        self._told_s = now_s
        return True


_NAME_WIDTH = 24


class AddTracker(Tracker):
    """Call it with every `AddProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, unit="tokens")

    def __call__(self, progress: AddProgress) -> None:
        """Show the progress."""
        name = progress.document_id
        short = name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"
        text = f"document {progress.n_documents + 1} of {progress.n_documents_total}: {short}"
        self.show(text, progress.n_tokens, progress.n_tokens_total)


class EvalTracker(Tracker):
    """Call it with every `EvalProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, unit="done", every_s=10.0)

    def __call__(self, progress: EvalProgress) -> None:
        """Show the progress."""
        at = "" if progress.keep_ratio is None else f" at {progress.keep_ratio:.3g}"
        self.show(f"{progress.method}{at}, {progress.document_id}", progress.n_done, progress.n_total)


_SMOOTH = 0.95  # weight of the past in the loss shown, since the loss of a single step is noisy


class TrainTracker(Tracker):
    """Call it with every `TrainProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, unit="done", every_s=30.0)
        self._loss: tuple[str, float] = "", 0.0

    def questions(self, n_done: int, n_total: int) -> None:
        """Show the number of passages that questions were written about."""
        self.show("writing questions about passages", n_done, n_total)

    def __call__(self, progress: TrainProgress) -> None:
        """Show the progress."""
        stage, loss = self._loss
        loss = _SMOOTH * loss + (1 - _SMOOTH) * progress.loss if stage == progress.stage else progress.loss
        self._loss = progress.stage, loss
        self.show(f"{progress.stage}, loss {loss:.3f}", progress.step, progress.n_steps)


_STEPS = {"copy": "copying", "pack": "packing", "unpack": "unpacking", "verify": "verifying"}


class TransferTracker(Tracker):
    """Call it with every `TransferProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, unit="bytes")
        self._step = ""

    def __call__(self, progress: TransferProgress) -> None:
        """Show the progress."""
        if progress.step != self._step:  # another step has a speed of its own
            self._step = progress.step
            self._bar.reset(self._task.id)
        self.show(
            f"{_STEPS[progress.step]}, {progress.n_documents:,} documents",
            progress.size_bytes,
            progress.size_bytes_total or None,
        )


_SHOWN = 5  # maximum number of sources shown


class JobTracker(Tracker):
    """Call it with every event; with `as_json`, events are printed as lines on stdout."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, every_s=1.0 if out.as_json else 5.0)
        self._told = ""

    def __call__(self, event: Event) -> None:
        """Show the event."""
        fields: dict[str, Any] = plain(event)
        if self._out.as_json:
            if event.kind != "progress" or self.is_time():
                print(json.dumps({"event": event.kind, **fields}, ensure_ascii=False), flush=True)
        elif event.kind == "started":
            verb = "resumed" if fields["resumed"] else "started"
            self._out.note(f"Job {event.job} {verb}: {sources_text(fields['sources'])}.")
        elif event.kind == "failed":
            self._out.note(f"Failed: {fields['document_id']}: {fields['error']['what']}", style="yellow")
        elif event.kind == "worker_died":
            self._out.note(f"A worker died ({fields['reason']}); another one replaces it.", style="yellow")
        elif event.kind == "progress" and ((said := _said(fields)) != self._told or not self._bar.disable):
            # Without a total the bar only pulses, until a worker has started a document.
            total = None if _is_starting(fields) else fields["total"]
            self._told = said if self.show(said, fields["done"] + fields["failed"], total) else self._told


def sources_text(names: Sequence[str]) -> str:
    """The sources of a job for people, shortened because a pattern may stand for hundreds of files."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _is_starting(fields: dict[str, Any]) -> bool:
    """Whether no worker has started a document yet, while there are or may be some to do."""
    left = fields["total"] - fields["done"] - fields["failed"]
    return not fields["in_hand"] and not fields["documents_per_s"] and (left > 0 or not fields["total"])


def _said(fields: dict[str, Any]) -> str:
    """One line, e.g. `120/1,000 documents, 3.1/s, 1,240 tokens/s, 4 min 44 s left, 2 failed`."""
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
        parts.append(f"{time_text(fields['left_s'])} left")
    if fields["failed"]:
        parts.append(f"{fields['failed']:,} failed")
    return ", ".join(parts)


def count_text(n: int, noun: str, *, more: str = "") -> str:
    """A number of things, e.g. `1 document`, `12 documents`; `more` follows the number, e.g. `+` if it may grow."""
    return f"{n:,}{more} {noun if n == 1 and not more else f'{noun}s'}"


def print_ended(out: Output, ended: JobEnded) -> None:
    """Print the summary of a job that has ended; not with `as_json`, where the last event was the summary."""
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
    rows.append(("Time", time_text(ended.elapsed_s)))
    out.table(("", ""), rows)
