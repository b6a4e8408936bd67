"""read_examples: read the examples of a set, given by its name or a path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kv_memory.config import check_choice
from kv_memory.datasets.corpus import read_archive, read_texts
from kv_memory.datasets.example import Example, Row, grouped
from kv_memory.datasets.hub_sets import hub_records
from kv_memory.datasets.record_files import Faults, OnError, bare_name, each
from kv_memory.datasets.sets import (
    dolly_row,
    qa_row,
    read_dolly,
    read_fairytaleqa,
    read_qa,
    read_quality,
    read_squad,
    read_squality,
)
from kv_memory.errors import ConfigError, DatasetError

Split = Literal["train", "dev"]

_Reader = Callable[[Path, str, Faults], Iterator[Example]]
_RowMaker = Callable[[str, object], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """The location of a published set: its files below the data folder, without `.gz`, and its id on the hub.

    Only hub ids with known columns that load without code of their own are listed.
    """

    reader: _Reader
    files: Mapping[Split, str] = field(default_factory=dict)
    hub_id: str | None = None
    make_row: _RowMaker = qa_row


_KNOWN: Mapping[str, _Known] = {
    "squad": _Known(
        reader=read_squad, files={"train": "squad/train.json", "dev": "squad/dev.json"}, hub_id="rajpurkar/squad"
    ),
    "dolly": _Known(
        reader=read_dolly,
        files={"train": "dolly/dolly-15k.jsonl"},
        hub_id="databricks/databricks-dolly-15k",
        make_row=dolly_row,
    ),
    "fairytaleqa": _Known(
        reader=read_fairytaleqa, files={"train": "fairytaleqa/train.jsonl", "dev": "fairytaleqa/val.jsonl"}
    ),
    "squality": _Known(reader=read_squality, files={"train": "squality/train.jsonl", "dev": "squality/dev.jsonl"}),
    "quality": _Known(reader=read_quality, files={"dev": "quality/dev_sample.jsonl"}),
}

DATASETS: tuple[str, ...] = tuple(_KNOWN)
"""Names of sets that `read_examples` accepts."""

_READERS: Mapping[str, _Reader] = {
    ".jsonl": read_qa,
    ".jsonl.gz": read_qa,
    ".json": read_squad,
    ".json.gz": read_squad,
    ".tar": read_archive,
    ".tar.gz": read_archive,
    ".tgz": read_archive,
}


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
        examples = _from_hub(source.removeprefix("hf:"), source, split, qa_row, faults)
    else:
        examples = _from_path(Path(source), faults)
    return _not_empty(examples, str(source), faults)


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
    named = os.environ.get("KV_MEMORY_DATA", "")
    folder = data if data is not None else Path(named) if named.strip() else None
    if folder is not None:
        for path in (folder / f"{file}.gz", folder / file):
            if os.path.isfile(path):
                return known.reader(path, name, faults)
    looked = f"{folder / file}(.gz) does not exist" if folder is not None else "no data folder is given"
    put = f"Put {file}.gz (or {file}) into a folder, and pass the folder as `data=` or in the variable KV_MEMORY_DATA"
    if known.hub_id is None:
        raise DatasetError(
            f"the set {name} ({split}) was not found: {looked}; it is not available from the hub",
            where=name,
            next_step=f"{put}. Or pass a file of JSON lines of {{context, question, answer}}.",
        )
    try:
        return _from_hub(known.hub_id, name, split, known.make_row, faults)
    except DatasetError as error:
        raise DatasetError(
            f"the set {name} ({split}) was not found: {looked}; {error.what}",
            where=error.where,
            next_step=f"{put}. Or: {error.next_step}",
        ) from error


def _from_hub(hub_id: str, source: str, split: Split, make_row: _RowMaker, faults: Faults) -> Iterator[Example]:
    if hub_id.count("/") != 1 or not all(hub_id.split("/")):
        raise ConfigError(f"a set on the hub must be given as hf:owner/name, got {source!r}", where="source")
    return grouped(each(hub_records(hub_id, split=split), make_row, faults), source=source)


def _from_path(path: Path, faults: Faults) -> Iterator[Example]:
    if os.path.isdir(path):
        return read_texts(path, bare_name(path), faults)
    if not os.path.exists(path):
        raise DatasetError(
            "no such file or folder, and no set of this name is known",
            where=str(path),
            next_step=f"Known names are {', '.join(DATASETS)}; a set on the hub is hf:owner/name; relative paths start "
            f"at {Path.cwd()}.",
        )
    name = path.name.lower()
    reader = next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), read_texts)
    return reader(path, bare_name(path), faults)


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
