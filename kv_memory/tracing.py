"""OpenTelemetry spans if `opentelemetry-api` is installed; otherwise nothing.

Spans contain sizes, counts and names of collections, never texts.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any


def span(name: str, **attributes: str | int | float | bool) -> AbstractContextManager[Any]:
    """A span around a block: `kv_memory.NAME` with attributes `kv_memory.*`.

    Without the package `opentelemetry-api` it costs a dictionary look-up. Exporting the spans is up to the
    application, as always with OpenTelemetry. An exception that leaves the block is recorded.
    """
    tracer = _tracer()
    if tracer is None:
        return nullcontext()
    named = {f"kv_memory.{key}": value for key, value in attributes.items()}
    manager: AbstractContextManager[Any] = tracer.start_as_current_span(f"kv_memory.{name}", attributes=named)
    return manager


@cache
def _tracer() -> Any:
    try:
        return importlib.import_module("opentelemetry.trace").get_tracer("kv_memory")
    except ImportError:
        return None
