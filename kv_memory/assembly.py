"""Builds the objects that a store's settings name: the model, the compressor with its adapter, the shared prefix."""

from __future__ import annotations

import contextlib

from kv_memory.compress import Adapter, Compressor, RefineSettings
from kv_memory.config import DtypeName
from kv_memory.errors import CorruptCacheError, StoreFullError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import adapter_folder
from kv_memory.model.prompts import PromptForm
from kv_memory.settings import MemorySettings
from kv_memory.store import Store

__all__ = ["load_backbone", "load_compressor", "share_prefix"]


def load_backbone(
    settings: MemorySettings, *, dtype: DtypeName, device: str, prompt_form: PromptForm | None
) -> Backbone:
    """The model that a store's settings name. Errors as in `Backbone.load`."""
    return Backbone.load(settings.model, dtype=dtype, device=device, prompt=prompt_form or settings.prompt)


def load_compressor(settings: MemorySettings, backbone: Backbone) -> Compressor:
    """The compressor for a store's settings. Errors as in `Adapter.load`."""
    adapter = None if settings.adapter is None else Adapter.load(adapter_folder(settings.adapter), backbone)
    refine = None
    if settings.refine_steps:
        most = max(settings.refine_steps, RefineSettings().max_steps)
        refine = RefineSettings(steps=settings.refine_steps, min_fidelity=settings.min_fidelity, max_steps=most)
    return Compressor(backbone, selector=settings.selector, adapter=adapter, refine=refine)


def share_prefix(store: Store, backbone: Backbone) -> None:
    """Load the prefilled prefix from the store, or store it there for the next process."""
    store.warm()
    with contextlib.suppress(CorruptCacheError):  # quarantined by the store; prefilled again below
        path = store.get_prefix(backbone.prefix_key)
        if path is not None:
            backbone.load_prefix(path)
            return
    with contextlib.suppress(StoreFullError):  # a stored prefix only saves time
        store.put_prefix(backbone.prefix_key, backbone.prefix.to_bytes(key=backbone.prefix_key))
