"""Files of JSON lines that survive a kill: the log of a run, and the questions about a corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON objects, one a line.

    Args:
        path: Path of the file, created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Append lines; an incomplete last line is ended first."""
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            for record in records:
                # NaN is not valid JSON, and the line that reports it should be readable everywhere.
                finite = {name: _finite(value) for name, value in record.items()}
                file.write(json.dumps(finite, ensure_ascii=False).encode() + b"\n")

    def records(self) -> list[dict[str, Any]]:
        """All complete lines; a line that was cut off by a kill is skipped."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # of JSON, or of UTF-8
                continue
            if isinstance(record, dict):
                found.append(record)
        return found

    def truncate(self, step: int) -> None:
        """Drop the lines after a `step`, and those without one, so that a run resumed there logs no step twice."""
        kept = [record for record in self.records() if isinstance(record.get("step"), int) and record["step"] <= step]
        scratch = JsonLines(self._path.with_name(self._path.name + ".tmp"))
        scratch._path.write_bytes(b"")
        scratch.append(*kept)
        os.replace(scratch._path, self._path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
