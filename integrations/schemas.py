"""JSON schemas as a small model can follow them."""

from __future__ import annotations

from typing import Any

__all__ = ["closed"]

_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # their keys are names, not words of the schema
_VALUES = {"default", "const", "enum", "examples"}


def closed(node: Any) -> Any:
    """A JSON schema whose objects have the properties they name and no others, unless it says that there may be more.

    JSON schema allows others by default, and a small model that may go on adding some does.
    """
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for word, value in node.items():
        if word in _NAMED and isinstance(value, dict):
            found[word] = {name: closed(item) for name, item in value.items()}
        else:  # the parts of an allOf each name some of the properties of one object
            found[word] = value if word in _VALUES or (word == "allOf" and len(value) > 1) else closed(value)
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found
