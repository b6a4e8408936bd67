"""How far training is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from kv_memory.cli.output import Output
from kv_memory.cli.tracking import Tracking, one_line

if TYPE_CHECKING:
    from kv_memory.train import TrainProgress

__all__ = ["TrainTracker"]

_SMOOTH = 0.95  # of the loss that is shown: that of a single step says little


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
            estimate_s=300.0,  # documents differ in length
        )
        self._first: TrainProgress | None = None
        self._loss: tuple[str, float] = "", 0.0

    def questions(self, n_done: int, n_total: int) -> None:
        """Show how many passages questions were written about."""
        self._tell("writing questions", n_done, n_total, f"questions about {n_done:,} of {n_total:,} passages")

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
        self._tell(f"{progress.stage}, loss {loss:.3f}", progress.step, progress.n_steps, line)

    def _tell(self, text: str, n_done: int, n_total: int, line: str) -> None:
        if not self.show(text, n_done, n_total) and (self.is_time() or n_done == n_total):
            self._out.note(line)
