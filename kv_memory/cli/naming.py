"""Which document a person means: an id, a path, a file name, or the beginning of an id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kv_memory.errors import DocumentNotFoundError

__all__ = ["find_document_id"]

_SHOWN = 8


def find_document_id(given: str, ids: Sequence[str]) -> str:
    """The id that `given` names.

    An exact id comes first, then the path of a file (its id is the absolute path), then the end of a path (a file
    name, or `folder/name`), then the beginning of an id.

    Args:
        given: As typed.
        ids: Of all documents.

    Raises:
        DocumentNotFoundError: It names none, or several, which are listed.
    """
    for exact in (given, _as_path_id(given)):
        if exact in ids:
            return exact
    found = [id_ for id_ in ids if id_.endswith(f"/{given}")] or [id_ for id_ in ids if given and id_.startswith(given)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DocumentNotFoundError(
            "no document is named so", where=given, next_step="`kv-memory list` shows the documents there are."
        )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise DocumentNotFoundError(
        f"{len(found)} documents could be meant: {', '.join(found[:_SHOWN])}{more}",
        where=given,
        next_step="Give the whole id, or more of it.",
    )


def _as_path_id(given: str) -> str:
    try:
        return Path(given).expanduser().resolve().as_posix()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown user, a NUL: no path, so no such file
        return given
