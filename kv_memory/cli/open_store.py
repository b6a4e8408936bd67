"""Opens the store for a command, with a status line while that takes a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Place
from kv_memory.cli.output import Output

if TYPE_CHECKING:
    from kv_memory.memory import KVMemory
    from kv_memory.store import Store


def open_store(out: Output, place: Place) -> Store:
    """Open an existing store for commands that need no model. Errors as in `Store.open`.

    A KVMemory would load the model library, which takes seconds.
    """
    with out.working("Starting"):
        from kv_memory.store import Store

        return Store.open(place.store, collection=place.collection, create=False)


def open_memory(out: Output, place: Place, *, create: bool = False, **changes: Any) -> KVMemory:
    """Open a memory, or with `create` also a new one; changes and errors as in `KVMemory.open`.

    With `create` the model is loaded at once, so that a wrong name does not leave an empty store behind.
    """
    with out.working("Loading the model" if create else "Starting"):
        from kv_memory.memory import KVMemory

        return KVMemory.open(place.store, collection=place.collection, create=create, load_model=create, **changes)


def load_model(out: Output, memory: KVMemory) -> None:
    """Load the model and the adapter now."""
    name = memory.settings.model
    with out.working(f"Loading the model ({name})"):
        memory.load()
