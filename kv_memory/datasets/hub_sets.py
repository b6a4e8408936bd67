"""Sets on the Hugging Face hub, streamed through the optional `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from kv_memory.datasets.record_files import Record
from kv_memory.errors import DatasetError

_SPLITS = {"train": "train", "dev": "validation"}
_ANSWER_S = 10.0
_INSTEAD = "Pass a file instead: JSON lines of {context, question, answer}."


def hub_records(hub_id: str, *, split: Literal["train", "dev"]) -> Iterator[Record]:
    """Stream the rows of a set on the hub; nothing is kept on disk, and no code of the set is run.

    Raises:
        DatasetError: The hub is switched off, the library is not installed, or the hub does not have the set; while
            iterating, if the connection breaks.
    """
    where = f"hf:{hub_id}"
    if variable := _disabled_by():  # checked first, because importing the library takes seconds
        raise DatasetError(f"the hub is disabled by {variable}", where=where, next_step=f"Unset {variable}. {_INSTEAD}")
    return _rows(load_hub_set(hub_id, where=where, split=_SPLITS[split], streaming=True), where)


def load_hub_set(hub_id: str, *arguments: str | None, where: str, **options: Any) -> Any:
    """The value of `datasets.load_dataset`; `where` names the set in errors, which are those of `hub_records`.

    A disabled hub is no error here: the library then takes sets from its cache.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(
            "reading data sets from the hub needs the library `datasets`, which is not installed",
            where=where,
            next_step=f"Run `pip install 'kv-memory[train]'`. {_INSTEAD}",
        ) from error
    if not _disabled_by():
        _check_hub(hub_id, where)
    with _hub_errors(where):
        return load_dataset(hub_id, *arguments, **options)


def _disabled_by() -> str | None:
    """The variable that switches the hub off, by the values that huggingface_hub accepts as true; None without one."""
    variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return next((name for name in variables if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), None)


def _check_hub(hub_id: str, where: str) -> None:
    """Ask the hub once. Without this question, the library would ask for every file several times, with pauses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(hub_id, timeout=_ANSWER_S)
    except (HfHubHTTPError, HFValidationError):  # it answers; the library says what is wrong with the name
        return
    except Exception as error:  # a connection failed or timed out, of whichever HTTP library the hub's uses
        raise DatasetError(
            "the hub cannot be reached",
            where=where,
            next_step=f"Check the connection; with HF_HUB_OFFLINE=1, sets of jobs are taken from its cache. {_INSTEAD}",
        ) from error


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
