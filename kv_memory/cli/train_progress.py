"""How far training is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from kv_memory.cli.output import Output

if TYPE_CHECKING:
    from kv_memory.train import TrainProgress

__all__ = ["TrainTracker"]

_EVERY_S = 30.0
_SMOOTH = 0.95  # of the loss that is shown: that of a single step says little


class TrainTracker:
    """Call it with every `TrainProgress`; use it as a context manager.

    Args:
        out: Whose notes it writes to.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._start_s = time.monotonic()
        self._told_s = self._start_s
        self._first: TrainProgress | None = None
        self._loss: tuple[str, float] = "", 0.0
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
                speed_estimate_period=300,  # documents differ in length
            )
            self._task = self._bar.add_task("", total=None, name="preparing")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def questions(self, n_done: int, n_total: int) -> None:
        """Show how many passages questions were written about."""
        self._show("writing questions", n_done, n_total, f"questions about {n_done:,} of {n_total:,} passages")

    def __call__(self, progress: TrainProgress) -> None:
        """Show how far it is."""
        stage, loss = self._loss
        loss = _SMOOTH * loss + (1 - _SMOOTH) * progress.loss if stage == progress.stage else progress.loss
        self._loss = progress.stage, loss
        self._first = self._first or progress
        per_step_s = (progress.elapsed_s - self._first.elapsed_s) / max(progress.step - self._first.step, 1)
        left_s = per_step_s * (progress.n_steps - progress.step)
        line = (
            f"step {progress.step:,} of {progress.n_steps:,}, {progress.stage}, loss {loss:.3f}, {left_s:,.0f} s left"
        )
        self._show(f"{progress.stage}, loss {loss:.3f}", progress.step, progress.n_steps, line)

    def _show(self, name: str, n_done: int, n_total: int, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=n_total, completed=n_done, name=name)
            return
        now_s = time.monotonic()
        if now_s - self._told_s >= _EVERY_S or n_done == n_total:
            self._told_s = now_s
            self._out.note(line)
