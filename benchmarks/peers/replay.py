"""Presses that replay the document, after a prefix that is never pruned: KVzip, KVzip+, KVgrad and KVCompose.

The KVzip family uses the head of the model's chat template as the uncompressed part, and its tail after the request to
repeat. Here the first is our prefix; the second comes with the work file: the same tail for prompt
forms `chat` and `brief`, and for `passage` a line break, which is kvpress's own choice for models without a template.

The ranking of the KVzip family does not depend on how much is kept. So the scores of the last document are cached, and
the next keep_ratio of the same press reuses them, with the time they cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import KVComposePress, KVgradPress, KVzipPress
from transformers import DynamicCache

__all__ = ["Held", "KVComposeBehind", "KVgradBehind", "KVzipBehind"]


@dataclass
class Held:
    """What a press of the KVzip family found in one document.

    Attributes:
        ids: Token ids of prefix and document.
        layers: Keys and values of each layer, before anything is pruned.
        scores: `(num_layers, 1, num_kv_heads, n_prefix + n_tokens)`.
        elapsed_s: Time that all this took, in seconds.
    """

    ids: torch.Tensor | None = None
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    scores: torch.Tensor | None = None
    elapsed_s: float = 0.0


@dataclass
class KVzipBehind(KVzipPress):
    """KVzip on a document after a prefix.

    Attributes:
        n_prefix: Number of tokens that are neither repeated nor pruned.
        n_kept: Entries of the document that remain, per head on average.
        tail_ids: Tokens that follow the request to repeat.
        per_head: Whether to keep exactly `n_kept` in every head and delete the others. Otherwise kvpress's own choice:
            one ranking over all layers and heads (or over the heads of each layer, with `layerwise`) and as many
            entries in total; what is pruned stays in the cache and is only marked, see `asking`.
        held: Results for the last document.
    """

    n_prefix: int = 0
    n_kept: int = 0
    tail_ids: tuple[int, ...] = ()
    per_head: bool = False
    held: Held = field(default_factory=Held)

    def again(self, model: Any, ids: torch.Tensor) -> DynamicCache | None:
        """The document of `held` pruned by what was found then; None for another document."""
        if self.held.ids is None or not torch.equal(self.held.ids, ids):
            return None
        assert self.held.scores is not None
        self._cache, self.score_val = DynamicCache(), self.held.scores.clone()
        for index, (keys, values) in enumerate(self.held.layers):
            self._cache.update(keys, values, index)
        self._prune(model)
        return self._cache

    def _perform_kvzip_compression(self, model: Any, tokenizer: Any) -> None:
        self.prefix_length = self.n_prefix
        self._suffix_ids = torch.tensor([self.tail_ids])
        super()._perform_kvzip_compression(model, tokenizer)

    def compress_post(self, model: Any) -> None:
        """Hold what was found, and prune; called once all parts of the document have been asked for."""
        self.held.ids, self.held.scores = self._context_ids, self.score_val.clone()
        self.held.layers = [(layer.keys, layer.values) for layer in self._cache.layers]
        self._prune(model)

    def _prune(self, model: Any) -> None:
        if not self.per_head:
            # `compress_post` raises the scores of the first `n_sink` entries; at this point the field has no other use.
            n_sink, self.n_sink = self.n_sink, self.n_prefix
            super().compress_post(model)
            self.n_sink = n_sink
            return
        self.score_val[..., : self.n_prefix] = torch.inf
        indices = self.score_val.topk(self.n_prefix + self.n_kept, dim=-1).indices
        for layer, here in zip(self._cache.layers, indices, strict=True):
            here = here.unsqueeze(-1).expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, here), layer.values.gather(2, here)


@dataclass
class KVgradBehind(KVzipBehind, KVgradPress):
    """KVgrad behind a prefix."""

    chunk_size: int = KVgradPress.chunk_size  # else it were KVzip's


@dataclass
class KVComposeBehind(KVComposePress):
    """KVCompose behind a prefix, unstructured: one ranking over all layers and heads.

    Attributes:
        n_prefix: Tokens that are not pruned.
    """

    n_prefix: int = 0

    def enhance_scores(self) -> None:
        """kvpress's, then the prefix's are raised above all others."""
        super().enhance_scores()
        self.scores[..., : self.n_prefix] = torch.inf

    def compress_unstructured(self, model: Any) -> None:
        """kvpress's, and the cache without the second reading of the document."""
        super().compress_unstructured(model)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.context_len], layer.values[:, :, : self.context_len]
