"""Handling of broken records: raise an error, or skip the record and report it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from kv_memory.errors import BrokenLineError, ConfigError, DatasetError

__all__ = ["Faults", "OnError"]

OnError = Literal["raise", "skip"]


@dataclass(kw_only=True)
class Faults:
    """Decides between raising and skipping, and counts what was skipped.

    Attributes:
        on_error: Mode, `raise` or `skip`.
        on_skip: Callback for the message of each skipped fault.
        n_skipped: Number of faults skipped so far.
    """

    on_error: OnError
    on_skip: Callable[[str], None] | None = None
    n_skipped: int = field(default=0, init=False)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Leave the block at a ConfigError or DatasetError, and report it as a BrokenLineError at this place.

        Blocks may be nested: a fault is reported once, by the innermost.

        Raises:
            BrokenLineError: Such an error occurred, and `on_error` is `raise`.
        """
        try:
            yield
        except BrokenLineError:
            raise
        except (ConfigError, DatasetError) as error:
            step = "Fix or remove it, or skip such records with `on_error='skip'`."
            broken = BrokenLineError(error.what, where=where, next_step=error.next_step or step)
            broken.__cause__ = error
            self.report(broken)

    def report(self, error: DatasetError) -> None:
        """Raise the error, or count it and pass its message on."""
        if self.on_error == "raise":
            raise error
        self.n_skipped += 1
        if self.on_skip is not None:
            self.on_skip(str(error))
