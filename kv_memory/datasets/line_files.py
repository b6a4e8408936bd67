"""JSON and JSON lines, plain or gzipped; every kind of broken file raises a DatasetError."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from kv_memory.datasets.on_error import Faults
from kv_memory.errors import DatasetError

__all__ = ["READ_ERRORS", "bare_name", "json_file", "json_lines", "unreadable"]

# A truncated gzip file raises an EOFError, a damaged one a zlib.error or an OSError.
READ_ERRORS = (OSError, EOFError, zlib.error)

# Longest first, so that a stem does not keep half a suffix.
_SUFFIXES = (".jsonl.gz", ".json.gz", ".tar.gz", ".jsonl", ".json", ".tgz", ".tar", ".md", ".txt")


def bare_name(path: Path) -> str:
    """The name of a folder, or of a file without a known suffix: `nats_docs.tar.gz` becomes `nats_docs`."""
    name = path.resolve().name or str(path)  # resolve(): `.` and `docs/..` have no name of their own
    suffix = next((s for s in _SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")
    return name[: len(name) - len(suffix)]


def json_lines(path: Path, faults: Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file, each with `file, line n`; blank lines are counted but yield nothing.

    Raises:
        BrokenLineError: A line is not a JSON object in UTF-8, and `faults` raises.
        DatasetError: The file cannot be read, or its compressed data are truncated or damaged. This is raised in both
            modes, since nothing after that place can be read.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not raw.strip():
                    continue
                where = f"{path}, line {number}"
                record = None
                with faults.at(where):
                    record = _object(raw)
                if record is not None:
                    yield where, record
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def json_file(path: Path) -> Any:
    """Load the one JSON value of a file.

    Raises:
        DatasetError: The file cannot be read, or is not JSON.
    """
    try:
        with _opened(path) as file:
            return json.loads(file.read().removeprefix(codecs.BOM_UTF8))
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"not JSON: {error}", where=str(path), next_step="If it has one object per line, rename it to `.jsonl`."
        ) from error


def unreadable(path: Path, error: Exception) -> DatasetError:
    """The error for a file that the system or the decompressor cannot read."""
    reason = getattr(error, "strerror", None) or error or type(error).__name__
    return DatasetError(
        f"cannot be read: {reason}", where=str(path), next_step="Check the path, or get the file again."
    )


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DatasetError(f"not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise DatasetError(f"expected a JSON object, got {type(value).__name__}")
    return value
