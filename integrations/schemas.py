"""Makes JSON schemas strict enough for a small model."""

from __future__ import annotations

from typing import Any

__all__ = ["closed"]

_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # their keys are names, not schema keywords
_VALUES = {"default", "const", "enum", "examples"}


def closed(node: Any) -> Any:
    """A copy of a JSON schema with `additionalProperties: false` on objects that do not set `additionalProperties`.

    JSON schema allows additional properties by default, and a small model that is allowed to keeps adding some.
    """
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for word, value in node.items():
        if word in _NAMED and isinstance(value, dict):
            found[word] = {name: closed(item) for name, item in value.items()}
        else:  # not inside an allOf of several parts: each names only some of the properties of one object
            found[word] = value if word in _VALUES or (word == "allOf" and len(value) > 1) else closed(value)
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found
