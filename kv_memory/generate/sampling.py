"""Sampler: picks the next token from logits, greedily or at random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kv_memory.config import DecodeSettings

__all__ = ["Sampler"]


class Sampler:
    """Picks tokens for one answer, with its own random generator.

    Args:
        settings: Decoding settings; temperature 0 is greedy.
        device: Device of the logits.
    """

    def __init__(self, settings: DecodeSettings, *, device: torch.device) -> None:
        self._greedy = settings.temperature == 0
        self._warpers = LogitsProcessorList()
        if self._greedy:
            return
        self._generator = torch.Generator(device=device)
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)
        self._warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id from `(vocab_size,)` logits."""
        if self._greedy:
            return int(logits.argmax())
        none: Any = torch.empty(1, 0, dtype=torch.long)
        scores = self._warpers(none, logits[None].float())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
