"""LazyCompressor: the model and compressor that settings name, loaded on first use."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from kv_memory.compress import Adapter, Compressor, RefineSettings
from kv_memory.config import DtypeName, WeightsName
from kv_memory.errors import ConfigError, CorruptCacheError, StoreFullError
from kv_memory.generate.scheduler import MAX_BATCH, MAX_QUEUE, Scheduler
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import adapter_folder
from kv_memory.model.prompts import PromptForm
from kv_memory.settings import MemorySettings
from kv_memory.store import Store

_HOT_SIZE_BYTES = 512 * 2**20


class LazyCompressor:
    """The model and compressor of a store's settings. Thread-safe; shared by the store's collections.

    Args:
        settings: Settings that name model, adapter and selector.
        dtype: Type of the model's weights and caches.
        device: Device of the model.
        weights: Weights of questions and answers, see `Backbone.load`.
        backbone: The model, if it is loaded already.
        prompt_form: Prompt form, instead of the one that the settings name.
        max_batch: See `Scheduler`.
        max_queue: See `Scheduler`.
        hot_size_bytes: Size limit in bytes of the model's hot caches; None means `default_hot_size_bytes`.

    Attributes:
        scheduler: Scheduler of the model, for all that is decoded with it.

    Raises:
        ConfigError: `hot_size_bytes` is negative.
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
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        hot_size_bytes: int | None = None,
    ) -> None:
        self._settings = settings
        self._place: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights}
        self.scheduler = Scheduler(max_batch=max_batch, max_queue=max_queue)
        self._backbone = backbone
        self._prompt = prompt_form or settings.prompt
        if hot_size_bytes is not None and hot_size_bytes < 0:
            raise ConfigError(f"hot_size_bytes must be 0 or more, got {hot_size_bytes}", where="hot_size_bytes")
        self.hot_size_bytes = hot_size_bytes
        if backbone is not None:
            self._limit_hot(backbone)
        self._compressor: Compressor | None = None
        self._prefix_shared = False
        self._lock = threading.RLock()

    @property
    def options(self) -> dict[str, Any]:
        """Options of `KVMemory.open` that concern the running model, and are not recorded in the store."""
        scheduler = self.scheduler
        queue = {"max_batch": scheduler.max_batch, "max_queue": scheduler.max_queue}
        return {**self._place, **queue, "hot_size_bytes": self.hot_size_bytes}

    @property
    def backbone(self) -> Backbone:
        """The model. Errors as in `Backbone.load`."""
        with self._lock:
            if self._backbone is None:
                self._backbone = Backbone.load(
                    self._settings.model, **self._place, prompt=self._prompt, chat_options=self._settings.switches
                )
                self._limit_hot(self._backbone)
            return self._backbone

    def _limit_hot(self, backbone: Backbone) -> None:
        size_bytes = self.hot_size_bytes
        backbone.hot.limit(default_hot_size_bytes() if size_bytes is None else size_bytes)

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


def default_hot_size_bytes() -> int:
    """512 MiB, or a sixteenth of the memory of a machine with less than 8 GiB."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return _HOT_SIZE_BYTES
    return min(_HOT_SIZE_BYTES, memory // 16)


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
