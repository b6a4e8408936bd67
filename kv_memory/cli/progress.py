"""Progress of long commands: a bar on a terminal, occasional lines elsewhere, JSON events for a job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column

from kv_memory.cli.output import Output, plain, printable, size_rows, size_text, time_text

if TYPE_CHECKING:
    from kv_memory.evaluate import EvalProgress
    from kv_memory.ingest.pipeline import AddProgress
    from kv_memory.jobs.events import JobEnded
    from kv_memory.jobs.events import Progress as JobProgress
    from kv_memory.store import TransferProgress
    from kv_memory.train import TrainProgress


Shown = tuple[str, float, float | None]  # what is being done, the number of things done, and of all (None if unknown)


class Tracker:
    """A bar on a terminal, and a line now and then elsewhere. Call it with every progress of a command.

    Args:
        out: Output to write notes to.
        describe: Function from a progress to what is shown of it.
        unit: Unit of what is counted; without one, text alone is shown.
        every_s: Minimum time between lines in seconds, where there is no terminal.
    """

    def __init__(
        self, out: Output, describe: Callable[[Any], Shown] | None = None, *, unit: str = "", every_s: float = 5.0
    ) -> None:
        self._out, self._describe, self._unit, self._every_s = out, describe, unit, every_s
        self._told_s, self._told = -math.inf, ""
        no_wrap = Column(no_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=no_wrap),
            BarColumn(bar_width=None),  # fills the rest of the line
            TextColumn("{task.fields[figures]}", markup=False, table_column=no_wrap),
            *((TimeRemainingColumn(compact=True),) if unit else ()),
            console=out.notes,
            transient=True,
            expand=True,
            speed_estimate_period=120.0,  # long, because documents and methods differ
            disable=out.as_json or not out.notes.is_terminal,
        )
        self._bar.add_task("", total=None, figures="")
        (self._task,) = self._bar.tasks

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # it would print an empty line
            self._bar.stop()

    def __call__(self, progress: Any) -> None:
        """Show the progress."""
        assert self._describe is not None
        self.show(*self._describe(progress))

    def show(self, text: str, n_done: float, n_total: float | None) -> None:
        """Show what is being done, and the number of things done of all (None if unknown)."""
        task = self._task
        if n_done < task.completed:  # another step, which has a speed of its own
            self._bar.reset(task.id)
        self._bar.update(task.id, description=printable(text), completed=n_done, total=n_total)
        figures = _figures(task, self._unit)
        self._bar.update(task.id, figures=figures)
        left = f", {task.time_remaining:,.0f} s left" if self._unit and task.time_remaining else ""
        line = f"{figures}, {text}{left}" if figures else text
        if self._bar.disable and line != self._told and self.is_time():
            self._told = line
            self._out.note(line)

    def is_time(self) -> bool:
        """Whether a line is due; if so, the next one is due later."""
        now_s = time.monotonic()
        if now_s - self._told_s < self._every_s:
            return False
        self._told_s = now_s
        return True


def _figures(task: Task, unit: str) -> str:
    """Done, total, and speed in a unit; `bytes` are shown as sizes."""
    speed = task.speed or (task.completed / task.elapsed if task.elapsed else 0.0)
    if unit == "bytes":
        done = size_text(round(task.completed)) + (f"/{size_text(round(task.total))}" if task.total else "")
        return f"{done}, {size_text(round(speed))}/s" if speed else done
    text = f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}" if unit else ""
    return f"{text}, {speed:,.0f} {unit}/s" if speed and unit == "tokens" else text


def track_add(out: Output) -> Tracker:
    """A tracker of `AddProgress`."""

    def describe(progress: AddProgress) -> Shown:
        name, width = progress.document_id, 24
        short = name if len(name) <= width else f"…{name[1 - width :]}"
        text = f"document {progress.n_documents + 1} of {progress.n_documents_total}: {short}"
        return text, progress.n_tokens, progress.n_tokens_total

    return Tracker(out, describe, unit="tokens")


def track_eval(out: Output) -> Tracker:
    """A tracker of `EvalProgress`."""

    def describe(progress: EvalProgress) -> Shown:
        at = "" if progress.keep_ratio is None else f" at {progress.keep_ratio:.3g}"
        return f"{progress.method}{at}, {progress.document_id}", progress.n_done, progress.n_total

    return Tracker(out, describe, unit="done", every_s=10.0)


def track_train(out: Output) -> Tracker:
    """A tracker of `TrainProgress`."""
    smooth = 0.95  # weight of the past in the loss shown, since the loss of a single step is noisy
    losses: dict[str, float] = {}

    def describe(progress: TrainProgress) -> Shown:
        past = losses.get(progress.stage, progress.loss)
        loss = losses[progress.stage] = smooth * past + (1 - smooth) * progress.loss
        return f"{progress.stage}, loss {loss:.3f}", progress.step, progress.n_steps

    return Tracker(out, describe, unit="done", every_s=30.0)


_STEPS = {"copy": "copying", "pack": "packing", "unpack": "unpacking", "verify": "verifying"}


def track_transfer(out: Output) -> Tracker:
    """A tracker of `TransferProgress`."""

    def describe(progress: TransferProgress) -> Shown:
        text = f"{_STEPS[progress.step]}, {progress.n_documents:,} documents"
        return text, progress.size_bytes, progress.size_bytes_total or None

    return Tracker(out, describe, unit="bytes")


_SHOWN = 5  # maximum number of sources shown


class JobTracker(Tracker):
    """Call it with every event; with `as_json`, events are printed as lines on stdout."""

    def __init__(self, out: Output) -> None:
        super().__init__(out, every_s=1.0 if out.as_json else 5.0)

    def __call__(self, event: Any) -> None:
        """Show the event."""
        if self._out.as_json:
            if event.kind != "progress" or self.is_time():
                self._out.json({"event": event.kind, **plain(event)})
        elif event.kind == "started":
            verb = "resumed" if event.resumed else "started"
            self._out.note(f"Job {event.job} {verb}: {sources_text(event.sources)}.")
        elif event.kind == "failed":
            self._out.note(f"Failed: {event.document_id}: {event.error['what']}", style="yellow")
        elif event.kind == "noted":
            for note in event.notes:
                self._out.note(f"Note: {note} [{event.document_id}]", style="yellow")
        elif event.kind == "worker_died":
            self._out.note(f"A worker died ({event.reason}); another one replaces it.", style="yellow")
        elif event.kind == "progress":
            # Without a total the bar only pulses, until a worker has started a document.
            self.show(_said(event), event.done + event.failed, None if _is_starting(event) else event.total)


def sources_text(names: Sequence[str]) -> str:
    """The sources of a job for people, shortened because a pattern may stand for hundreds of files."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _is_starting(at: JobProgress) -> bool:
    """Whether no worker has started a document yet, while there are or may be some to do."""
    return not at.in_hand and not at.documents_per_s and (at.total > at.done + at.failed or not at.total)


def _said(at: JobProgress) -> str:
    """One line, e.g. `120/1,000 documents, 3.1/s, 1,240 tokens/s, 4 min 44 s left, 2 failed`."""
    ended, more = at.done + at.failed, "" if at.discovered else "+"
    if not at.total:
        return "Nothing to compress" if at.discovered else "Looking for documents"
    if _is_starting(at):
        return f"{count_text(at.total - ended, 'document', more=more)} to do; the model is being loaded"
    parts = [f"{ended:,}/{at.total:,}{more} documents"]
    parts += [f"{at.documents_per_s:,.1f}/s"] if at.documents_per_s else []
    parts += [f"{at.tokens_per_s:,.0f} tokens/s"] if at.tokens_per_s else []
    parts += [f"{time_text(at.left_s)} left"] if at.left_s else []
    parts += [f"{at.failed:,} failed"] if at.failed else []
    return ", ".join(parts)


def count_text(n: int, noun: str, *, more: str = "") -> str:
    """A number of things, e.g. `1 document`, `12 documents`; `more` follows the number, e.g. `+` if it may grow."""
    return f"{n:,}{more} {noun if n == 1 and not more else f'{noun}s'}"


def print_ended(out: Output, ended: JobEnded) -> None:
    """Print the summary of a job that has ended."""
    always = {name: getattr(ended, name) for name in ("added", "replaced", "unchanged", "failed")}
    counts = always | {name: n for name in ("deleted", "cancelled") if (n := getattr(ended, name))}
    rows = [
        ("Job", f"{ended.job}, {ended.state}"),
        ("Documents", ", ".join(f"{n:,} {name}" for name, n in counts.items())),
    ]
    if ended.n_passages:
        rows += [("Tokens", f"{ended.n_tokens:,} in {count_text(ended.n_passages, 'passage')}")]
        rows += size_rows(ended.full_kv_bytes, ended.cache_bytes)
    if ended.noted:
        rows.append(("Notes", f"{count_text(ended.noted, 'document')} lost something, e.g. replaced bytes"))
    rows.append(("Time", time_text(ended.elapsed_s)))
    out.table(("", ""), rows)
