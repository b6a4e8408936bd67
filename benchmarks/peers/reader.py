"""One model that reads documents through a press. Runs on Transformers and kvpress alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

__all__ = ["Reader", "Reading"]


@dataclass(frozen=True)
class Reading:
    """What is left of a text that was read.

    Attributes:
        keys: Per layer, `(1, num_kv_heads, n_held, head_dim)`, with rotary embedding.
        values: The same shapes.
        visible: Per layer, `(num_kv_heads, n_held)`: False for entries that a press evicts by masking them, because
            heads keep different numbers; None where all that is held can be seen.
        n_positions: How long the text was: where the question begins.
        elapsed_s: Reading and compressing.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    visible: tuple[torch.Tensor, ...] | None
    n_positions: int
    elapsed_s: float

    @property
    def n_entries(self) -> int:
        """Entries that can be seen, over all layers and heads."""
        if self.visible is not None:
            return sum(int(mask.sum()) for mask in self.visible)
        return sum(key.shape[1] * key.shape[2] for key in self.keys)


class Reader:
    """A causal LM under Transformers' own attention.

    Args:
        model: A folder or a hub id.
        dtype: Name of a torch dtype.
        device: A torch device, or `auto`.
    """

    def __init__(self, model: str, *, dtype: str, device: str = "auto") -> None:
        logging.disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.model: Any = loaded.to(device).eval().requires_grad_(False)
        self.device = self.model.device

    @torch.no_grad()
    def read(self, ids: Sequence[int], *, press: BasePress | None = None, eager: bool = False) -> Reading:
        """Prefill a text, with a press at work if there is one."""
        self.model.set_attn_implementation("eager" if eager else "sdpa")
        attentions = [layer.self_attn for layer in self.model.model.layers]
        for attention in attentions:
            attention.masked_key_indices = None  # kvpress leaves it on the model
        cache = DynamicCache()
        tokens = torch.tensor([list(ids)], device=self.device)
        self._wait()
        start_s = time.perf_counter()
        if press is None:
            self.model.model(input_ids=tokens, past_key_values=cache)
        else:
            with press(self.model):
                self.model.model(input_ids=tokens, past_key_values=cache)
        self._wait()
        elapsed_s = time.perf_counter() - start_s
        visible = None
        if attentions[0].masked_key_indices is not None:
            shape = cache.layers[0].keys.shape[1:3]
            visible = tuple(self._without(attention.masked_key_indices, shape) for attention in attentions)
        keys, values = (tuple(getattr(layer, name) for layer in cache.layers) for name in ("keys", "values"))
        return Reading(keys, values, visible, len(ids), elapsed_s)

    def text(self, ids: Sequence[int], *, stop: Sequence[str]) -> str:
        """The answer these tokens spell, without what ended it."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        for word in stop:
            text = text.split(word, 1)[0]
        return text.strip()

    def _without(self, masked: tuple[torch.Tensor, ...], shape: Sequence[int]) -> torch.Tensor:
        visible = torch.ones(tuple(shape), dtype=torch.bool, device=self.device)
        visible[masked[1].to(self.device), masked[2].to(self.device)] = False
        return visible

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
