"""How far an evaluation is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from kv_memory.cli.output import Output, printable

if TYPE_CHECKING:
    from kv_memory.evaluate import EvalProgress

__all__ = ["EvalTracker"]

_EVERY_S = 10.0


class EvalTracker:
    """Call it with every `EvalProgress`; use it as a context manager.

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
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=one_line),
                TimeRemainingColumn(compact=True, table_column=one_line),
                console=out.notes,
                transient=True,
                expand=True,
                speed_estimate_period=300,  # methods differ in what they take
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

    def __call__(self, progress: EvalProgress) -> None:
        """Show how far it is."""
        name = progress.method
        if progress.keep_ratio is not None:
            name += f" at {progress.keep_ratio:.3g}"
        if self._bar is not None:
            self._bar.update(self._task, total=progress.n_total, completed=progress.n_done, name=name)
            return
        now_s = time.monotonic()
        if self._told_s is not None and now_s - self._told_s < _EVERY_S:
            return
        self._told_s = now_s
        line = f"{progress.n_done:,}/{progress.n_total:,} done, {name}, {printable(progress.document_id)}"
        if (measured := progress.n_measured) > 0:
            left_s = (now_s - self._start_s) / measured * (progress.n_total - progress.n_done)
            line += f", {left_s:,.0f} s left"
        self._out.note(line)
