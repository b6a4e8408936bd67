"""Opens the store for a command, with a status line while that takes a moment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_memory.cli.output import Output

if TYPE_CHECKING:
    from kv_memory.memory import KVMemory
    from kv_memory.store import Store

__all__ = ["load_model", "open_memory", "open_store"]


def open_store(out: Output, store: Path, collection: str) -> Store:
    """Open an existing store for commands that need no model. Errors as in `Store.open`.

    A KVMemory would load the model library, which takes seconds.
    """
    with out.working("Starting"):
        from kv_memory.store import Store

        return Store.open(store, collection=collection, create=False)


def open_memory(out: Output, store: Path, collection: str, *, create: bool = False, **changes: Any) -> KVMemory:
    """Open a memory, or with `create` also a new one; changes and errors as in `KVMemory.open`.

    With `create` the model is loaded at once, so that a wrong name does not leave an empty store behind.
    """
    with out.working("Loading the model" if create else "Starting"):
        from kv_memory.memory import KVMemory

        return KVMemory.open(store, collection=collection, create=create, load_model=create, **changes)


def load_model(out: Output, memory: KVMemory) -> None:
    """Load the model and the adapter now."""
    name = memory.settings.model
    with out.working(f"Loading the model ({name})"):
        memory.load()
