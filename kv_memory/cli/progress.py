"""How far a long `add` is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from kv_memory.cli.output import Output, printable
from kv_memory.cli.tracking import Tracking, one_line

if TYPE_CHECKING:
    from kv_memory.memory import AddProgress

__all__ = ["Tracker"]

_NAME_WIDTH = 24


class _TokensColumn(ProgressColumn):
    """Tokens done, tokens to do, tokens a second."""

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
            text="reading",
            every_s=5.0,
            estimate_s=60.0,  # passages differ in length, and a machine has other work too
        )

    def __call__(self, progress: AddProgress) -> None:
        """Show how far it is."""
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
