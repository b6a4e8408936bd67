"""Sets on the Hugging Face hub, streamed through the optional `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from kv_memory.datasets.record_files import Record
from kv_memory.errors import DatasetError

_SPLITS = {"train": "train", "dev": "validation"}
_INSTEAD = "Pass a file instead: JSON lines of {context, question, answer}."


def hub_records(hub_id: str, *, split: Literal["train", "dev"]) -> Iterator[Record]:
    """Stream the rows of a set on the hub; nothing is kept on disk, and no code of the set is run.

    Raises:
        DatasetError: The hub is switched off, the library is not installed, or the hub does not have the set; while
            iterating, if the connection breaks.
    """
    where = f"hf:{hub_id}"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        # The values that huggingface_hub accepts as true. Checked first, because importing the library takes seconds.
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DatasetError(
                f"the hub is disabled by {variable}", where=where, next_step=f"Unset {variable}. {_INSTEAD}"
            )
    return _rows(load_hub_set(hub_id, where=where, split=_SPLITS[split], streaming=True), where)


def load_hub_set(*arguments: str | None, where: str, **options: Any) -> Any:
    """The value of `datasets.load_dataset`; `where` names the set in errors, which are those of `hub_records`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            "reading data sets from the hub needs the library `datasets`, which is not installed",
            where=where,
            next_step=f"Run `pip install 'kv-memory[train]'`. {_INSTEAD}",
        ) from error
    with _hub_errors(where):
        return load_dataset(*arguments, **options)


def _rows(stream: Any, where: str) -> Iterator[Record]:
    with _hub_errors(where):
        for number, row in enumerate(stream, start=1):
            yield f"{where}, row {number}", row


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library's own errors, and those of httpx, fsspec and pyarrow
        reason = str(error).strip().split("\n")[0][:200].rstrip(".") or type(error).__name__
        raise DatasetError(
            f"cannot be read from the hub: {reason}",
            where=where,
            next_step=f"Check the name, its splits and the connection. {_INSTEAD}",
        ) from error
