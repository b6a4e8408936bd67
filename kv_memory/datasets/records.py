"""Taking a record apart: fields that must be there, and a stream of records turned into examples or rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from kv_memory.datasets.example import check_text
from kv_memory.datasets.faults import Faults
from kv_memory.errors import DatasetError

__all__ = ["Record", "each", "items_of", "text_of", "texts_of", "title_of"]

_T = TypeVar("_T")

Record = tuple[str, Any]
"""Where a record stands, for errors, and the record itself."""


def each(records: Iterable[Record], make: Callable[[str, Any], Iterable[_T]], faults: Faults) -> Iterator[_T]:
    """What `make(where, record)` gives for each record, in order; nothing for those that are broken and skipped."""
    for where, record in records:
        made: list[_T] = []
        with faults.at(where):
            made = list(make(where, record))
        yield from made


def text_of(record: Any, name: str) -> str:
    """The text under a name, without white space around it.

    Raises:
        DatasetError: There is none.
        ConfigError: It is no text, or blank, or holds what no tokenizer takes.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if value is None:
        raise DatasetError(f"no {name}")
    check_text(value, name)
    return str(value).strip()


def title_of(record: Any) -> str:
    """The title, which most sets do not have; empty where there is none."""
    value = record.get("title") if isinstance(record, dict) else None
    return text_of(record, "title") if isinstance(value, str) and value.strip() else ""


def items_of(record: Any, name: str) -> list[Any]:
    """The list under a name.

    Raises:
        DatasetError: There is none.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise DatasetError(f"no list of {name}" if value is None else f"{name} must be a list")
    return value


def texts_of(values: Any, name: str) -> tuple[str, ...]:
    """Different texts, in order, of a text, a list of texts or of `{"text": …}`, or `{"text": [text, …]}`.

    The last form is that of SQuAD on the hub.

    Raises:
        DatasetError: There is none.
        ConfigError: One of them is no text, or blank, or holds what no tokenizer takes.
    """
    if isinstance(values, dict):
        values = values.get("text")
    found = values if isinstance(values, list | tuple) else [values]
    texts = [text_of({name: v.get("text") if isinstance(v, dict) else v}, name) for v in found]
    if not texts:
        raise DatasetError(f"no {name}")
    return tuple(dict.fromkeys(texts))
