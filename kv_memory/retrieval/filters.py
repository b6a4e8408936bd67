"""Which documents a question may be answered from: by their ids and by their metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from kv_memory.config import check_names
from kv_memory.errors import ConfigError, DocumentNotFoundError

Value: TypeAlias = str | int | float | bool | None
Filter: TypeAlias = Mapping[str, Value | Sequence[Value]]


def check_request(
    *, top_k: int, document_ids: Collection[str] | None, filter: Filter | None, min_score: float | None
) -> None:
    """Refuse malformed arguments of `KVMemory.retrieve`.

    Raises:
        ConfigError: An argument has a wrong type or is out of range.
    """
    if top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}", where="top_k")
    if document_ids is not None and (
        isinstance(document_ids, str)
        or not isinstance(document_ids, Collection)
        or not all(isinstance(id_, str) for id_ in document_ids)
    ):
        raise ConfigError(
            f"document_ids must be a list of ids, got {document_ids!r:.80}",
            where="document_ids",
            next_step="Pass e.g. ['a.md', 'b.md'].",
        )
    if filter is not None and not isinstance(filter, Mapping):
        raise ConfigError(
            f"filter must be a mapping, got {type(filter).__name__}", where="filter", next_step="E.g. {'year': 2026}."
        )
    for name, wanted in (filter or {}).items():
        if not isinstance(name, str) or not all(isinstance(value, Value) for value in _values(wanted)):
            raise ConfigError(
                f"a filter maps names of metadata to a value or a list of values, got {name!r:.40}: {wanted!r:.40}",
                where="filter",
                next_step="Values are texts, numbers, True, False or None, e.g. {'year': [2025, 2026]}.",
            )
    if min_score is not None and (
        isinstance(min_score, bool) or not isinstance(min_score, int | float) or not math.isfinite(min_score)
    ):
        raise ConfigError(f"min_score must be a number, got {min_score!r:.40}", where="min_score")


def matching_documents(
    documents: Mapping[str, Mapping[str, Any]], document_ids: Collection[str] | None, filter: Filter | None
) -> set[str]:
    """The ids of the documents that are among `document_ids` and whose metadata has the values of the filter.

    A value of metadata that is a list matches if one of its items does.

    Args:
        documents: Metadata of all documents of the collection by id.
        document_ids: Ids of documents; None for all.
        filter: Value, or list of values of which one is enough, by name of metadata; all names must match.

    Raises:
        DocumentNotFoundError: The collection has no document with one of the ids.
        ConfigError: No document has metadata of a name in the filter.
    """
    found = set(documents if document_ids is None else document_ids)
    for id_ in found - documents.keys():
        raise DocumentNotFoundError(
            f"no document {id_!r} in this collection", where=id_, next_step="List the ids with `kv-memory list`."
        )
    if filter:
        known = {name for metadata in documents.values() for name in metadata}
        if documents:
            every = "No document of the collection has any." if not known else ""
            check_names(filter, known, what="metadata", where="filter", every=every)
        found = {id_ for id_ in found if all(_matches(documents[id_], name, filter[name]) for name in filter)}
    return found


def _matches(metadata: Mapping[str, Any], name: str, wanted: Value | Sequence[Value]) -> bool:
    if name not in metadata:
        return False
    return any(_equal(value, each) for value in _values(metadata[name]) for each in _values(wanted))


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple | set | frozenset) else [value]  # type: ignore[return-value]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)  # True is not 1
