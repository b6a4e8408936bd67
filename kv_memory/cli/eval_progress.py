"""How far an evaluation is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from kv_memory.cli.output import Output, printable
from kv_memory.cli.tracking import Tracking, one_line

if TYPE_CHECKING:
    from kv_memory.evaluate import EvalProgress

__all__ = ["EvalTracker"]


class EvalTracker(Tracking):
    """Call it with every `EvalProgress`."""

    def __init__(self, out: Output) -> None:
        super().__init__(
            out,
            MofNCompleteColumn(table_column=one_line()),
            TimeRemainingColumn(compact=True, table_column=one_line()),
            text="reading",
            every_s=10.0,
            estimate_s=300.0,  # methods differ in what they take
        )

    def __call__(self, progress: EvalProgress) -> None:
        """Show how far it is."""
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
