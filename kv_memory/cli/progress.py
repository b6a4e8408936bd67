"""Progress of long commands: a bar on a terminal, occasional lines elsewhere, JSON events for a job."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from kv_memory.cli.output import Output, factor_text, plain, printable, size_text

if TYPE_CHECKING:
    from kv_memory.evaluate import EvalProgress
    from kv_memory.jobs.events import Event, JobEnded
    from kv_memory.memory import AddProgress
    from kv_memory.store import TransferProgress
    from kv_memory.train import TrainProgress

__all__ = [
    "EvalTracker",
    "JobTracker",
    "Tracker",
    "Tracking",
    "TrainTracker",
    "TransferTracker",
    "count_text",
    "one_line",
    "print_ended",
    "sources_text",
]


def one_line() -> Column:
    """A column of a bar that is never wrapped, whatever the terminal's width."""
    return Column(no_wrap=True)


class Tracking:
    """A context manager that shows the bar. Each long command has a subclass, which it calls with its progress.

    Args:
        out: Output to write notes to.
        columns: Columns after the text and the bar itself.
        text: Text before the bar until the first `show`.
        every_s: Minimum time between lines in seconds, where there is no terminal.
        at_once: Allow the first line immediately.
        estimate_s: Period from which speed and remaining time are estimated, in seconds.
    """

    def __init__(
        self,
        out: Output,
        *columns: ProgressColumn,
        text: str,
        every_s: float,
        at_once: bool = True,
        estimate_s: float = 30.0,
    ) -> None:
        self._out = out
        self._start_s = time.monotonic()
        self._told_s = None if at_once else self._start_s
        self._every_s = every_s
        self._bar: Progress | None = None
        if out.notes.is_terminal and not out.as_json:
            self._bar = Progress(
                TextColumn("{task.fields[text]}", markup=False, table_column=one_line()),
                BarColumn(bar_width=None),  # fills the rest of the line
                *columns,
                console=out.notes,
                transient=True,
                expand=True,
                speed_estimate_period=estimate_s,
            )
            self._task = self._bar.add_task("", total=None, text=text)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since this tracker was created."""
        return time.monotonic() - self._start_s

    def show(self, text: str, n_done: float, n_total: float | None) -> bool:
        """Update the bar; False if there is no bar, and a line may be written instead."""
        if self._bar is not None:
            self._bar.update(self._task, total=n_total, completed=n_done, text=text)
        return self._bar is not None

    def restart(self, text: str) -> None:
        """Begin another step: reset the bar and its speed."""
        if self._bar is not None:
            self._bar.reset(self._task, total=None, text=text)

    def is_time(self, every_s: float | None = None) -> bool:
        """Whether a line is due; if so, the next one is due after `every_s` seconds."""
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < (self._every_s if every_s is None else every_s):
            return False
        self._told_s = now_s
        return True


_NAME_WIDTH = 24


class _TokensColumn(ProgressColumn):
    """A column with the tokens done, all tokens, and tokens per second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        if task.total is None:
            return Text("")
        speed = f", {task.speed:,.0f} tokens/s" if task.speed else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} tokens{speed}")


class Tracker(Tracking):
    """Call it with every `AddProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(
            out,
            _TokensColumn(table_column=one_line()),
            TimeRemainingColumn(compact=True, table_column=one_line()),
            text="compressing",
            every_s=5.0,
            estimate_s=60.0,  # long, because passages differ in length, and the machine may have other work
        )

    def __call__(self, progress: AddProgress) -> None:
        """Show the progress."""
        name = printable(progress.document_id)
        short = name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"
        if self.show(short, progress.n_tokens, progress.n_tokens_total) or not self.is_time():
            return
        speed = progress.n_tokens / max(self.elapsed_s, 1e-3)
        left_s = (progress.n_tokens_total - progress.n_tokens) / max(speed, 1e-3)
        self._out.note(
            f"{progress.n_tokens:,}/{progress.n_tokens_total:,} tokens, {speed:,.0f} tokens/s, {left_s:,.0f} s left, "
            f"document {progress.n_documents + 1} of {progress.n_documents_total}: {name}"
        )


class EvalTracker(Tracking):
    """Call it with every `EvalProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(
            out,
            MofNCompleteColumn(table_column=one_line()),
            TimeRemainingColumn(compact=True, table_column=one_line()),
            text="evaluating",
            every_s=10.0,
            estimate_s=300.0,  # long, because methods differ in speed
        )

    def __call__(self, progress: EvalProgress) -> None:
        """Show the progress."""
        name = progress.method
        if progress.keep_ratio is not None:
            name += f" at {progress.keep_ratio:.3g}"
        if self.show(name, progress.n_done, progress.n_total) or not self.is_time():
            return
        line = f"{progress.n_done:,}/{progress.n_total:,} done, {name}, {printable(progress.document_id)}"
        if (measured := progress.n_measured) > 0:
            left_s = self.elapsed_s / measured * (progress.n_total - progress.n_done)
            line += f", {left_s:,.0f} s left"
        self._out.note(line)


_SMOOTH = 0.95  # weight of the past in the loss shown, since the loss of a single step is noisy


class TrainTracker(Tracking):
    """Call it with every `TrainProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(
            out,
            MofNCompleteColumn(table_column=one_line()),
            TimeRemainingColumn(compact=True, table_column=one_line()),
            text="preparing",
            every_s=30.0,
            at_once=False,
            estimate_s=300.0,  # long, because documents differ in length
        )
        self._first: TrainProgress | None = None
        self._loss: tuple[str, float] = "", 0.0

    def questions(self, n_done: int, n_total: int) -> None:
        """Show the number of passages that questions were written about."""
        self._tell("writing questions", n_done, n_total, f"questions about {n_done:,} of {n_total:,} passages")

    def __call__(self, progress: TrainProgress) -> None:
        """Show the progress."""
        stage, loss = self._loss
        loss = _SMOOTH * loss + (1 - _SMOOTH) * progress.loss if stage == progress.stage else progress.loss
        self._loss = progress.stage, loss
        self._first = self._first or progress
        per_step_s = (progress.elapsed_s - self._first.elapsed_s) / max(progress.step - self._first.step, 1)
        left_s = per_step_s * (progress.n_steps - progress.step)
        line = (
            f"step {progress.step:,} of {progress.n_steps:,}, {progress.stage}, loss {loss:.3f}, {left_s:,.0f} s left"
        )
        self._tell(f"{progress.stage}, loss {loss:.3f}", progress.step, progress.n_steps, line)

    def _tell(self, text: str, n_done: int, n_total: int, line: str) -> None:
        if not self.show(text, n_done, n_total) and (self.is_time() or n_done == n_total):
            self._out.note(line)


_STEPS = {"copy": "copying", "pack": "packing", "unpack": "unpacking", "verify": "verifying"}


class TransferTracker(Tracking):
    """Call it with every `TransferProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(
            out,
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            text="",
            every_s=5.0,
            at_once=False,  # a transfer of a few seconds needs no line
        )
        self._step = ""

    def __call__(self, progress: TransferProgress) -> None:
        """Show the progress."""
        total = progress.size_bytes_total or None
        step = _STEPS[progress.step]
        if step != self._step:
            self._step = step
            self.restart(step)
        if self.show(step, progress.size_bytes, total) or not self.is_time():
            return
        of_all = f" of {size_text(total)}" if total else ""
        self._out.note(f"{step}: {size_text(progress.size_bytes)}{of_all}, {progress.n_documents:,} documents")


_SHOWN = 5  # maximum number of sources shown
_JSON_EVERY_S = 1.0


class JobTracker(Tracking):
    """Call it with every event; with `as_json`, events are printed as lines on stdout."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, text="", every_s=_JSON_EVERY_S if out.as_json else 5.0)
        self._told = ""

    def __call__(self, event: Event) -> None:
        """Show the event."""
        fields: dict[str, Any] = plain(event)
        is_progress = event.kind == "progress"
        if self._out.as_json:
            if not is_progress or self.is_time():
                print(json.dumps({"event": event.kind, **fields}, ensure_ascii=False), flush=True)
            return
        if event.kind == "started":
            verb = "resumed" if fields["resumed"] else "started"
            self._out.note(f"Job {event.job} {verb}: {sources_text(fields['sources'])}.")
        elif event.kind == "failed":
            error = fields["error"]
            self._out.note(f"Failed: {fields['document_id']}: {error['what']}", style="yellow")
        elif event.kind == "worker_died":
            self._out.note(f"A worker died ({fields['reason']}); another one replaces it.", style="yellow")
        elif is_progress:
            # Without a total the bar only pulses, until a worker has started a document.
            said, total = _said(fields), None if _is_starting(fields) else fields["total"]
            if self.show(said, fields["done"] + fields["failed"], total):
                return
            if said != self._told and self.is_time():
                self._told = said
                self._out.note(said)


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
        parts.append(f"{_time_text(fields['left_s'])} left")
    if fields["failed"]:
        parts.append(f"{fields['failed']:,} failed")
    return ", ".join(parts)


def count_text(n: int, noun: str, *, more: str = "") -> str:
    """A number of things, e.g. `1 document`, `12 documents`; `more` follows the number, e.g. `+` if it may grow."""
    return f"{n:,}{more} {noun if n == 1 and not more else f'{noun}s'}"


def _time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
    rows.append(("Time", _time_text(ended.elapsed_s)))
    out.table(("", ""), rows)
