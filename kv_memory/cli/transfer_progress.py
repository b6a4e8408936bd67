"""How far an export or import is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from kv_memory.cli.output import Output, size_text
from kv_memory.cli.tracking import Tracking

if TYPE_CHECKING:
    from kv_memory.store import TransferProgress

__all__ = ["TransferTracker"]

_STEPS = {"export": "exporting", "verify": "verifying", "import": "importing"}


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
            at_once=False,  # what is done within seconds needs no line
        )
        self._step = ""

    def __call__(self, progress: TransferProgress) -> None:
        """Show how far it is."""
        total = progress.size_bytes_total or None
        step = _STEPS[progress.step]
        if step != self._step:
            self._step = step
            self.restart(step)
        if self.show(step, progress.size_bytes, total) or not self.is_time():
            return
        of_all = f" of {size_text(total)}" if total else ""
        self._out.note(f"{step}: {size_text(progress.size_bytes)}{of_all}, {progress.n_documents:,} documents")
