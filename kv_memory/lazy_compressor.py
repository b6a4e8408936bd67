"""LazyCompressor: the model and compressor that settings name, loaded on first use."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from kv_memory.compress import Adapter, Compressor, RefineSettings
from kv_memory.config import DtypeName, WeightsName
from kv_memory.errors import CorruptCacheError, StoreFullError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import adapter_folder
from kv_memory.model.prompts import PromptForm
from kv_memory.settings import MemorySettings
from kv_memory.store import Store


class LazyCompressor:
    """The model and compressor of a store's settings. Thread-safe; shared by the store's collections.

    Args:
        settings: Settings that name model, adapter and selector.
        dtype: Type of the model's weights and caches.
        device: Device of the model.
        weights: Weights of questions and answers, see `Backbone.load`.
        backbone: The model, if it is loaded already.
        prompt_form: Prompt form, instead of the one that the settings name.
    """

    def __init__(
        self,
        settings: MemorySettings,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        weights: WeightsName = "plain",
        backbone: Backbone | None = None,
        prompt_form: PromptForm | None = None,
    ) -> None:
        self._settings = settings
        self.place: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights}
        self._backbone = backbone
        self._prompt = prompt_form or settings.prompt
        self._compressor: Compressor | None = None
        self._prefix_shared = False
        self._lock = threading.RLock()

    @property
    def backbone(self) -> Backbone:
        """The model. Errors as in `Backbone.load`."""
        with self._lock:
            if self._backbone is None:
                self._backbone = Backbone.load(
                    self._settings.model, **self.place, prompt=self._prompt, chat_options=self._settings.switches
                )
            return self._backbone

    def load(self, store: Store | None = None) -> Compressor:
        """The compressor. Errors as in `Adapter.load`.

        The prefilled prefix is loaded from the store, or put there for the next process.
        """
        with self._lock:
            if self._compressor is None:
                self._compressor = load_compressor(self._settings, self.backbone)
            if store is not None and not self._prefix_shared:
                self._prefix_shared = True
                _share_prefix(store, self.backbone)
            return self._compressor


def load_compressor(settings: MemorySettings, backbone: Backbone) -> Compressor:
    """The compressor for a store's settings. Errors as in `Adapter.load`."""
    adapter = None if settings.adapter is None else Adapter.load(adapter_folder(settings.adapter), backbone)
    refine = None
    if settings.refine_steps:
        most = max(settings.refine_steps, RefineSettings().max_steps)
        refine = RefineSettings(steps=settings.refine_steps, min_fidelity=settings.min_fidelity, max_steps=most)
    return Compressor(backbone, selector=settings.selector, adapter=adapter, refine=refine)


def _share_prefix(store: Store, backbone: Backbone) -> None:
    store.warm()
    with contextlib.suppress(CorruptCacheError):  # quarantined by the store; prefilled again below
        path = store.get_prefix(backbone.prefix_key)
        if path is not None:
            backbone.load_prefix(path)
            return
    with contextlib.suppress(StoreFullError):  # a stored prefix only saves time
        store.put_prefix(backbone.prefix_key, backbone.prefix.to_bytes(key=backbone.prefix_key))
