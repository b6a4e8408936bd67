"""Converts the call options of frameworks to `DecodeSettings`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kv_memory import DecodeSettings, UnsupportedRequestError

__all__ = ["decode_settings", "refuse_tools"]

_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_output": "max_new_tokens",
    "timeout": "timeout_s",
}
_FIELDS = {field.name for field in dataclasses.fields(DecodeSettings)}
_TOOLS = {"tools", "tool_choice", "functions", "function_call", "tool_required"}


def decode_settings(base: DecodeSettings, options: Mapping[str, Any]) -> DecodeSettings:
    """`base` with the decoding options applied. Unknown options, and options that are None, are ignored.

    Raises:
        ConfigError: A value is out of range.
        UnsupportedRequestError: The options ask for tools.
    """
    refuse_tools(options)
    changes: dict[str, Any] = {}
    for name, value in options.items():
        field = _NAMES.get(name, name)
        if value is not None and field in _FIELDS:
            changes[field] = _stops(value) if field == "stop" else value
    return dataclasses.replace(base, **changes)


def refuse_tools(options: Mapping[str, Any]) -> None:
    """Raise if the options ask for tool calls.

    Raises:
        UnsupportedRequestError: The options ask for tools; the message says what to do instead.
    """
    asked = sorted(name for name in _TOOLS if options.get(name))
    if asked:
        raise UnsupportedRequestError(
            "this model cannot call tools",
            where=", ".join(asked),
            next_step="Give the query engine or chain itself to an agent as a tool, driven by a model that can call "
            "tools; for answers in a fixed format use structured output.",
        )


def _stops(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
