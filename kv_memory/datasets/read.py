"""read_examples: read the examples of a set, given by its name or a path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from kv_memory.config import check_choice
from kv_memory.datasets.corpus import read_archive, read_texts
from kv_memory.datasets.example import Example, Row, grouped
from kv_memory.datasets.hub_sets import hub_records
from kv_memory.datasets.record_files import Faults, Record, bare_name, json_file, json_lines
from kv_memory.datasets.sets import (
    RowMaker,
    dolly_rows,
    fairytale_rows,
    qa_rows,
    quality_rows,
    squad_rows,
    squality_rows,
)
from kv_memory.documents.loaders import OnError
from kv_memory.errors import ConfigError, DatasetError

Split = Literal["train", "dev"]


class _Known(NamedTuple):
    """A published set: its rows, its files below the data folder, without `.gz`, and its id and rows on the hub.

    Only hub ids with known columns that load without code of their own are listed.
    """

    rows: RowMaker
    files: Mapping[Split, str]
    hub_id: str | None = None
    hub_rows: RowMaker = qa_rows


_KNOWN = {
    "squad": _Known(squad_rows, {"train": "squad/train.json", "dev": "squad/dev.json"}, "rajpurkar/squad"),
    "dolly": _Known(dolly_rows, {"train": "dolly/dolly-15k.jsonl"}, "databricks/databricks-dolly-15k", dolly_rows),
    "fairytaleqa": _Known(fairytale_rows, {"train": "fairytaleqa/train.jsonl", "dev": "fairytaleqa/val.jsonl"}),
    "squality": _Known(squality_rows, {"train": "squality/train.jsonl", "dev": "squality/dev.jsonl"}),
    "quality": _Known(quality_rows, {"dev": "quality/dev_sample.jsonl"}),
}

DATASETS: tuple[str, ...] = tuple(_KNOWN)
"""Names of sets that `read_examples` accepts."""


def read_examples(
    source: str | Path,
    *,
    split: Split = "train",
    data: Path | None = None,
    on_error: OnError = "raise",
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Example]:
    """Read the examples of a set, one at a time.

    A name of `DATASETS` is looked up below `data`, or else below the folder in the environment variable
    `KV_MEMORY_DATA`, e.g. `squad/dev.json.gz`; then on the Hugging Face hub.

    Args:
        source: A name of `DATASETS`; `hf:owner/name`, a set on the hub with the columns context, question and answer
            (or answers); or a path. A path is JSON lines of `{context, question, answer}` (`.jsonl`, `.jsonl.gz`;
            neighbouring lines with the same context form one example), SQuAD's nested JSON (`.json`, `.json.gz`), or
            text and Markdown: a file, a folder, or an archive (`.tar`, `.tar.gz`, `.tgz`); these examples have no
            questions. A path object is always a path, and so is a str that is not a name.
        split: Split of a named set or a set on the hub. A path is always read as a whole; `corpus_split` divides it.
        data: Folder with the named sets.
        on_error: `raise` stops at the first broken record; `skip` leaves it out.
        on_skip: Callback for the message of each record left out, which states file and line.

    Returns:
        An iterator. SQuAD's JSON and folders are held in memory while it runs; everything else is read in pieces.

    Raises:
        DatasetError: The set is missing, cannot be read, or contains no example; a missing set is reported by this
            call, the rest while iterating.
        BrokenLineError: A record is broken, with `on_error="raise"`; while iterating.
        ConfigError: `split` or `on_error` is not one of its choices, or `source` is neither a str nor a path.
    """
    check_choice(split, Split, where="split")
    check_choice(on_error, OnError, where="on_error")
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ConfigError(f"source must be a name or a path, got {source!r}", where="source")
    faults = Faults(on_error=on_error, on_skip=on_skip)
    if isinstance(source, str) and source in _KNOWN:
        examples = _named(source, split, data, faults)
    elif isinstance(source, str) and source.startswith("hf:"):
        examples = _from_hub(source.removeprefix("hf:"), source, split, qa_rows, faults)
    else:
        examples = _from_path(Path(source), faults)
    return _not_empty(examples, str(source), faults)


def data_folder(data: Path | None) -> Path | None:
    """The folder of the named sets: `data`, or else that of the environment."""
    named = os.environ.get("KV_MEMORY_DATA", "")
    return data if data is not None else Path(named) if named.strip() else None


def _named(name: str, split: Split, data: Path | None, faults: Faults) -> Iterator[Example]:
    known = _KNOWN[name]
    file = known.files.get(split)
    if file is None:
        other = next(iter(known.files))
        raise DatasetError(
            f"{name} only has the split {other!r}, not {split!r}",
            where=name,
            next_step=f"Read {other!r}, and hold out a part of it with `corpus_split`.",
        )
    folder = data_folder(data)
    if folder is not None:
        for path in (folder / f"{file}.gz", folder / file):
            if os.path.isfile(path):
                return _from_file(path, name, known.rows, faults)
    looked = f"{folder / file}(.gz) does not exist" if folder is not None else "no data folder is given"
    missing = f"the set {name} ({split}) was not found: {looked};"
    put = f"Put {file}.gz (or {file}) into a folder, and pass the folder as `data=` or in the variable KV_MEMORY_DATA"
    if known.hub_id is None:
        raise DatasetError(
            f"{missing} it is not available from the hub",
            where=name,
            next_step=f"{put}. Or pass a file of JSON lines of {{context, question, answer}}.",
        )
    try:
        return _from_hub(known.hub_id, name, split, known.hub_rows, faults)
    except DatasetError as error:
        raise DatasetError(
            f"{missing} {error.what}", where=error.where, next_step=f"{put}. Or: {error.next_step}"
        ) from error


def _from_hub(hub_id: str, source: str, split: Split, make: RowMaker, faults: Faults) -> Iterator[Example]:
    if hub_id.count("/") != 1 or not all(hub_id.split("/")):
        raise ConfigError(f"a set on the hub must be given as hf:owner/name, got {source!r}", where="source")
    return grouped(_rows(hub_records(hub_id, split=split), make, faults), source=source)


def _from_path(path: Path, faults: Faults) -> Iterator[Example]:
    name, source = path.name.lower(), bare_name(path)
    if os.path.isdir(path):
        return read_texts(path, source, faults)
    if not os.path.exists(path):
        raise DatasetError(
            "no such file or folder, and no set of this name is known",
            where=str(path),
            next_step=f"Known names are {', '.join(DATASETS)}; a set on the hub is hf:owner/name; relative paths start "
            f"at {Path.cwd()}.",
        )
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _from_file(path, source, qa_rows, faults)
    if name.endswith((".json", ".json.gz")):
        return _from_file(path, source, squad_rows, faults)
    return (read_archive if name.endswith((".tar", ".tar.gz", ".tgz")) else read_texts)(path, source, faults)


def _from_file(path: Path, source: str, make: RowMaker, faults: Faults) -> Iterator[Example]:
    whole = path.name.lower().endswith((".json", ".json.gz"))
    return grouped(_rows(json_file(path) if whole else json_lines(path, faults), make, faults), source=source)


def _rows(records: Iterable[Record], make: RowMaker, faults: Faults) -> Iterator[Row]:
    """Yield the rows of each record, in order; skipped broken records yield nothing."""
    for where, record in records:
        with faults.at(where):
            yield from make(where, record, faults)


def _not_empty(examples: Iterator[Example], name: str, faults: Faults) -> Iterator[Example]:
    found = False
    for example in examples:
        found = True
        yield example
    if not found:
        skipped = f"; {faults.n_skipped} broken records were skipped" if faults.n_skipped else ""
        raise DatasetError(
            f"no readable example in it{skipped}",
            where=name,
            next_step="Pass a set, a file of JSON lines, or a folder with text or Markdown.",
        )
