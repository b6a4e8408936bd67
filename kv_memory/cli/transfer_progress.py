"""How far an export or import is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kv_memory.cli.output import Output, size_text

if TYPE_CHECKING:
    from kv_memory.store import TransferProgress

__all__ = ["TransferTracker"]

_EVERY_S = 5.0
_STEPS = {"export": "exporting", "verify": "verifying", "import": "importing"}


class TransferTracker:
    """Call it with every `TransferProgress`; use it as a context manager.

    Args:
        out: Whose notes it writes to.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._told_s = time.monotonic()  # what is done within seconds needs no line
        self._step = ""
        self._bar: Progress | None = None
        if out.notes.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[step]}", markup=False),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=out.notes,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=None, step="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: TransferProgress) -> None:
        """Show how far it is."""
        total = progress.size_bytes_total or None
        if self._bar is not None:
            if progress.step != self._step:
                self._step = progress.step
                self._bar.reset(self._task, total=total, step=_STEPS[progress.step])
            self._bar.update(self._task, total=total, completed=progress.size_bytes)
            return
        now_s = time.monotonic()
        if now_s - self._told_s < _EVERY_S:
            return
        self._told_s = now_s
        of_all = f" of {size_text(total)}" if total else ""
        self._out.note(
            f"{_STEPS[progress.step]}: {size_text(progress.size_bytes)}{of_all}, {progress.n_documents:,} documents"
        )
