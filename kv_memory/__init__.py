"""kv-memory: documents as distilled key-value caches, stored on disk and decoded from without their text.

The public names below are loaded on first use, so that `import kv_memory` and the command line start without torch.
The errors are loaded at once: they cost nothing, and an `except` clause should never import a model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kv_memory import errors
from kv_memory.errors import *  # noqa: F403 (all of them)

if TYPE_CHECKING:
    from kv_memory.cache.distilled import DistilledCache as DistilledCache
    from kv_memory.cache.fingerprint import Fingerprint as Fingerprint
    from kv_memory.cache.keep import Keep as Keep
    from kv_memory.compress import Compressor as Compressor
    from kv_memory.config import DecodeSettings as DecodeSettings
    from kv_memory.conversation import Conversation as Conversation
    from kv_memory.documents import Document as Document
    from kv_memory.generate import Generator as Generator
    from kv_memory.generate import Turn as Turn
    from kv_memory.generate.answer import Answer as Answer
    from kv_memory.memory import KVMemory as KVMemory
    from kv_memory.model.backbone import Backbone as Backbone
    from kv_memory.query import Reference as Reference
    from kv_memory.store import Store as Store

__version__ = "0.1.0"

_LAZY = {
    "Answer": "kv_memory.generate.answer",
    "Backbone": "kv_memory.model.backbone",
    "Compressor": "kv_memory.compress",
    "Conversation": "kv_memory.conversation",
    "DecodeSettings": "kv_memory.config",
    "DistilledCache": "kv_memory.cache.distilled",
    "Document": "kv_memory.documents",
    "Fingerprint": "kv_memory.cache.fingerprint",
    "Generator": "kv_memory.generate",
    "KVMemory": "kv_memory.memory",
    "Keep": "kv_memory.cache.keep",
    "Reference": "kv_memory.query",
    "Store": "kv_memory.store",
    "Turn": "kv_memory.generate",
}

__all__ = [*_LAZY, *(name for name in dir(errors) if name.endswith("Error")), "__version__"]

# Hidden from type checkers: to them a module-level __getattr__ would make every misspelt name valid.
if not TYPE_CHECKING:

    def __getattr__(name):
        try:
            module = _LAZY[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        value = globals()[name] = getattr(import_module(module), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
