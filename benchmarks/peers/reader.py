"""One model that reads documents through a press. Runs on Transformers and kvpress alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import BasePress
from kvpress.presses import kvzip_press
from opening import first_visible
from replay import KVzipBehind
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

__all__ = ["Reader", "Reading"]


@dataclass(frozen=True)
class Reading:
    """Entries that remain of a prefilled text.

    Attributes:
        keys: Per layer, `(1, num_kv_heads, n_held, head_dim)`, with rotary embedding.
        values: The same shapes.
        visible: Per layer, `(num_kv_heads, n_held)`: False for entries that a press evicts by masking them, because
            heads keep different numbers; None if all entries are visible.
        n_positions: Length of the text, and position where the question begins.
        elapsed_s: Time of prefill and compression: processor seconds, summed over threads, or GPU seconds.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    visible: tuple[torch.Tensor, ...] | None
    n_positions: int
    elapsed_s: float

    @property
    def n_entries(self) -> int:
        """Number of visible entries, over all layers and heads."""
        if self.visible is not None:
            return sum(int(mask.sum()) for mask in self.visible)
        return sum(key.shape[1] * key.shape[2] for key in self.keys)


class Reader:
    """A causal LM under Transformers' own attention.

    Args:
        model: Model folder or hub id.
        dtype: Name of a torch dtype.
        device: Torch device, or `auto`.
    """

    def __init__(self, model: str, *, dtype: str, device: str = "auto") -> None:
        logging.disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.model: Any = loaded.to(device).eval().requires_grad_(False)
        self.device = self.model.device
        self._is_warm = False
        # KVzip reads the tokenizer from disk on every use, which would count as compression.
        kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: self.tokenizer)

    def warm_up(self, ids: Sequence[int]) -> None:
        """Do the one-time work of a first prefill; on a GPU, of each length."""
        if not self._is_warm or self.device.type == "cuda":
            self.read(ids)
            self._is_warm = True

    @torch.no_grad()
    def read(self, ids: Sequence[int], *, press: BasePress | None = None, eager: bool = False) -> Reading:
        """Prefill a text, under a press if there is one."""
        self.model.set_attn_implementation("eager" if eager else "sdpa")
        attentions = [layer.self_attn for layer in self.model.model.layers]
        for attention in attentions:
            attention.masked_key_indices = None  # kvpress leaves it on the model
        tokens = torch.tensor([list(ids)], device=self.device)
        torch.manual_seed(0)  # Compactor draws a sketch
        start_s = self._now()
        cache = press.again(self.model, tokens) if isinstance(press, KVzipBehind) else None
        before_s = 0.0 if cache is None else press.held.elapsed_s
        if cache is None:
            cache = DynamicCache()
            with contextlib.nullcontext() if press is None else press(self.model):
                self.model.model(input_ids=tokens, past_key_values=cache)
        elapsed_s = before_s + self._now() - start_s
        if isinstance(press, KVzipBehind) and not before_s:
            press.held.elapsed_s = elapsed_s
        visible = None
        if attentions[0].masked_key_indices is not None:
            shape = cache.layers[0].keys.shape[1:3]
            visible = tuple(self._without(attention.masked_key_indices, shape) for attention in attentions)
        keys, values = (tuple(getattr(layer, name) for layer in cache.layers) for name in ("keys", "values"))
        return Reading(keys, values, visible, len(ids), elapsed_s)

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, vocab_size)`, float32, of what the language model head sees."""
        log_probs: torch.Tensor = self.model.lm_head(hidden).float().log_softmax(-1)
        return log_probs

    def text(self, ids: Sequence[int], *, stop: Sequence[str]) -> str:
        """The answer these tokens spell, without what ended it."""
        text = self._decode(ids)
        return text[: _stopped_at(text, stop)].strip()

    def is_stopped(self, ids: Sequence[int], *, stop: Sequence[str]) -> bool:
        """Whether one of the strings ended an answer."""
        return _stopped_at(self._decode(ids), stop) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _without(self, masked: tuple[torch.Tensor, ...], shape: Sequence[int]) -> torch.Tensor:
        visible = torch.ones(tuple(shape), dtype=torch.bool, device=self.device)
        visible[masked[1].to(self.device), masked[2].to(self.device)] = False
        return visible

    def _now(self) -> float:
        """Seconds of work so far: processor time, which other programs do not lengthen, or wall time on a GPU."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def _stopped_at(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins; one that ends before the first visible character does not count."""
    first = first_visible(text)
    found = [text.find(word, max(0, first - len(word) + 1)) for word in stop]
    return min((at for at in found if at >= 0), default=None)
