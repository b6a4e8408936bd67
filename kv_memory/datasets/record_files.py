"""Access to records: required fields, and the conversion of a stream of records to examples or rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from kv_memory.datasets.example import check_text
from kv_memory.datasets.on_error import Faults
from kv_memory.errors import DatasetError

__all__ = ["Record", "each", "items_of", "text_of", "texts_of", "title_of"]

_T = TypeVar("_T")

Record = tuple[str, Any]
"""The place of a record, for errors, and the record itself."""


def each(records: Iterable[Record], make: Callable[[str, Any], Iterable[_T]], faults: Faults) -> Iterator[_T]:
    """Yield the results of `make(where, record)` for each record, in order; skipped broken records yield nothing."""
    for where, record in records:
        made: list[_T] = []
        with faults.at(where):
            made = list(make(where, record))
        yield from made


def text_of(record: Any, name: str) -> str:
    """The text in the field `name`, without white space around it.

    Raises:
        DatasetError: The field is missing.
        ConfigError: The value is not text, is blank, or contains characters that no tokenizer accepts.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if value is None:
        raise DatasetError(f"no {name}")
    check_text(value, name)
    return str(value).strip()


def title_of(record: Any) -> str:
    """The title of a record; empty if it has no title, as in most sets."""
    value = record.get("title") if isinstance(record, dict) else None
    return text_of(record, "title") if isinstance(value, str) and value.strip() else ""


def items_of(record: Any, name: str) -> list[Any]:
    """The list in the field `name`.

    Raises:
        DatasetError: The field is missing or not a list.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise DatasetError(f"no list of {name}" if value is None else f"{name} must be a list")
    return value


def texts_of(values: Any, name: str) -> tuple[str, ...]:
    """The distinct texts, in order, of a text, a list of texts or of `{"text": …}`, or `{"text": [text, …]}`.

    The last form is that of SQuAD on the hub.

    Raises:
        DatasetError: There is no text.
        ConfigError: A value is not text, is blank, or contains characters that no tokenizer accepts.
    """
    if isinstance(values, dict):
        values = values.get("text")
    found = values if isinstance(values, list | tuple) else [values]
    texts = [text_of({name: v.get("text") if isinstance(v, dict) else v}, name) for v in found]
    if not texts:
        raise DatasetError(f"no {name}")
    return tuple(dict.fromkeys(texts))
