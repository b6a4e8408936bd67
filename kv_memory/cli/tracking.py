"""How far something long is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Column

from kv_memory.cli.output import Output

__all__ = ["Tracking", "one_line"]


def one_line() -> Column:
    """For the columns of a bar: never broken, whatever the terminal's width."""
    return Column(no_wrap=True)


class Tracking:
    """A context manager, in which the bar is there. Each long command has a subclass that it calls with what happened.

    Args:
        out: Whose notes it writes to.
        columns: Of the bar, behind a text and the bar itself.
        text: What stands before the bar until the first `show`.
        every_s: At least so long from line to line, where there is no terminal, in seconds.
        at_once: The first line need not wait.
        estimate_s: What speed and time left are reckoned from, in seconds.
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
                BarColumn(bar_width=None),  # what is left of the line
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
        """Seconds since it was made."""
        return time.monotonic() - self._start_s

    def show(self, text: str, n_done: float, n_total: float | None) -> bool:
        """Move the bar; False where there is none, and a line may be written."""
        if self._bar is not None:
            self._bar.update(self._task, total=n_total, completed=n_done, text=text)
        return self._bar is not None

    def restart(self, text: str) -> None:
        """Begin another step: the bar is empty again, and its speed unknown."""
        if self._bar is not None:
            self._bar.reset(self._task, total=None, text=text)

    def is_time(self, every_s: float | None = None) -> bool:
        """Whether a line is due; if so, the next one is so many seconds away."""
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < (self._every_s if every_s is None else every_s):
            return False
        self._told_s = now_s
        return True
