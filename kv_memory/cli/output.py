"""The output of a command: results on stdout, for people or as one JSON object; everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from kv_memory.errors import ConfigError, KVMemoryError, interruption_behind

FAILED, USAGE, STOPPED = 1, 2, 130
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PADDING = 2  # between two columns of a table
_UNBOUNDED = 10_000  # width outside of a terminal, so that lines in a file are not folded at 80 columns


def debugging() -> bool:
    """Whether `KV_MEMORY_DEBUG` asks for tracebacks and the messages of libraries."""
    return os.environ.get("KV_MEMORY_DEBUG", "") not in {"", "0"}


def printable(text: str) -> str:
    """Text with control characters replaced by U+FFFD, since a terminal would obey those in documents and answers."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


size_text = decimal  # a size for people, e.g. `94.1 MB`


def time_text(seconds: float) -> str:
    """A duration for people, e.g. `1 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size_rows(full_bytes: int, cache_bytes: int) -> list[tuple[str, str]]:
    """Rows of a table: the size of full caches, and that of distilled ones with the factor between the two."""
    smaller = f", {full_bytes / cache_bytes:.1f}x smaller" if cache_bytes else ""
    return [("Full KV", size_text(full_bytes)), ("Distilled", f"{size_text(cache_bytes)}{smaller}")]


def plain(value: Any) -> Any:
    """A JSON-serialisable form: dataclasses and errors become objects, times ISO 8601 strings, paths strings."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, KVMemoryError):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.isoformat() if isinstance(value, datetime) else str(value)


class Name(str):
    """A table's cell that people copy: an id, a path, a command."""

    __slots__ = ()


class Output:
    """The output streams of a command.

    Args:
        as_json: Print only what the command returns, as JSON; text for people is left out.
        by_line: Print each JSON object on one line, also on a terminal.

    Attributes:
        code: Exit code of the command if it raises nothing.
        stopped: Sentence about its state, for when it is stopped.
        notes: Console of stderr.
    """

    def __init__(self, *, as_json: bool, by_line: bool = False) -> None:
        self.as_json = as_json
        self.code = 0
        self.stopped = "Nothing was changed."
        self._indent = 2 if sys.stdout.isatty() and not by_line else None
        self._out = _console(quiet=as_json)
        self.notes = _console(stderr=True)

    def json(self, value: Any) -> None:
        """Print a JSON object, at once."""
        print(json.dumps(value, ensure_ascii=False, indent=self._indent, default=_plain), flush=True)

    def result(self, value: Any) -> None:
        """End a command: print with `--json` what it returned, a list as one object per line, and exit with `code`."""
        if self.as_json and value is not None:
            for item in value if isinstance(value, list) else [value]:
                self.json(item)
        if self.code:
            raise typer.Exit(self.code)

    def line(self, text: str = "", *, style: str | None = None) -> None:
        """Print a line of the result."""
        self._out.print(Text(printable(text), style=style or ""), soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print a part of a line, and flush."""
        if not self.as_json:
            print(printable(text), end="", flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
        """Print a table of the result; the columns named in `right` are aligned right.

        Words are never broken, and a `Name` is never wrapped. Where the terminal is too narrow for them, it continues
        the line itself: what is copied from there is whole.
        """
        table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold")
        numbers = set(right)
        cells = [[Text(printable(str(cell)), no_wrap=isinstance(cell, Name)) for cell in row] for row in rows]
        lines = [[Text(column) for column in columns], *cells]
        most = self._out.width - _PADDING * (len(columns) - 1) if self._out.is_terminal else None
        widths = _widths([[_extent(cell) for cell in column] for column in zip(*lines, strict=True)], most)
        for column, width in zip(columns, widths, strict=True):
            table.add_column(column, justify="right" if column in numbers else "left", width=width)
        for row in cells:
            table.add_row(*row)
        shown = self._out.options.update(width=sum(widths) + _PADDING * (len(columns) - 1))
        for line in self._out.render_lines(table, shown, new_lines=True):
            if self._out.is_terminal:
                self._out.print(Segments(line), soft_wrap=True, end="")
            else:
                self._out.out("".join(segment.text for segment in line).rstrip())  # no padding in a file

    def note(self, text: str, *, style: str | None = None) -> None:
        """Print a line about the work, not its result."""
        self.notes.print(Text(printable(text), style=style or ""), soft_wrap=True)

    def working(self, text: str) -> AbstractContextManager[Any]:
        """Show on a terminal that something takes a moment."""
        if not self.notes.is_terminal:
            return nullcontext()
        return self.notes.status(Text(printable(text)))

    def error(self, error: Mapping[str, str | None]) -> None:
        """Print an error in the form of `KVMemoryError.to_dict`: what, where and the next step, on a line each."""
        if self.as_json:
            self.json({"error": error})
            return
        text = Text("Error: ", style="bold red")
        text.append(printable(error["what"] or ""), style="not bold default")
        self.notes.print(text, soft_wrap=True)
        for label, name in (("Where", "where"), ("Next step", "next_step")):
            if error.get(name):
                self.note(f"{label}: {error[name]}")


def _extent(cell: Text) -> tuple[int, int]:
    """The smallest and the largest width of a cell."""
    natural = max((cell_len(line) for line in cell.plain.splitlines()), default=0)
    return natural if cell.no_wrap else max(map(cell_len, cell.plain.split()), default=0), natural


def _widths(extents: list[list[tuple[int, int]]], most: int | None) -> list[int]:
    """Widths of columns, from the extents of their cells: as narrow as `most` asks, if words fit."""
    least, widths = ([max(extent[i] for extent in column) for column in extents] for i in (0, 1))
    while most is not None and sum(widths) > most:
        loose = [i for i, width in enumerate(widths) if width > least[i]]
        if not loose:
            break
        widest = max(loose, key=lambda i: widths[i])
        widths[widest] = max(least[widest], widths[widest] - (sum(widths) - most))
    return widths


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    console = Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


@contextmanager
def reporting(*, as_json: bool, by_line: bool = False) -> Iterator[Output]:
    """Run a command: errors are printed and become exit codes.

    All settings of a command come from its options, so a `ConfigError` means wrong usage.
    """
    out = Output(as_json=as_json, by_line=by_line)
    try:
        yield out
        return
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except (KeyboardInterrupt, Exception) as error:
        code = FAILED
        if isinstance(error, KVMemoryError):
            out.error(error.to_dict())
            code = USAGE if isinstance(error, ConfigError) else FAILED
        elif any(isinstance(each, KeyboardInterrupt) for each in (error, interruption_behind(error))):
            code = STOPPED
            if as_json:
                out.error({"error": "KeyboardInterrupt", "what": "stopped", "where": None, "next_step": out.stopped})
            else:
                out.note(f"Stopped. {out.stopped}")
        else:  # a bug, here or in a library: people should still not see a traceback
            step = "This is a bug. Please report it with the output of KV_MEMORY_DEBUG=1."
            what = f"unexpected {type(error).__name__}: {error}"
            out.error({"error": type(error).__name__, "what": what, "where": None, "next_step": step})
        if debugging():
            traceback.print_exc()
    raise typer.Exit(code)
