"""Records of a set: JSON and JSON lines, plain or gzipped, their fields, and what happens to broken ones."""

from __future__ import annotations

import codecs
import gzip
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from kv_memory.datasets.example import check_text
from kv_memory.documents.loaders import OnError
from kv_memory.errors import BrokenLineError, ConfigError, DatasetError

Record = tuple[str, Any]
"""The place of a record, for errors, and the record itself."""

# Longest first, so that a stem does not keep half a suffix.
_SUFFIXES = (".jsonl.gz", ".json.gz", ".tar.gz", ".jsonl", ".json", ".tgz", ".tar", ".md", ".txt")


@dataclass(kw_only=True)
class Faults:
    """Decides between raising and skipping faults; counts those skipped, and passes their messages to `on_skip`."""

    on_error: OnError
    on_skip: Callable[[str], None] | None = None
    n_skipped: int = field(default=0, init=False)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Leave the block at a ConfigError or DatasetError, and report it as a BrokenLineError at this place.

        Blocks may be nested: a fault is reported once, by the innermost.
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

    def parts(self, where: str, record: Any, name: str, noun: str) -> Iterator[Record]:
        """Yield the items of the list `name` of a record with their places; a missing list is the record's fault."""
        with self.at(where):
            for number, item in enumerate(items_of(record, name), start=1):
                yield f"{where}, {noun} {number}", item

    def report(self, error: DatasetError) -> None:
        """Raise the error, or count it and pass its message on."""
        if self.on_error == "raise":
            raise error
        self.n_skipped += 1
        if self.on_skip is not None:
            self.on_skip(str(error))


def bare_name(path: Path) -> str:
    """The name of a folder, or of a file without a known suffix: `nats_docs.tar.gz` becomes `nats_docs`."""
    name = path.resolve().name or str(path)  # resolve(): `.` and `docs/..` have no name of their own
    suffix = next((s for s in _SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")
    return name[: len(name) - len(suffix)]


def json_lines(path: Path, faults: Faults) -> Iterator[Record]:
    """Yield the objects of a JSONL file, each with `file, line n`; blank lines are counted but yield nothing.

    Raises:
        BrokenLineError: A line is not a JSON object in UTF-8, and `faults` raises.
        DatasetError: As in `reading`, in both modes, since nothing after that place can be read.
    """
    with reading(path), _opened(path) as file:
        for number, line in enumerate(file, start=1):
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = f"{path}, line {number}"
            if raw.strip():
                with faults.at(where):
                    yield where, _object(raw)


def json_file(path: Path) -> Iterator[Record]:
    """Yield the one JSON value of a file; a DatasetError if it is not JSON, or as in `reading`."""
    with reading(path), _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        yield str(path), json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"not JSON: {error}", where=str(path), next_step="If it has one object per line, rename it to `.jsonl`."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the system and the decompressor into a DatasetError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise DatasetError(
            f"cannot be read: {reason}", where=str(path), next_step="Check the path, or get the file again."
        ) from error


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


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None


def text_of(record: Any, name: str) -> str:
    """The text in the field `name`, without white space around it.

    Raises:
        DatasetError: The field is missing.
        ConfigError: The value is not text, is blank, or contains characters that no tokenizer accepts.
    """
    value = _field(record, name)
    if value is None:
        raise DatasetError(f"no {name}")
    check_text(value, name)
    return str(value).strip()


def title_of(record: Any) -> str:
    """The title of a record; empty if it has no title, as in most sets."""
    value = _field(record, "title")
    return text_of(record, "title") if isinstance(value, str) and value.strip() else ""


def items_of(record: Any, name: str) -> list[Any]:
    """The list in the field `name`; a DatasetError if the field is missing or not a list."""
    value = _field(record, name)
    if not isinstance(value, list):
        raise DatasetError(f"no list of {name}" if value is None else f"{name} must be a list")
    return value


def texts_of(values: Any, name: str) -> tuple[str, ...]:
    """The distinct texts, in order, of a text, a list of texts or of `{"text": …}`, or `{"text": [text, …]}`.

    The last form is that of SQuAD on the hub.

    Raises:
        DatasetError: There is no text.
        ConfigError: As in `text_of`.
    """
    if isinstance(values, dict):
        values = values.get("text")
    found = values if isinstance(values, list | tuple) else [values]
    texts = [text_of({name: v.get("text") if isinstance(v, dict) else v}, name) for v in found]
    if not texts:
        raise DatasetError(f"no {name}")
    return tuple(dict.fromkeys(texts))
