"""Files of JSON lines that survive a kill: the log of a run, and the questions about a corpus."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON objects, one a line; it is created with the first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Append lines; an incomplete last line is ended first."""
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(b"".join(map(_line, records)))

    def records(self) -> list[dict[str, Any]]:
        """All complete lines; a line that was cut off by a kill is skipped."""
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else []
        found = []
        for line in lines:
            with suppress(ValueError):  # of JSON, or of UTF-8
                found.append(json.loads(line))
        return [record for record in found if isinstance(record, dict)]

    def truncate(self, step: int) -> None:
        """Drop the lines after a `step`, and those without one, so that a run resumed there logs no step twice."""
        kept = [record for record in self.records() if record.get("step", math.inf) <= step]
        scratch = self._path.with_name(self._path.name + ".tmp")
        scratch.write_bytes(b"".join(map(_line, kept)))
        os.replace(scratch, self._path)


def _line(record: Mapping[str, Any]) -> bytes:
    # NaN is not valid JSON, and the line that reports it should be readable everywhere.
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False).encode() + b"\n"
