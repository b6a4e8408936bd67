"""How far a long `add` is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from kv_memory.cli.output import Output, printable

if TYPE_CHECKING:
    from kv_memory.memory import AddProgress

__all__ = ["Tracker"]

_EVERY_S = 5.0
_NAME_WIDTH = 24


class _TokensColumn(ProgressColumn):
    """Tokens done, tokens to do, tokens a second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        if task.total is None:
            return Text("")
        speed = f", {task.speed:,.0f} tokens/s" if task.speed else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} tokens{speed}")


class Tracker:
    """Call it with every `AddProgress`; use it as a context manager.

    Args:
        out: Whose notes it writes to.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._start_s = time.monotonic()
        self._told_s: float | None = None
        self._bar: Progress | None = None
        if out.notes.is_terminal:
            one_line = Column(no_wrap=True)
            self._bar = Progress(
                TextColumn("{task.fields[name]}", markup=False, table_column=one_line),
                BarColumn(bar_width=None),  # what is left of the line
                _TokensColumn(table_column=one_line),
                TimeRemainingColumn(compact=True, table_column=one_line),
                console=out.notes,
                transient=True,
                expand=True,
                speed_estimate_period=60,  # passages differ in length, and a machine has other work too
            )
            self._task = self._bar.add_task("", total=None, name="reading")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: AddProgress) -> None:
        """Show how far it is."""
        name = printable(progress.document_id)
        if self._bar is not None:
            short = name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"
            self._bar.update(self._task, total=progress.n_tokens_total, completed=progress.n_tokens, name=short)
            return
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < _EVERY_S:
            return
        self._told_s = now_s
        speed = progress.n_tokens / max(now_s - self._start_s, 1e-3)
        left_s = (progress.n_tokens_total - progress.n_tokens) / max(speed, 1e-3)
        self._out.note(
            f"{progress.n_tokens:,}/{progress.n_tokens_total:,} tokens, {speed:,.0f} tokens/s, {left_s:,.0f} s left, "
            f"document {progress.n_documents + 1} of {progress.n_documents_total}: {name}"
        )
